"""LLaDA-MoE's checkpoint keys: data only. Expert-wise as published, and dInfer's fused layout."""

from __future__ import annotations

from convert.mapping import Rule, Table

_LAYER = "model.layers.{layer}."

TABLE = Table(
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
