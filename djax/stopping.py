"""Stop rules: which rows are finished, asked of rows that have just completed a block."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from djax import struct
from djax.types import StepInfo


@struct.dataclass
class Never:
    """Decodes every block."""

    def step(
        self, tokens: Int[Array, "B T"], is_open: Bool[Array, "B T"], is_masked: Bool[Array, "B T"], info: StepInfo
    ) -> Bool[Array, "B"]:
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

    eos_ids: Int[Array, "n"]

    def step(
        self, tokens: Int[Array, "B T"], is_open: Bool[Array, "B T"], is_masked: Bool[Array, "B T"], info: StepInfo
    ) -> Bool[Array, "B"]:
        """Rows that hold a committed EOS."""
        return (self.ends(tokens) & is_open & ~is_masked).any(-1)

    def ends(self, tokens: Int[Array, "B T"]) -> Bool[Array, "B T"]:
        """The EOS tokens."""
        return (tokens[..., None] == jnp.atleast_1d(jnp.asarray(self.eos_ids, jnp.int32))[None, None]).any(-1)

    def fill(self) -> Int[Array, ""] | None:
        """The first EOS id."""
        return jnp.atleast_1d(jnp.asarray(self.eos_ids, jnp.int32))[0]
