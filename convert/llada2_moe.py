"""LLaDA2's checkpoint keys: data only."""

from __future__ import annotations

from convert.mapping import Rule, Table

_LAYER = "model.layers.{layer}."
_QKV = _LAYER + "attention.query_key_value.weight"

TABLE = Table(
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
