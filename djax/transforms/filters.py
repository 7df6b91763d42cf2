"""Filters that look at all of the vocabulary: top-k, nucleus, min-p."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from djax import struct
from djax.types import Logits, PartState


@struct.dataclass
class TopK:
    """Keeps the k most probable tokens; those that tie with the k-th stay too. `k` is static."""

    k: int = struct.field(pytree_node=False)

    def init(self, batch: int, block_length: int) -> PartState:
        """No state.

        Raises:
            ValueError: k below 1.
        """
        if self.k < 1:
            raise ValueError(f"top_k: got {self.k}; it must be at least 1")
        return ()

    def step(self, logits: Logits, is_masked: Bool[Array, "B L"], state: PartState) -> tuple[Logits, PartState]:
        """Logits with -inf outside the k best."""
        kth = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][..., -1:]
        return jnp.where(logits >= kth, logits, -jnp.inf), state


@struct.dataclass
class TopP:
    """Nucleus: the smallest set of most probable tokens whose mass reaches `p` (arXiv 1904.09751).

    Probabilities are taken at `temperature` (0 counts as 1), the one that the sampler will use. The most
    probable token always stays, and so do tokens that tie with the last one kept.
    """

    p: float | Float[Array, ""]
    temperature: float | Float[Array, ""] = 1.0

    def init(self, batch: int, block_length: int) -> PartState:
        """No state."""
        return ()

    def step(self, logits: Logits, is_masked: Bool[Array, "B L"], state: PartState) -> tuple[Logits, PartState]:
        """Logits with -inf outside the nucleus."""
        probs = jax.nn.softmax(logits / _positive(self.temperature), axis=-1)
        descending = -jnp.sort(-probs, axis=-1)
        before = jnp.cumsum(descending, axis=-1) - descending
        # A token stays while the mass of those before it is below p; the first one always does.
        keep = (before < self.p).at[..., 0].set(True)
        smallest = jnp.min(jnp.where(keep, descending, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(probs >= smallest, logits, -jnp.inf), state


@struct.dataclass
class MinP:
    """Drops tokens less probable than `p` times the most probable one (arXiv 2407.01082), at `temperature`."""

    p: float | Float[Array, ""]
    temperature: float | Float[Array, ""] = 1.0

    def init(self, batch: int, block_length: int) -> PartState:
        """No state."""
        return ()

    def step(self, logits: Logits, is_masked: Bool[Array, "B L"], state: PartState) -> tuple[Logits, PartState]:
        """Logits with -inf on the improbable tokens."""
        best = jnp.max(logits, axis=-1, keepdims=True)
        keep = logits - best >= _positive(self.temperature) * jnp.log(jnp.asarray(self.p, jnp.float32))
        return jnp.where(keep, logits, -jnp.inf), state


def _positive(temperature: float | Float[Array, ""]) -> Float[Array, ""]:
    temperature = jnp.asarray(temperature, jnp.float32)
    return jnp.where(temperature > 0, temperature, 1.0)
