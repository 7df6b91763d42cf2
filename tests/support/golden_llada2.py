"""The tiny LLaDA2 checkpoint of tests/goldens/llada2, read without the converter under test elsewhere."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from djax.models.config import Llada2MoeConfig

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "llada2"

CONFIG = Llada2MoeConfig(
    vocab_size=160, hidden_size=64, num_layers=3, num_dense_layers=1, dense_size=96, num_heads=4, num_kv_heads=2,
    head_dim=16, rotary_dim=8, num_experts=8, experts_per_token=2, expert_size=32, num_shared_experts=1, num_groups=4,
    groups_per_token=2, routed_scaling_factor=2.5, rms_norm_eps=1e-6, rope_theta=600000.0, max_positions=32768,
    mask_id=155, eos_id=152, pad_id=152, block_length=8, dtype="float32")


@functools.cache
def checkpoint() -> dict[str, np.ndarray]:
    return load_file(GOLDENS / "model.safetensors")


def parameters(dtype: str = "float32") -> dict[str, Any]:
    """The checkpoint as the model's nested dict."""
    stored = checkpoint()

    def layer(index: int) -> dict[str, Any]:
        get = lambda name: stored[f"model.layers.{index}.{name}.weight"]  # noqa: E731
        swiglu = lambda name: {part: get(f"{name}.{part}_proj") for part in ("gate", "up", "down")}  # noqa: E731
        query, key, value = np.split(get("attention.query_key_value"), [64, 96])
        made = {
            "attention_norm": get("input_layernorm"), "mlp_norm": get("post_attention_layernorm"),
            "attention": {
                "query": query.reshape(4, 16, 64), "key": key.reshape(2, 16, 64), "value": value.reshape(2, 16, 64),
                "output": get("attention.dense").reshape(64, 4, 16),
                "query_norm": get("attention.query_layernorm"), "key_norm": get("attention.key_layernorm")},
        }
        if index == 0:
            return made | {"mlp": swiglu("mlp")}
        experts = {part: np.stack([get(f"mlp.experts.{e}.{part}_proj") for e in range(8)])
                   for part in ("gate", "up", "down")}
        bias = stored[f"model.layers.{index}.mlp.gate.expert_bias"]
        return made | {"moe": experts | {
            "router": get("mlp.gate"), "expert_bias": bias, "shared": swiglu("mlp.shared_experts")}}

    tree = {
        "embed": stored["model.word_embeddings.weight"], "norm": stored["model.norm.weight"],
        "head": stored["lm_head.weight"], "layers": {index: layer(index) for index in range(3)}}
    cast = lambda path, leaf: jnp.asarray(  # noqa: E731
        leaf, "float32" if "expert_bias" in jax.tree_util.keystr(path) else dtype)
    return jax.tree_util.tree_map_with_path(cast, tree)
