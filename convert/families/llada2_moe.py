"""LLaDA2's config.json and checkpoint keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.fields import COMMON_NAMES, Family, Fields
from convert.mapping import Rule, Table
from djax.models.config import LLADA2_BLOCK_LENGTH, LLADA2_MOE_MASK_ID, Llada2MoeConfig

_FIXED: Mapping[str, tuple[Any, ...]] = {
    "use_bias": (None, False),
    "use_qkv_bias": (None, False),
    "use_rmsnorm": (None, True),
    "use_qk_norm": (None, True),
    "use_sliding_window": (None, False),
    "hidden_act": (None, "silu"),
    "tie_word_embeddings": (None, False),
    "norm_head": (None, False),
    "norm_topk_prob": (None, True),
    "score_function": (None, "sigmoid"),
    "router_dtype": (None, "fp32"),
    "moe_router_enable_expert_bias": (None, True),
    "moe_router_enable_shared_expert": (None, True),
    "quantization_config": (None,),
}
"""sliding_window is not among them: it says nothing while use_sliding_window is false."""
_COUNTS = {
    "dense_size": "intermediate_size",
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "num_shared_experts",
    "num_groups": "n_group",
    "groups_per_token": "topk_group",
}
_NAMES = {
    **COMMON_NAMES,
    **_COUNTS,
    "num_dense_layers": "first_k_dense_replace",
    "rotary_dim": "rotary_dim",
    "expert_size": "moe_intermediate_size",
    "routed_scaling_factor": "routed_scaling_factor",
    "block_length": "block_length",
}
"""(block_length is in no file that is published.)"""


def _read(fields: Fields) -> dict[str, Any]:
    common = fields.common(own_mask_id=LLADA2_MOE_MASK_ID)
    # the published files have no eos_token_id: their pad token ends a sequence
    pad_id = fields.token("pad_token_id", vocab_size=common["vocab_size"])
    return {
        **common,
        **fields.counts(_COUNTS),
        "num_dense_layers": fields.integer("first_k_dense_replace", minimum=0),
        "rotary_dim": _rotary_dim(fields, common["head_dim"]),
        "expert_size": _expert_size(fields),
        "routed_scaling_factor": fields.positive("routed_scaling_factor"),
        "block_length": fields.integer("block_length", default=LLADA2_BLOCK_LENGTH),
        **fields.eos(vocab_size=common["vocab_size"], default=pad_id),
        "pad_id": pad_id,
    }


def _rotary_dim(fields: Fields, head_dim: int) -> int:
    """`rotary_dim`, or what `partial_rotary_factor` makes of a head's width; where both are there they must agree."""
    share = fields.rotary_share()
    if share is None:
        return fields.integer("rotary_dim", default=head_dim)
    rotary_dim = fields.integer("rotary_dim", default=max(int(head_dim * share), 1))
    if rotary_dim != int(head_dim * share):
        raise fields.wrong(
            "partial_rotary_factor", f"with rotary_dim={rotary_dim} and head_dim={head_dim} it must be "
            f"{rotary_dim / head_dim:g}")
    return rotary_dim


def _expert_size(fields: Fields) -> int:
    """`moe_intermediate_size`; a shared expert of another width is refused."""
    width = fields.integer("moe_intermediate_size")
    fields.fixed("moe_shared_expert_intermediate_size", (None, width))
    return width


_LAYER = "model.layers.{layer}."
_QKV = _LAYER + "attention.query_key_value.weight"

_TABLE = Table(
    rules=(
        Rule(key="model.word_embeddings.weight", leaf="embed"),
        Rule(key="model.norm.weight", leaf="norm"),
        Rule(key="lm_head.weight", leaf="head"),
        Rule(key=_LAYER + "input_layernorm.weight", leaf="layers.{layer}.attention_norm"),
        # the rows of all query heads, then those of all key heads, then those of all value heads
        Rule(key=_QKV, leaf="layers.{layer}.attention.query", merge=(2, 1), stacked=True),
        Rule(key=_QKV, leaf="layers.{layer}.attention.key", merge=(2, 1), stacked=True),
        Rule(key=_QKV, leaf="layers.{layer}.attention.value", merge=(2, 1), stacked=True),
        Rule(key=_LAYER + "attention.dense.weight", leaf="layers.{layer}.attention.output", merge=(1, 2)),
        Rule(key=_LAYER + "attention.query_layernorm.weight", leaf="layers.{layer}.attention.query_norm"),
        Rule(key=_LAYER + "attention.key_layernorm.weight", leaf="layers.{layer}.attention.key_norm"),
        Rule(key=_LAYER + "post_attention_layernorm.weight", leaf="layers.{layer}.mlp_norm"),
        # the first layers
        Rule(key=_LAYER + "mlp.gate_proj.weight", leaf="layers.{layer}.mlp.gate"),
        Rule(key=_LAYER + "mlp.up_proj.weight", leaf="layers.{layer}.mlp.up"),
        Rule(key=_LAYER + "mlp.down_proj.weight", leaf="layers.{layer}.mlp.down"),
        # the others
        Rule(key=_LAYER + "mlp.gate.weight", leaf="layers.{layer}.moe.router"),
        Rule(key=_LAYER + "mlp.gate.expert_bias", leaf="layers.{layer}.moe.expert_bias"),
        Rule(key=_LAYER + "mlp.experts.{expert}.gate_proj.weight", leaf="layers.{layer}.moe.gate"),
        Rule(key=_LAYER + "mlp.experts.{expert}.up_proj.weight", leaf="layers.{layer}.moe.up"),
        Rule(key=_LAYER + "mlp.experts.{expert}.down_proj.weight", leaf="layers.{layer}.moe.down"),
        Rule(key=_LAYER + "mlp.shared_experts.gate_proj.weight", leaf="layers.{layer}.moe.shared.gate"),
        Rule(key=_LAYER + "mlp.shared_experts.up_proj.weight", leaf="layers.{layer}.moe.shared.up"),
        Rule(key=_LAYER + "mlp.shared_experts.down_proj.weight", leaf="layers.{layer}.moe.shared.down"),
    ),
    ignored=("model.rotary_emb.inv_freq", _LAYER + "attention.rotary_emb.inv_freq"),
)

FAMILY = Family(
    title="LLaDA2", config=Llada2MoeConfig, model_type="llada2_moe", names=_NAMES, fixed=_FIXED, read=_read,
    table=_TABLE)
"""LLaDA2.0 and 2.1."""
