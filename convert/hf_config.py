"""`config.json` of a Hugging Face directory to a model configuration.

Only what the architecture computes with is read. A field that would change the computation and is not
implemented is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import ConfigError, shorten
from convert.files import read_json
from djax.config import DTYPES, LLADA_MOE_MASK_ID, LladaMoeConfig, ModelConfig

CONFIG_NAME = "config.json"
_LARGEST = 2**31 - 1
_LARGEST_COUNTS = {"num_hidden_layers": 512, "num_experts": 4096}

_FIXED: Mapping[str, tuple[Any, ...]] = {
    "rope_scaling": (None,),
    "rope_parameters": (None,),
    "partial_rotary_factor": (None, 1),
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
"""Fields of LLaDA-MoE that may only have these values; None also stands for an absent field.
norm_topk_prob is not among them: the architecture never renormalises, whatever it says."""

_NAMES: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_size": "expert_intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_positions": "max_position_embeddings",
    "mask_id": "mask_token_id",
    "eos_id": "eos_token_id",
    "pad_id": "pad_token_id",
    "dtype": "torch_dtype",
}
"""djax's name of every field that is stored, and config.json's."""


class _Fields:
    """Typed reads of a JSON object, with errors that name the file and the field."""

    def __init__(self, fields: Mapping[str, Any], file: Path | None) -> None:
        self.fields, self.file = fields, file

    def wrong(self, name: str, allowed: str) -> ConfigError:
        got = shorten(self.fields[name]) if name in self.fields else "nothing"
        return ConfigError(f"got {got}; {allowed}", file=self.file, key=name)

    def integer(self, name: str, *, default: int | None = None, minimum: int = 1) -> int:
        value = self.fields.get(name)
        if value is None and default is not None:
            return default
        largest = _LARGEST_COUNTS.get(name, _LARGEST)
        if type(value) is not int or not minimum <= value <= largest:
            raise self.wrong(name, f"it must be an integer in [{minimum}, {largest}]")
        return value

    def positive(self, name: str) -> float:
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.wrong(name, "it must be a number above 0")
        return float(value)

    def token(self, name: str, *, vocab_size: int, default: int | None = None) -> int:
        value = self.fields.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 <= value < vocab_size:
            raise self.wrong(name, f"it must be one token id in [0, vocab_size={vocab_size})")
        return value

    def fixed(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = self.fields.get(name)
        # True == 1 in Python, but a flag is not a number.
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            listed = " or ".join("absent" if one is None else json.dumps(one) for one in allowed)
            raise self.wrong(name, f"only {listed} is supported")


def _dtype(fields: _Fields) -> str:
    name = "torch_dtype" if fields.fields.get("torch_dtype") is not None else "dtype"
    value = fields.fields.get(name)
    if value is None:
        return "bfloat16"
    if not isinstance(value, str) or value not in DTYPES:
        raise fields.wrong(name, f"it must be one of {', '.join(DTYPES)}")
    return value


def _mask_id(fields: _Fields, vocab_size: int) -> int | None:
    if fields.fields.get("mask_token_id") is not None:
        return fields.token("mask_token_id", vocab_size=vocab_size)
    return LLADA_MOE_MASK_ID if vocab_size > LLADA_MOE_MASK_ID else None


def _llada_moe(fields: _Fields) -> LladaMoeConfig:
    for name, allowed in _FIXED.items():
        fields.fixed(name, allowed)
    num_layers = fields.integer("num_hidden_layers")
    layer_freq = fields.fields.get("moe_layer_freq")
    if layer_freq is not None and layer_freq != 1 and layer_freq != [1] * num_layers:
        raise fields.wrong("moe_layer_freq", f"only 1 for each of the {num_layers} layers is supported")
    vocab_size, hidden_size = fields.integer("vocab_size"), fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    if fields.fields.get("head_dim") is None and hidden_size % num_heads:
        raise fields.wrong("num_attention_heads", f"it must divide hidden_size={hidden_size} where head_dim is absent")
    eos_id = fields.token("eos_token_id", vocab_size=vocab_size)
    try:
        return LladaMoeConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.integer("num_key_value_heads", default=num_heads),
            head_dim=fields.integer("head_dim", default=hidden_size // num_heads),
            num_experts=fields.integer("num_experts"),
            experts_per_token=fields.integer("num_experts_per_tok"),
            expert_size=fields.integer("expert_intermediate_size"),
            rms_norm_eps=fields.positive("rms_norm_eps"),
            rope_theta=fields.positive("rope_theta"),
            max_positions=fields.integer("max_position_embeddings"),
            mask_id=_mask_id(fields, vocab_size),
            eos_id=eos_id,
            pad_id=fields.token("pad_token_id", vocab_size=vocab_size, default=eos_id),
            dtype=_dtype(fields),
        )
    except ConfigError:
        raise
    except ValueError as error:
        # The configuration's own checks begin with its own name of the field.
        own, _, problem = str(error).partition(": ")
        raise ConfigError(problem, file=fields.file, key=_NAMES.get(own, own)) from None


def model_config(fields: Mapping[str, Any], *, file: Path | None = None) -> ModelConfig:
    """The configuration that the fields of a `config.json` describe.

    `mask_id` is the file's `mask_token_id`, else the architecture's own where the vocabulary is large
    enough to hold it, else None.

    Raises ConfigError, naming `file` and the field, for an architecture or a value that is not supported.
    """
    checked = _Fields(fields, file)
    model_type = fields.get("model_type")
    if model_type == "llada" and fields.get("num_experts") is not None:
        return _llada_moe(checked)
    raise checked.wrong("model_type", "supported is 'llada' with num_experts (LLaDA-MoE)")


def read_config(directory: Path) -> ModelConfig:
    """The configuration in a directory's `config.json`; raises as `model_config`, and SourceError if absent."""
    path = directory / CONFIG_NAME
    return model_config(read_json(path, error=ConfigError), file=path)


def hf_fields(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` fields from which `model_config` gives `config` back."""
    fields = {name: getattr(config, own) for own, name in _NAMES.items()}
    if config.mask_id is None:
        del fields["mask_token_id"]
    return {"model_type": "llada", **fields}
