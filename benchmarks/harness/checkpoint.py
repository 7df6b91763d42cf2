"""A seeded random checkpoint in LLaDA-MoE's layout, with weights that make a decoder's decisions vary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FULL_SIZE = {
    "vocab_size": 157184, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "expert_intermediate_size": 1024,
    "pad_token_id": 156892, "eos_token_id": 156892,
}
SMALL = {
    "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "num_experts": 16, "num_experts_per_tok": 4, "expert_intermediate_size": 256,
    "pad_token_id": 1, "eos_token_id": 1,
}
COMMON = {
    "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "hidden_act": "silu",
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 50000, "rope_scaling": None,
    "partial_rotary_factor": 1, "attention_bias": False, "clip_qkv": None, "norm_topk_prob": None,
    "qk_layernorm": True, "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False,
    "routed_scaling_factor": 1, "shared_expert_intermediate_size": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MASK_ID = 2
FIRST_TOKEN = 3
"""Ids below are special: padding, EOS and the mask."""
MID_SIZE: dict[str, Any] = SMALL
"""Hidden 512, 4 layers, 16 experts of which 4, vocabulary 8192."""
TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_experts": 4, "num_experts_per_tok": 2, "expert_intermediate_size": 16, "pad_token_id": 1, "eos_token_id": 1,
}
GAINS = {
    "embed_tokens": 1.0, "o_proj": 1.0, "down_proj": 2.0, "mlp.gate.": 2.0, "q_norm": 2.0, "k_norm": 2.0,
}
"""Standard deviation of a layer's outputs for inputs of one. Attention is sharp, so that positions differ."""
HEAD_GAIN = 12.0
"""Spread of the logits: with it a threshold of 0.8 or 0.9 commits a few positions per step."""


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Published keys and shapes, in the published order of layers."""
    model, ffn = config["hidden_size"], config["expert_intermediate_size"]
    width = model // config["num_attention_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], model)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (model,)
        yield prefix + "post_attention_layernorm.weight", (model,)
        for name in "qkvo":
            yield f"{prefix}self_attn.{name}_proj.weight", (model, model)
        for name in "qk":
            yield f"{prefix}self_attn.{name}_norm.weight", (width,)
        yield prefix + "mlp.gate.weight", (config["num_experts"], model)
        for expert in range(config["num_experts"]):
            yield f"{prefix}mlp.experts.{expert}.gate_proj.weight", (ffn, model)
            yield f"{prefix}mlp.experts.{expert}.up_proj.weight", (ffn, model)
            yield f"{prefix}mlp.experts.{expert}.down_proj.weight", (model, ffn)
    yield "model.norm.weight", (model,)
    yield "lm_head.weight", (config["vocab_size"], model)


def fields(shapes: dict[str, Any]) -> dict[str, Any]:
    """config.json for `shapes` in float32."""
    return COMMON | shapes | {
        "torch_dtype": "float32", "mask_token_id": MASK_ID, "moe_layer_freq": [1] * shapes["num_hidden_layers"]}


def tensors(shapes: dict[str, Any], *, seed: int) -> dict[str, np.ndarray]:
    """float32 weights under the published keys, drawn in the order of `tensor_shapes`."""
    generator, result = np.random.Generator(np.random.PCG64(seed)), {}
    for key, shape in tensor_shapes(shapes):
        gain = next((value for part, value in GAINS.items() if part in key), 1.0)
        if key == "lm_head.weight":
            gain = HEAD_GAIN
        if len(shape) == 1:
            result[key] = np.full(shape, gain, np.float32)
        else:
            scale = gain if "embed_tokens" in key else gain * shape[1] ** -0.5
            result[key] = np.float32(scale) * generator.standard_normal(shape, dtype=np.float32)
    return result


def write(directory: Path, shapes: dict[str, Any], *, seed: int) -> int:
    """Write config.json and model.safetensors into an existing directory; returns the number of parameters."""
    weights = tensors(shapes, seed=seed)
    (directory / "config.json").write_text(json.dumps(fields(shapes), indent=1) + "\n", encoding="utf-8")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return sum(weight.size for weight in weights.values())


def prompts(shapes: dict[str, Any], *, batch: int, length: int, seed: int) -> np.ndarray:
    """Random prompts [batch, length], int32, without special tokens."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.integers(FIRST_TOKEN, shapes["vocab_size"], (batch, length), dtype=np.int32)
