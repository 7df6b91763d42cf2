"""Typed reads of a `config.json`, and what a family says of its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from convert.errors import ConfigError
from convert.mapping import Table
from djax.errors import ArgumentError, shown
from djax.models.config import DTYPES, ModelConfig

_LARGEST = 2**31 - 1
_LARGEST_COUNTS = {"num_hidden_layers": 512, "num_experts": 4096}

_COUNTS: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
}
COMMON_NAMES: Mapping[str, str] = {
    **_COUNTS,
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "mask_id": "mask_token_id",
    "eos_id": "eos_token_id",
    "pad_id": "pad_token_id",
    "dtype": "torch_dtype",
}
"""djax's name of every field that all families have, and config.json's."""


class Fields:
    """Typed reads of a JSON object, with errors that name the file and the field."""

    def __init__(self, fields: Mapping[str, Any], file: Path | None) -> None:
        self.fields, self.file = fields, file

    def wrong(self, name: str, allowed: str) -> ConfigError:
        """The error of a field, which says what it has to be."""
        got = shown(self.fields[name]) if name in self.fields else "nothing"
        return ConfigError(f"got {got}; {allowed}", file=self.file, key=name)

    def integer(self, name: str, *, default: int | None = None, minimum: int = 1) -> int:
        """A count, at least `minimum`; `default` where it is absent or null."""
        value = self.fields.get(name)
        if value is None and default is not None:
            return default
        largest = _LARGEST_COUNTS.get(name, _LARGEST)
        if type(value) is not int or not minimum <= value <= largest:
            raise self.wrong(name, f"it must be an integer in [{minimum}, {largest}]")
        return value

    def counts(self, names: Mapping[str, str]) -> dict[str, int]:
        """Fields that are counts, by djax's name; `names` has those of config.json."""
        return {own: self.integer(name) for own, name in names.items()}

    def positive(self, name: str) -> float:
        """A number above 0."""
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.wrong(name, "it must be a number above 0")
        return float(value)

    def token(self, name: str, *, vocab_size: int, default: int | None = None) -> int:
        """A token id, or a list of one."""
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
            inner = Fields(value, self.file)
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
        name, nested = "partial_rotary_factor", self.fields.get("rope_parameters")
        places = [self, *([Fields(nested, self.file)] if isinstance(nested, Mapping) else [])]
        found = [place.positive(name) for place in places if place.fields.get(name) is not None]
        if len(set(found)) > 1:
            raise self.wrong(name, f"it differs from that of rope_parameters, {found[-1]:g}")
        return found[0] if found else None

    def fixed(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a value that is not one of `allowed`; None also stands for an absent field."""
        value = self.fields.get(name)
        # True == 1 in Python, but a flag is not a number.
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            listed = " or ".join("absent" if one is None else json.dumps(one) for one in allowed)
            raise self.wrong(name, f"only {listed} is supported")

    def dtype(self) -> str:
        """`torch_dtype` or `dtype`; "auto" leaves it to the tensors, which go first anyway."""
        name = "torch_dtype" if self.fields.get("torch_dtype") is not None else "dtype"
        value = self.fields.get(name)
        if value is None or value == "auto":
            return "bfloat16"
        plain = value.removeprefix("torch.") if isinstance(value, str) else value
        if plain not in DTYPES:
            raise self.wrong(name, f"it must be one of {', '.join(DTYPES)}, with or without torch. before it, or auto")
        return plain

    def common(self, *, own_mask_id: int | None = None) -> dict[str, Any]:
        """Read what all families have but the tokens that end and pad, by djax's name.

        A file without a mask id means `own_mask_id`, if the vocabulary holds that, else none.
        """
        counts = self.counts(_COUNTS)
        vocab_size, hidden_size, num_heads = (counts[name] for name in ("vocab_size", "hidden_size", "num_heads"))
        if self.fields.get("head_dim") is None and hidden_size % num_heads:
            raise self.wrong(
                "num_attention_heads", f"it must divide hidden_size={hidden_size} where head_dim is absent")
        in_file = self.fields.get("mask_token_id") is not None
        own = own_mask_id if own_mask_id is not None and vocab_size > own_mask_id else None
        return {
            **counts,
            "num_kv_heads": self.integer("num_key_value_heads", default=num_heads),
            "head_dim": self.integer("head_dim", default=hidden_size // num_heads),
            "rms_norm_eps": self.positive("rms_norm_eps"),
            "rope_theta": self.rope_theta(),
            "mask_id": self.token("mask_token_id", vocab_size=vocab_size) if in_file else own,
            "dtype": self.dtype(),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How a model family's checkpoints are read and written."""

    title: str
    config: type[ModelConfig]
    model_type: str
    marker: str | None = None
    """A field that tells its config.json from those of others with this `model_type`."""
    names: Mapping[str, str]
    """djax's name of every field that is stored, and config.json's."""
    fixed: Mapping[str, tuple[Any, ...]]
    """Fields that may only have these values; None also stands for an absent field."""
    read: Callable[[Fields], dict[str, Any]]
    """config.json to the configuration's arguments."""
    table: Table

    def __str__(self) -> str:
        return f"{self.model_type!r}{'' if self.marker is None else f' with {self.marker}'} ({self.title})"

    def config_of(self, fields: Fields) -> ModelConfig:
        """The configuration; a field that would change the computation and is not implemented is refused."""
        for name, allowed in self.fixed.items():
            fields.fixed(name, allowed)
        try:
            return self.config(**self.read(fields))
        except ArgumentError as error:
            name = self.names.get(error.name, error.name)
            raise ConfigError(f"got {error.got}; allowed {error.allowed}", file=fields.file, key=name) from None
