"""Filters that look at all of the vocabulary: top-k, nucleus, min-p.

A call's filters belong to its draw (`djax.proposals.Sample.filters`) and leave confidences alone. As a recipe's
transform a filter changes what the model means: strategies then see the probabilities that it leaves.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from djax.contracts import struct
from djax.contracts.types import Filter, Logits, PartState
from djax.errors import check_integer, check_number


class _AsTransform:
    """A filter as a transform: no state, and what it keeps at every position."""

    def init(self, batch: int, block_length: int) -> PartState:
        """Start without a state."""
        return ()

    def step(
        self: Filter, logits: Logits, is_masked: Bool[Array, "B L"], state: PartState
    ) -> tuple[Logits, PartState]:
        """Logits with -inf where a token may not be drawn."""
        return self.keep(logits), state


@struct.dataclass
class TopK(_AsTransform):
    """Keeps the k most probable tokens; those that tie with the k-th stay too. `k` is static.

    Raises:
        ArgumentError: k below 1.
    """

    k: int = struct.field(pytree_node=False)

    def __post_init__(self) -> None:
        check_integer("k", self.k, 1)

    def keep(self, logits: Logits) -> Logits:
        """Logits with -inf outside the k best."""
        kth = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][..., -1:]
        return jnp.where(logits >= kth, logits, -jnp.inf)


@struct.dataclass
class TopP(_AsTransform):
    """Nucleus: the smallest set of most probable tokens whose mass reaches `p` (arXiv 1904.09751).

    Probabilities are taken at `temperature` (0 counts as 1), the one that the sampler will use. The most
    probable token always stays, and so do tokens that tie with the last one kept.
    """

    p: float | Float[Array, ""]
    temperature: float | Float[Array, ""] = 1.0

    def __post_init__(self) -> None:
        check_number("p", self.p, 0.0, 1.0)
        check_number("temperature", self.temperature, 0.0)

    def keep(self, logits: Logits) -> Logits:
        """Logits with -inf outside the nucleus."""
        probs = jax.nn.softmax(tempered(logits, _positive(self.temperature)), axis=-1)
        descending = -jnp.sort(-probs, axis=-1)
        before = jnp.cumsum(descending, axis=-1) - descending
        # A token stays while the mass of those before it is below p; the first one always does.
        keep = (before < self.p).at[..., 0].set(True)
        smallest = jnp.min(jnp.where(keep, descending, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(probs >= smallest, logits, -jnp.inf)


@struct.dataclass
class MinP(_AsTransform):
    """Drops tokens less probable than `p` times the most probable one (arXiv 2407.01082), at `temperature`."""

    p: float | Float[Array, ""]
    temperature: float | Float[Array, ""] = 1.0

    def __post_init__(self) -> None:
        check_number("p", self.p, 0.0, 1.0)
        check_number("temperature", self.temperature, 0.0)

    def keep(self, logits: Logits) -> Logits:
        """Logits with -inf on the improbable tokens."""
        best = jnp.max(logits, axis=-1, keepdims=True)
        keep = logits - best >= _positive(self.temperature) * jnp.log(jnp.asarray(self.p, jnp.float32))
        return jnp.where(keep, logits, -jnp.inf)


def tempered(logits: Logits, temperature: Float[Array, ""]) -> Logits:
    """Logits over a temperature above 0, taken from the best one: logit / temperature overflows at low temperatures."""
    best = jnp.max(logits, axis=-1, keepdims=True)
    # an infinite best would give inf - inf; where nothing is allowed all are -inf
    return (logits - jnp.where(jnp.isfinite(best), best, 0.0)) / temperature


def _positive(temperature: float | Float[Array, ""]) -> Float[Array, ""]:
    temperature = jnp.asarray(temperature, jnp.float32)
    return jnp.where(temperature > 0, temperature, 1.0)
