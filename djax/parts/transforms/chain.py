"""Several transforms as one."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from djax.contracts import answers, struct
from djax.contracts.types import FORBID_NOTHING, Forbidden, Logits, PartState, Reading, Transform


@struct.dataclass
class Chain:
    """Several transforms, first to last."""

    transforms: tuple[Transform, ...]

    @property
    def needs_logits(self) -> bool:
        """Whether any does, or one forbids tokens after another has changed logits: the head forbids first."""
        changed = False
        for part in self.transforms:
            if answers.needs_logits(part) or (changed and answers.forbids(part)):
                return True
            changed |= bool(answers.distribution_changes(part))
        return False

    @property
    def forbids(self) -> bool:
        """Whether any does."""
        return any(answers.forbids(part) for part in self.transforms)

    @property
    def distribution_changes(self) -> tuple[Any, ...]:
        """The changes of all, in their order."""
        return tuple(change for part in self.transforms for change in answers.distribution_changes(part))

    def init(self, batch: int, block_length: int) -> PartState:
        """The transforms' states."""
        return tuple(part.init(batch, block_length) for part in self.transforms)

    def step(self, logits: Logits, is_masked: Bool[Array, "B L"], state: PartState) -> tuple[Logits, PartState]:
        """Each transform applied to what the one before it gave."""
        states = []
        for part, part_state in zip(self.transforms, state, strict=True):
            logits, part_state = part.step(logits, is_masked, part_state)
            states.append(part_state)
        return logits, tuple(states)

    def forbidden(self) -> Forbidden:
        """The tokens that any of them drops."""
        forbids = [answers.forbidden(part) for part in self.transforms]
        each = [forbidden for forbidden in forbids if forbidden is not FORBID_NOTHING] or [FORBID_NOTHING]
        limit = FORBID_NOTHING.limit
        for forbidden in each:
            limit = jnp.minimum(limit, forbidden.limit)
        return Forbidden(ids=jnp.concatenate([forbidden.ids for forbidden in each]), limit=limit)

    def wanted_ids(self, state: PartState) -> Int[Array, "B L S"] | None:
        """The tokens that any of them asks for."""
        each = [answers.wanted_ids(part, own) for part, own in zip(self.transforms, state, strict=True)]
        asked = [ids for ids in each if ids is not None]
        return jnp.concatenate(asked, axis=-1) if asked else None

    def step_reading(
        self, reading: Reading, is_masked: Bool[Array, "B L"], state: PartState
    ) -> tuple[Reading, PartState]:
        """Each transform applied to what the one before it gave."""
        states = []
        for part, part_state in zip(self.transforms, state, strict=True):
            reading, part_state = part.step_reading(reading, is_masked, part_state)  # type: ignore[attr-defined]
            states.append(part_state)
        return reading, tuple(states)
