"""`config.json` of a Hugging Face directory to a model configuration, and back.

Only what the architecture computes with is read. A field that would change the computation and is not
implemented is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import ConfigError
from convert.families import FAMILIES
from convert.fields import Family, Fields
from convert.files import read_json
from djax.models.config import ModelConfig

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"


def model_config(fields: Mapping[str, Any], *, file: Path | None = None) -> ModelConfig:
    """The configuration that the fields of a `config.json` describe.

    `mask_id` is the file's `mask_token_id`, else the architecture's own where the vocabulary is large
    enough to hold it, else None.

    Raises ConfigError, naming `file` and the field, for an architecture or a value that is not supported.
    """
    checked = Fields(fields, file)
    for family in FAMILIES:
        if fields.get("model_type") == family.model_type and (
                family.marker is None or fields.get(family.marker) is not None):
            return family.config_of(checked)
    raise checked.wrong("model_type", f"supported are {' and '.join(map(str, FAMILIES))}")


def family_of(config: ModelConfig, *, file: Path | None = None) -> Family:
    """How a configuration's checkpoints are read and written. Raises ConfigError, naming `file`, if nobody knows."""
    for family in FAMILIES:
        if family.config is type(config):
            return family
    raise ConfigError(f"there is no conversion table for a {type(config).__name__}", file=file)


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
    family = family_of(config)
    fields = {name: getattr(config, own) for own, name in family.names.items()}
    if config.mask_id is None:
        del fields["mask_token_id"]
    if config.other_eos_ids:
        fields["eos_token_id"] = [config.eos_id, *config.other_eos_ids]
    return {"model_type": family.model_type, **fields}
