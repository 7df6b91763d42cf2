"""The tiny LLaDA-MoE checkpoint of tests/goldens/llada_moe, read without the converter under test elsewhere."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from djax.models.config import LladaMoeConfig

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "llada_moe"

CONFIG = LladaMoeConfig(
    vocab_size=160, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16, num_experts=8,
    experts_per_token=2, expert_size=32, rms_norm_eps=1e-5, rope_theta=50000.0, max_positions=8192, mask_id=155,
    eos_id=152, pad_id=152, dtype="float32")


@functools.cache
def checkpoint() -> dict[str, np.ndarray]:
    return load_file(GOLDENS / "model.safetensors")


@functools.cache
def prompts() -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, json.loads((GOLDENS / "prompts.json").read_text())))


@functools.cache
def logits() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "logits.npz") as stored:
        return dict(stored)


def parameters(dtype: str = "float32") -> dict[str, Any]:
    """The checkpoint as the model's nested dict."""
    stored = checkpoint()

    def layer(index: int) -> dict[str, Any]:
        get = lambda name: stored[f"model.layers.{index}.{name}.weight"]  # noqa: E731
        experts = lambda name: np.stack([  # noqa: E731
            get(f"mlp.experts.{e}.{name}_proj") for e in range(CONFIG.num_experts)])
        return {
            "attention_norm": get("input_layernorm"),
            "attention": {
                "query": get("self_attn.q_proj").reshape(4, 16, 64),
                "key": get("self_attn.k_proj").reshape(4, 16, 64),
                "value": get("self_attn.v_proj").reshape(4, 16, 64),
                "output": get("self_attn.o_proj").reshape(64, 4, 16),
                "query_norm": get("self_attn.q_norm"),
                "key_norm": get("self_attn.k_norm"),
            },
            "moe_norm": get("post_attention_layernorm"),
            "moe": {
                "router": get("mlp.gate"), "gate": experts("gate"), "up": experts("up"), "down": experts("down")},
        }

    tree = {
        "embed": stored["model.embed_tokens.weight"],
        "layers": {index: layer(index) for index in range(CONFIG.num_layers)},
        "norm": stored["model.norm.weight"],
        "head": stored["lm_head.weight"],
    }
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), tree)
