"""One of several parts, chosen by a leaf: one compiled program then serves all of them.

Compiling is most of what these tests cost. The parts' own code is what runs: `lax.switch` calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from djax.contracts import answers, struct
from djax.contracts.types import FORBID_NOTHING, Forbidden


def _switch(index: Any, calls: list[Callable[[], Any]]) -> Any:
    """The result of the call with this index; all results have one structure."""
    return lax.switch(index, calls)


def _put(states: tuple[Any, ...], index: int, state: Any) -> tuple[Any, ...]:
    return (*states[:index], state, *states[index + 1:])


@struct.dataclass
class SelectTransform:
    """One of several transforms. It needs logits where any of them does."""

    index: Any
    parts: tuple[Any, ...]

    @property
    def needs_logits(self) -> bool:
        return any(getattr(part, "needs_logits", True) for part in self.parts)

    def init(self, *shape: int) -> Any:
        return tuple(part.init(*shape) for part in self.parts)

    def step(self, logits: Any, is_masked: Any, state: Any) -> Any:
        def call(i: int) -> Any:
            changed, new = self.parts[i].step(logits, is_masked, state[i])
            return changed, _put(state, i, new)

        return _switch(self.index, [lambda i=i: call(i) for i in range(len(self.parts))])  # type: ignore[misc]

    def forbidden(self) -> Forbidden:
        each = [answers.forbidden(part) for part in self.parts]
        if all(forbidden is FORBID_NOTHING for forbidden in each):
            return FORBID_NOTHING
        width = max(forbidden.ids.shape[0] for forbidden in each)
        # an id that is negative is none
        ids = [jnp.pad(jnp.asarray(one.ids), (0, width - one.ids.shape[0]), constant_values=-1) for one in each]
        limits = jnp.stack([jnp.asarray(one.limit, jnp.int32) for one in each])
        return Forbidden(ids=jnp.stack(ids)[self.index], limit=limits[self.index])

    def wanted_ids(self, state: Any) -> Any:
        each = [answers.wanted_ids(part, own) for part, own in zip(self.parts, state, strict=True)]
        asked = [ids for ids in each if ids is not None]
        if not asked:
            return None
        width = max(ids.shape[-1] for ids in asked)
        blank = jnp.full((*asked[0].shape[:2], width), -1, jnp.int32)
        padded = [blank if ids is None else blank.at[..., :ids.shape[-1]].set(ids) for ids in each]
        return jnp.stack(padded)[self.index]

    def step_reading(self, reading: Any, is_masked: Any, state: Any) -> Any:
        def call(i: int) -> Any:
            changed, new = self.parts[i].step_reading(reading, is_masked, state[i])
            return changed, _put(state, i, new)

        return _switch(self.index, [lambda i=i: call(i) for i in range(len(self.parts))])  # type: ignore[misc]


@struct.dataclass
class SelectStrategy:
    """One of several strategies, each with its own bound on the steps."""

    index: Any
    parts: tuple[Any, ...]

    @property
    def reopens(self) -> bool:
        return any(part.reopens for part in self.parts)

    def max_steps(self, block_length: int) -> Any:
        return jnp.asarray([part.max_steps(block_length) for part in self.parts])[self.index]

    def init(self, *shape: int) -> Any:
        return tuple(part.init(*shape) for part in self.parts)

    def step(self, keys: Any, candidates: Any, is_masked: Any, info: Any, state: Any) -> Any:
        def call(i: int) -> Any:
            decision, new = self.parts[i].step(keys, candidates, is_masked, info, state[i])
            return decision, _put(state, i, new)

        return _switch(self.index, [lambda i=i: call(i) for i in range(len(self.parts))])  # type: ignore[misc]


@struct.dataclass
class SelectPropose:
    """One of several proposals, on logits."""

    index: Any
    parts: tuple[Any, ...]

    def step(self, keys: Any, logits: jax.Array, tokens: Any) -> Any:
        return _switch(
            self.index, [lambda i=i: self.parts[i].step(keys, logits, tokens)  # type: ignore[misc]
                         for i in range(len(self.parts))])
