"""Stop rules: which rows are finished, asked of rows that have just completed a block."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from djax.contracts import struct
from djax.contracts.types import StepInfo, StopRule
from djax.errors import check_integer

__all__ = ["AnyOf", "Never", "OnEos"]


@struct.dataclass
class Never:
    """Decodes every block."""

    reasons: ClassVar[tuple[str, ...]] = ()

    def step(
        self, tokens: Int[Array, "B T"], is_open: Bool[Array, "B T"], is_masked: Bool[Array, "B T"], info: StepInfo
    ) -> Bool[Array, " B"]:
        """False for every row."""
        return jnp.zeros(tokens.shape[0], bool)

    def ends(self, tokens: Int[Array, "B T"]) -> Bool[Array, "B T"]:
        """No token ends a sequence."""
        return jnp.zeros(tokens.shape, bool)

    def fill(self) -> Int[Array, ""] | None:
        """Nothing to fill."""
        return None


@struct.dataclass
class OnEos:
    """Stops a row when a completed block holds one of `eos_ids`, and fills the rest with the first of them.

    Only generated tokens count: an EOS in the prompt stops nothing.
    """

    eos_ids: Int[Array, " n"] | Int[np.ndarray, " n"]
    reasons: ClassVar[tuple[str, ...]] = ("eos",)

    def __post_init__(self) -> None:
        check_integer("eos_ids", self.eos_ids)

    def step(
        self, tokens: Int[Array, "B T"], is_open: Bool[Array, "B T"], is_masked: Bool[Array, "B T"], info: StepInfo
    ) -> Bool[Array, " B"]:
        """Rows that hold a committed EOS."""
        return (self.ends(tokens) & is_open & ~is_masked).any(-1)

    def ends(self, tokens: Int[Array, "B T"]) -> Bool[Array, "B T"]:
        """The EOS tokens."""
        return (tokens[..., None] == jnp.atleast_1d(jnp.asarray(self.eos_ids, jnp.int32))[None, None]).any(-1)

    def fill(self) -> Int[Array, ""] | None:
        """The first EOS id."""
        return jnp.atleast_1d(jnp.asarray(self.eos_ids, jnp.int32))[0]


@struct.dataclass
class AnyOf:
    """Several rules: a row stops with the first of them that says so, for that one's reason."""

    rules: tuple[StopRule, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every rule's reasons, one after the other's."""
        return tuple(reason for rule in self.rules for reason in rule.reasons)

    def step(
        self, tokens: Int[Array, "B T"], is_open: Bool[Array, "B T"], is_masked: Bool[Array, "B T"], info: StepInfo
    ) -> Int[Array, " B"]:
        """Number of the reason, from 1; 0 for rows that go on."""
        why, before = jnp.zeros(tokens.shape[0], jnp.int32), 0
        for rule in self.rules:
            own = jnp.asarray(rule.step(tokens, is_open, is_masked, info), jnp.int32)
            why = jnp.where((why == 0) & (own > 0), own + before, why)
            before += len(rule.reasons)
        return why

    def ends(self, tokens: Int[Array, "B T"]) -> Bool[Array, "B T"]:
        """Tokens that end a sequence for any of the rules."""
        found = jnp.zeros(tokens.shape, bool)
        for rule in self.rules:
            found |= rule.ends(tokens)
        return found

    def fill(self) -> Int[Array, " reasons"] | None:
        """Each rule's token for its own reasons; -1 for those of a rule without one."""
        tokens = [jnp.broadcast_to(jnp.asarray(-1 if rule.fill() is None else rule.fill(), jnp.int32),
                                   len(rule.reasons)) for rule in self.rules]
        return jnp.concatenate(tokens) if self.reasons else None
