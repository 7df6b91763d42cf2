"""LLaDA-MoE's config.json and checkpoint keys; the latter expert-wise as published, and dInfer's fused layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.fields import COMMON_NAMES, Family, Fields
from convert.mapping import Rule, Table
from djax.models.config import LLADA_MOE_MASK_ID, LladaMoeConfig

_FIXED: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "clip_qkv": (None,),
    "sliding_window": (None,),
    "qk_layernorm": (None, True),
    "hidden_act": (None, "silu"),
    "tie_word_embeddings": (None, False),
    "shared_expert_intermediate_size": (None, 0),
    "num_shared_experts": (None, 0),
    "moe_router_score_function": (None, "softmax"),
    "moe_router_enable_expert_bias": (None, False),
    "router_num_group": (None,),
    "router_topk_group": (None,),
    "routed_scaling_factor": (None, 1),
    "quantization_config": (None,),
}
"""norm_topk_prob is not among them: the architecture never renormalises, whatever it says."""
_COUNTS = {"num_experts": "num_experts", "experts_per_token": "num_experts_per_tok",
           "expert_size": "expert_intermediate_size"}


def _read(fields: Fields) -> dict[str, Any]:
    common = fields.common(own_mask_id=LLADA_MOE_MASK_ID)
    if fields.rotary_share() not in (None, 1):
        raise fields.wrong("partial_rotary_factor", "only 1 or absent is supported")
    layer_freq = fields.fields.get("moe_layer_freq")
    if layer_freq is not None and layer_freq != 1 and layer_freq != [1] * common["num_layers"]:
        raise fields.wrong("moe_layer_freq", f"only 1 for each of the {common['num_layers']} layers is supported")
    eos = fields.eos(vocab_size=common["vocab_size"])
    return {
        **common,
        **fields.counts(_COUNTS),
        **eos,
        "pad_id": fields.token("pad_token_id", vocab_size=common["vocab_size"], default=eos["eos_id"]),
    }


_LAYER = "model.layers.{layer}."

_TABLE = Table(
    rules=(
        Rule(key="model.embed_tokens.weight", leaf="embed"),
        Rule(key="model.norm.weight", leaf="norm"),
        Rule(key="lm_head.weight", leaf="head"),
        Rule(key=_LAYER + "input_layernorm.weight", leaf="layers.{layer}.attention_norm"),
        Rule(key=_LAYER + "self_attn.q_proj.weight", leaf="layers.{layer}.attention.query", merge=(2, 1)),
        Rule(key=_LAYER + "self_attn.k_proj.weight", leaf="layers.{layer}.attention.key", merge=(2, 1)),
        Rule(key=_LAYER + "self_attn.v_proj.weight", leaf="layers.{layer}.attention.value", merge=(2, 1)),
        Rule(key=_LAYER + "self_attn.o_proj.weight", leaf="layers.{layer}.attention.output", merge=(1, 2)),
        Rule(key=_LAYER + "self_attn.q_norm.weight", leaf="layers.{layer}.attention.query_norm"),
        Rule(key=_LAYER + "self_attn.k_norm.weight", leaf="layers.{layer}.attention.key_norm"),
        Rule(key=_LAYER + "post_attention_layernorm.weight", leaf="layers.{layer}.moe_norm"),
        Rule(key=_LAYER + "mlp.gate.weight", leaf="layers.{layer}.moe.router"),
        Rule(key=_LAYER + "mlp.experts.{expert}.gate_proj.weight", leaf="layers.{layer}.moe.gate"),
        Rule(key=_LAYER + "mlp.experts.{expert}.up_proj.weight", leaf="layers.{layer}.moe.up"),
        Rule(key=_LAYER + "mlp.experts.{expert}.down_proj.weight", leaf="layers.{layer}.moe.down"),
        # dInfer's fused files: gate rows, then up rows, of all experts in one tensor.
        Rule(key=_LAYER + "mlp.w1", leaf="layers.{layer}.moe.gate", part=(0, 2)),
        Rule(key=_LAYER + "mlp.w1", leaf="layers.{layer}.moe.up", part=(1, 2)),
        Rule(key=_LAYER + "mlp.w2", leaf="layers.{layer}.moe.down"),
    ),
    ignored=("model.rotary_emb.inv_freq", _LAYER + "self_attn.rotary_emb.inv_freq"),
)

FAMILY = Family(
    title="LLaDA-MoE", config=LladaMoeConfig, model_type="llada", marker="num_experts",
    names={**COMMON_NAMES, **_COUNTS}, fixed=_FIXED, read=_read, table=_TABLE)
"""LLaDA-MoE; the dense LLaDA-8B has the same model_type and no experts."""
