"""The model families: one file each, one line here."""

from __future__ import annotations

from djax.models.config import ModelConfig
from djax.models.families import llada2_moe, llada_moe
from djax.models.layers.trunk import Family

FAMILIES = [
    llada_moe.FAMILY,
    llada2_moe.FAMILY,
]
"""All of them; `family_of` and `published` look here at each call."""


def family_of(config: ModelConfig) -> Family:
    """The family that a configuration is of.

    Raises:
        ValueError: no model for this kind of configuration.
    """
    for family in FAMILIES:
        if family.config is type(config):
            return family
    raise ValueError(
        f"config: got a {type(config).__name__}; there are models for "
        f"{', '.join(family.config.__name__ for family in FAMILIES)}")


def published() -> dict[str, ModelConfig]:
    """Sizes of published models by name, to plan for one that has not been downloaded."""
    return {name: config for family in FAMILIES for name, config in family.published.items()}
