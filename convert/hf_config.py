"""`config.json` of a Hugging Face directory to a model configuration.

Only what the architecture computes with is read. A field that would change the computation and is not
implemented is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from convert.errors import ConfigError
from convert.files import read_json
from djax.errors import ArgumentError, shown
from djax.models.config import (
    DTYPES,
    LLADA2_BLOCK_LENGTH,
    LLADA2_MOE_MASK_ID,
    LLADA_MOE_MASK_ID,
    Llada2MoeConfig,
    LladaMoeConfig,
    ModelConfig,
)

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
_LARGEST = 2**31 - 1
_LARGEST_COUNTS = {"num_hidden_layers": 512, "num_experts": 4096}

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
"""Fields of LLaDA-MoE that may only have these values; None also stands for an absent field.
norm_topk_prob is not among them: the architecture never renormalises, whatever it says."""

_FIXED_LLADA2: Mapping[str, tuple[Any, ...]] = {
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
"""The same for LLaDA2. sliding_window is not among them: it says nothing while use_sliding_window is false."""

_COMMON_NAMES: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_positions": "max_position_embeddings",
    "mask_id": "mask_token_id",
    "eos_id": "eos_token_id",
    "pad_id": "pad_token_id",
    "dtype": "torch_dtype",
}
_NAMES: Mapping[type, Mapping[str, str]] = {
    LladaMoeConfig: {**_COMMON_NAMES, "expert_size": "expert_intermediate_size"},
    Llada2MoeConfig: {
        **_COMMON_NAMES,
        "num_dense_layers": "first_k_dense_replace",
        "dense_size": "intermediate_size",
        "rotary_dim": "rotary_dim",
        "expert_size": "moe_intermediate_size",
        "num_shared_experts": "num_shared_experts",
        "num_groups": "n_group",
        "groups_per_token": "topk_group",
        "routed_scaling_factor": "routed_scaling_factor",
        "block_length": "block_length",
    },
}
"""djax's name of every field that is stored, and config.json's. (block_length is in none that is published.)"""
_MODEL_TYPES: Mapping[type, str] = {LladaMoeConfig: "llada", Llada2MoeConfig: "llada2_moe"}


class _Fields:
    """Typed reads of a JSON object, with errors that name the file and the field."""

    def __init__(self, fields: Mapping[str, Any], file: Path | None) -> None:
        self.fields, self.file = fields, file

    def wrong(self, name: str, allowed: str) -> ConfigError:
        got = shown(self.fields[name]) if name in self.fields else "nothing"
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

    def eos(self, *, vocab_size: int, default: int | None = None) -> dict[str, Any]:
        """`eos_token_id`, one id or a list, as the configuration's fields: the first one also fills."""
        value = self.fields.get("eos_token_id")
        if not isinstance(value, list):
            return {"eos_id": self.token("eos_token_id", vocab_size=vocab_size, default=default)}
        if not value or any(type(one) is not int or not 0 <= one < vocab_size for one in value):
            raise self.wrong("eos_token_id", f"it must be a token id in [0, vocab_size={vocab_size}), or some of them")
        return {"eos_id": value[0], "other_eos_ids": tuple(dict.fromkeys(one for one in value[1:] if one != value[0]))}

    def rope_theta(self) -> float:
        """The base of the rotary angles, of `rope_theta` or of `rope_parameters`, as transformers 5 writes it.

        Angles of another kind than the default are refused.
        """
        found = [self.positive("rope_theta")] if self.fields.get("rope_theta") is not None else []
        for name in ("rope_scaling", "rope_parameters"):
            value = self.fields.get(name)
            if value is None:
                continue
            if not isinstance(value, Mapping):
                raise self.wrong(name, "it must be an object or absent")
            inner = _Fields(value, self.file)
            kinds = [value[key] for key in ("rope_type", "type") if key in value]
            if any(kind != "default" for kind in kinds) or not kinds:
                raise self.wrong(name, 'only rope_type "default" is supported')
            known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
            if set(value) - known:
                raise self.wrong(name, f"only {', '.join(sorted(known))} are known in it")
            if "rope_theta" in value:
                found.append(inner.positive("rope_theta"))
        if not found:
            raise self.wrong("rope_theta", "it must be a number above 0")
        if len(set(found)) > 1:
            raise self.wrong("rope_theta", f"it differs from that of rope_parameters, {found[-1]:g}")
        return found[0]

    def rotary_share(self) -> float | None:
        """`partial_rotary_factor`, from wherever it stands."""
        nested = self.fields.get("rope_parameters")
        inside = nested.get("partial_rotary_factor") if isinstance(nested, Mapping) else None
        own = self.fields.get("partial_rotary_factor")
        if own is not None and inside is not None and own != inside:
            raise self.wrong("partial_rotary_factor", f"it differs from that of rope_parameters, {inside}")
        if own is not None:
            return self.positive("partial_rotary_factor")
        if inside is None or not isinstance(nested, Mapping):
            return None
        return _Fields(nested, self.file).positive("partial_rotary_factor")

    def fixed(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = self.fields.get(name)
        # True == 1 in Python, but a flag is not a number.
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            listed = " or ".join("absent" if one is None else json.dumps(one) for one in allowed)
            raise self.wrong(name, f"only {listed} is supported")


def _dtype(fields: _Fields) -> str:
    name = "torch_dtype" if fields.fields.get("torch_dtype") is not None else "dtype"
    value = fields.fields.get(name)
    if value is None or value == "auto":  # the tensors say
        return "bfloat16"
    plain = value.removeprefix("torch.") if isinstance(value, str) else value
    if plain not in DTYPES:
        raise fields.wrong(name, f"it must be one of {', '.join(DTYPES)}, with or without torch. before it, or auto")
    return plain


def _common(fields: _Fields, *, own_mask_id: int) -> dict[str, Any]:
    """What both architectures have, by djax's name. A file without a mask id means `own_mask_id`, if the vocabulary
    holds that, else none."""
    vocab_size, hidden_size = fields.integer("vocab_size"), fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    if fields.fields.get("head_dim") is None and hidden_size % num_heads:
        raise fields.wrong("num_attention_heads", f"it must divide hidden_size={hidden_size} where head_dim is absent")
    in_file = fields.fields.get("mask_token_id") is not None
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": fields.integer("num_key_value_heads", default=num_heads),
        "head_dim": fields.integer("head_dim", default=hidden_size // num_heads),
        "num_experts": fields.integer("num_experts"),
        "experts_per_token": fields.integer("num_experts_per_tok"),
        "rms_norm_eps": fields.positive("rms_norm_eps"),
        "rope_theta": fields.rope_theta(),
        "max_positions": fields.integer("max_position_embeddings"),
        "mask_id": (fields.token("mask_token_id", vocab_size=vocab_size) if in_file
                    else own_mask_id if vocab_size > own_mask_id else None),
        "dtype": _dtype(fields),
    }


def _llada_moe(fields: _Fields) -> LladaMoeConfig:
    for name, allowed in _FIXED.items():
        fields.fixed(name, allowed)
    common = _common(fields, own_mask_id=LLADA_MOE_MASK_ID)
    if fields.rotary_share() not in (None, 1):
        raise fields.wrong("partial_rotary_factor", "only 1 or absent is supported")
    layer_freq = fields.fields.get("moe_layer_freq")
    if layer_freq is not None and layer_freq != 1 and layer_freq != [1] * common["num_layers"]:
        raise fields.wrong("moe_layer_freq", f"only 1 for each of the {common['num_layers']} layers is supported")
    eos = fields.eos(vocab_size=common["vocab_size"])
    return _made(fields, LladaMoeConfig, {
        **common,
        **eos,
        "expert_size": fields.integer("expert_intermediate_size"),
        "pad_id": fields.token("pad_token_id", vocab_size=common["vocab_size"], default=eos["eos_id"]),
    })


def _llada2_moe(fields: _Fields) -> Llada2MoeConfig:
    for name, allowed in _FIXED_LLADA2.items():
        fields.fixed(name, allowed)
    common = _common(fields, own_mask_id=LLADA2_MOE_MASK_ID)
    # the published files have no eos_token_id: their pad token ends a sequence
    pad_id = fields.token("pad_token_id", vocab_size=common["vocab_size"])
    return _made(fields, Llada2MoeConfig, {
        **common,
        "num_dense_layers": fields.integer("first_k_dense_replace", minimum=0),
        "dense_size": fields.integer("intermediate_size"),
        "rotary_dim": _rotary_dim(fields, common["head_dim"]),
        "expert_size": _expert_size(fields),
        "num_shared_experts": fields.integer("num_shared_experts"),
        "num_groups": fields.integer("n_group"),
        "groups_per_token": fields.integer("topk_group"),
        "routed_scaling_factor": fields.positive("routed_scaling_factor"),
        "block_length": fields.integer("block_length", default=LLADA2_BLOCK_LENGTH),
        **fields.eos(vocab_size=common["vocab_size"], default=pad_id),
        "pad_id": pad_id,
    })


def _rotary_dim(fields: _Fields, head_dim: int) -> int:
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


def _expert_size(fields: _Fields) -> int:
    """`moe_intermediate_size`; a shared expert of another width is refused."""
    width = fields.integer("moe_intermediate_size")
    fields.fixed("moe_shared_expert_intermediate_size", (None, width))
    return width


_Config = TypeVar("_Config", LladaMoeConfig, Llada2MoeConfig)


def _made(fields: _Fields, kind: type[_Config], values: Mapping[str, Any]) -> _Config:
    try:
        return kind(**values)
    except ArgumentError as error:
        name = _NAMES[kind].get(error.name, error.name)
        raise ConfigError(f"got {error.got}; allowed {error.allowed}", file=fields.file, key=name) from None


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
    if model_type == "llada2_moe":
        return _llada2_moe(checked)
    raise checked.wrong("model_type", "supported are 'llada' with num_experts (LLaDA-MoE) and 'llada2_moe' (LLaDA2)")


def read_config(directory: Path) -> ModelConfig:
    """The configuration in a directory's `config.json`; raises as `model_config`, and SourceError if absent.

    Tokens that end a sequence are also those of `generation_config.json`, where that is there: chat models list the
    end of a turn there alone.
    """
    path, generation = directory / CONFIG_NAME, directory / GENERATION_NAME
    fields = read_json(path, error=ConfigError)
    if generation.is_file():
        further = read_json(generation, error=ConfigError).get("eos_token_id")
        listed = [one if isinstance(one, list) else [one] for one in (fields.get("eos_token_id"), further)
                  if one is not None]
        if further is not None:
            fields = {**fields, "eos_token_id": [token for tokens in listed for token in tokens]}
    return model_config(fields, file=path)


def hf_fields(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` fields from which `model_config` gives `config` back."""
    fields = {name: getattr(config, own) for own, name in _NAMES[type(config)].items()}
    if config.mask_id is None:
        del fields["mask_token_id"]
    if config.other_eos_ids:
        fields["eos_token_id"] = [config.eos_id, *config.other_eos_ids]
    return {"model_type": _MODEL_TYPES[type(config)], **fields}
