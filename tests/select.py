"""Parts that hold several others and choose one by a leaf, so that one compiled program serves them all."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from djax import struct


def _chosen(index: Any, values: tuple[Any, ...]) -> Any:
    """One of several trees of equal shapes."""
    return jax.tree.map(lambda *leaves: jax.lax.select_n(index, *map(jnp.asarray, leaves)), *values)


@struct.dataclass
class SelectStrategy:
    """One of several strategies; all are asked, which costs nothing beside a forward."""

    index: Any
    parts: tuple[Any, ...]

    @property
    def reopens(self) -> bool:
        return any(part.reopens for part in self.parts)

    def max_steps(self, block_length: int) -> int:
        return max(part.max_steps(block_length) for part in self.parts)

    def init(self, batch: int, block_length: int) -> Any:
        return tuple(part.init(batch, block_length) for part in self.parts)

    def step(self, keys: Any, candidates: Any, is_masked: Any, info: Any, state: Any) -> Any:
        given = [part.step(keys, candidates, is_masked, info, own)
                 for part, own in zip(self.parts, state, strict=True)]
        return _chosen(self.index, tuple(decision for decision, _ in given)), tuple(after for _, after in given)


@struct.dataclass
class SelectTransform:
    """One of several transforms of logits."""

    index: Any
    parts: tuple[Any, ...]

    def init(self, *shape: int) -> Any:
        return tuple(part.init(*shape) for part in self.parts)

    def step(self, logits: jax.Array, is_masked: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        def branch(i: int) -> Any:
            def run(logits: jax.Array, state: Any) -> tuple[jax.Array, Any]:
                logits, new = self.parts[i].step(logits, is_masked, state[i])
                return logits, (*state[:i], new, *state[i + 1:])

            return run

        return jax.lax.switch(self.index, [branch(i) for i in range(len(self.parts))], logits, state)
