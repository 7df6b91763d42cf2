"""No change, and forbidden tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from djax.contracts import struct
from djax.contracts.types import FORBID_NOTHING, Forbidden, Logits, PartState, Reading
from djax.errors import check_integer


@struct.dataclass
class Identity:
    """Leaves the logits as they are."""

    needs_logits: ClassVar[bool] = False
    distribution_changes: ClassVar[tuple[Any, ...]] = ()

    def init(self, batch: int, block_length: int) -> PartState:
        """Start without a state."""
        return ()

    def step(self, logits: Logits, is_masked: Bool[Array, "B L"], state: PartState) -> tuple[Logits, PartState]:
        """Return the same logits."""
        return logits, state

    def step_reading(
        self, reading: Reading, is_masked: Bool[Array, "B L"], state: PartState
    ) -> tuple[Reading, PartState]:
        """Return the same reading."""
        return reading, state


@struct.dataclass
class ForbidTokens:
    """Drops `token_ids` (negative ones are none), and every id from `vocab_limit` on (a padded vocabulary's rest)."""

    token_ids: Int[Array, " n"] | Int[np.ndarray, " n"]
    vocab_limit: int | Int[Array, ""] | None = None

    needs_logits: ClassVar[bool] = False
    distribution_changes: ClassVar[tuple[Any, ...]] = ()  # what is left is drawn from its softmax

    def __post_init__(self) -> None:
        check_integer("token_ids", self.token_ids, -(2**31))
        check_integer("vocab_limit", self.vocab_limit, 1, optional=True)

    def init(self, batch: int, block_length: int) -> PartState:
        """Start without a state."""
        return ()

    def step(self, logits: Logits, is_masked: Bool[Array, "B L"], state: PartState) -> tuple[Logits, PartState]:
        """Logits with -inf on the forbidden ids."""
        ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
        # A comparison fuses with its neighbours where a scatter would write the logits once more.
        forbidden = (ids[:, None] == jnp.atleast_1d(jnp.asarray(self.token_ids, jnp.int32))[None]).any(-1)
        if self.vocab_limit is not None:
            forbidden |= ids >= self.vocab_limit
        return jnp.where(forbidden, -jnp.inf, logits), state

    def forbidden(self) -> Forbidden:
        """Its tokens, which the head then leaves out."""
        limit = FORBID_NOTHING.limit if self.vocab_limit is None else self.vocab_limit
        return Forbidden(ids=jnp.atleast_1d(jnp.asarray(self.token_ids, jnp.int32)),
                         limit=jnp.asarray(limit, jnp.int32))

    def step_reading(
        self, reading: Reading, is_masked: Bool[Array, "B L"], state: PartState
    ) -> tuple[Reading, PartState]:
        """Return the same reading: the tokens are not in it."""
        return reading, state
