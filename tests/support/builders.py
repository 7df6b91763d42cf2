"""Tiny LLaDA-MoE checkpoints in every layout, and broken safetensors files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

VOCAB, MODEL, LAYERS, HEADS, KV_HEADS, WIDTH, EXPERTS, FFN = 24, 16, 2, 4, 2, 4, 4, 8
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

CONFIG: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "vocab_size": VOCAB, "hidden_size": MODEL,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "num_experts": EXPERTS, "num_experts_per_tok": 2, "expert_intermediate_size": FFN,
    "shared_expert_intermediate_size": None, "hidden_act": "silu", "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 50000, "rope_scaling": None, "partial_rotary_factor": 1,
    "attention_bias": False, "clip_qkv": None, "norm_topk_prob": None, "qk_layernorm": True,
    "moe_layer_freq": [1] * LAYERS, "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False,
    "routed_scaling_factor": 1, "tie_word_embeddings": False, "pad_token_id": 20, "eos_token_id": 20,
    "torch_dtype": "float32",
}

LAYER_SHAPES: dict[str, tuple[int, ...]] = {
    "input_layernorm.weight": (MODEL,),
    "post_attention_layernorm.weight": (MODEL,),
    "self_attn.q_proj.weight": (HEADS * WIDTH, MODEL),
    "self_attn.k_proj.weight": (KV_HEADS * WIDTH, MODEL),
    "self_attn.v_proj.weight": (KV_HEADS * WIDTH, MODEL),
    "self_attn.o_proj.weight": (MODEL, HEADS * WIDTH),
    "self_attn.q_norm.weight": (WIDTH,),
    "self_attn.k_norm.weight": (WIDTH,),
    "mlp.gate.weight": (EXPERTS, MODEL),
    **{f"mlp.experts.{e}.{name}_proj.weight": shape for e in range(EXPERTS) for name, shape in (
        ("gate", (FFN, MODEL)), ("up", (FFN, MODEL)), ("down", (MODEL, FFN)))},
}


def tensors(seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The published keys with random values."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (VOCAB, MODEL), "model.norm.weight": (MODEL,),
              "lm_head.weight": (VOCAB, MODEL)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{key}": shape for key, shape in LAYER_SHAPES.items()}
    return {key: rng.standard_normal(shape).astype(DTYPES[dtype]) for key, shape in shapes.items()}


def fused(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """dInfer's layout of the same weights: w1 is gate rows, then up rows; w2 is down."""
    result = {key: value for key, value in stored.items() if ".experts." not in key}
    for layer in range(LAYERS):
        def expert(index: int, name: str, layer: int = layer) -> np.ndarray:
            return stored[f"model.layers.{layer}.mlp.experts.{index}.{name}_proj.weight"]

        result[f"model.layers.{layer}.mlp.w1"] = np.stack(
            [np.concatenate([expert(e, "gate"), expert(e, "up")]) for e in range(EXPERTS)])
        result[f"model.layers.{layer}.mlp.w2"] = np.stack([expert(e, "down") for e in range(EXPERTS)])
    return result


def parameters(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What djax's parameters must be, by name, written down from the published layout."""
    result = {"embed": stored["model.embed_tokens.weight"], "norm": stored["model.norm.weight"],
              "head": stored["lm_head.weight"]}
    for layer in range(LAYERS):
        def get(key: str, layer: int = layer) -> np.ndarray:
            return stored[f"model.layers.{layer}.{key}.weight"]

        result |= {f"layers.{layer}.{name}": value for name, value in {
            "attention_norm": get("input_layernorm"),
            "attention.query": get("self_attn.q_proj").reshape(HEADS, WIDTH, MODEL),
            "attention.key": get("self_attn.k_proj").reshape(KV_HEADS, WIDTH, MODEL),
            "attention.value": get("self_attn.v_proj").reshape(KV_HEADS, WIDTH, MODEL),
            "attention.output": get("self_attn.o_proj").reshape(MODEL, HEADS, WIDTH),
            "attention.query_norm": get("self_attn.q_norm"),
            "attention.key_norm": get("self_attn.k_norm"),
            "moe_norm": get("post_attention_layernorm"),
            "moe.router": get("mlp.gate"),
            **{f"moe.{name}": np.stack([get(f"mlp.experts.{e}.{name}_proj") for e in range(EXPERTS)])
               for name in ("gate", "up", "down")},
        }.items()}
    return result


def write(
    directory: Path, stored: Mapping[str, np.ndarray], *, shards: int = 1, config: Mapping[str, Any] = CONFIG
) -> Path:
    """A checkpoint directory with one file, or with several and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(stored), directory / "model.safetensors")
        return directory
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: value for index, (key, value) in enumerate(stored.items()) if index % shards == shard}
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map: Mapping[str, Any]) -> None:
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def raw_file(header: bytes | Mapping[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file from its parts, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def tree_equal(params: Any, expected: Mapping[str, np.ndarray], names: Iterable[str] | None = None) -> None:
    """Parameters (a state or a dict by name) equal the arrays, bit for bit."""
    from djax.devices.sharding import named_leaves

    leaves = named_leaves(params)
    assert set(leaves) == set(expected)
    for name in names or expected:
        found = np.asarray(leaves[name])
        assert found.shape == expected[name].shape, name
        assert found.dtype == expected[name].dtype, name
        assert found.tobytes() == np.ascontiguousarray(expected[name]).tobytes(), name
