"""Logit transforms: logits in, logits out, with a state that lives for one block.

All work in float32 and drop a token by setting its logit to -inf.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from djax import struct
from djax.types import Logits, PartState, Transform


@struct.dataclass
class Identity:
    """Leaves the logits as they are."""

    def init(self, batch: int, block_length: int) -> PartState:
        """No state."""
        return ()

    def step(self, logits: Logits, is_masked: Bool[Array, "B L"], state: PartState) -> tuple[Logits, PartState]:
        """The same logits."""
        return logits, state


@struct.dataclass
class ForbidTokens:
    """Drops `token_ids`, and every id from `vocab_limit` on (the vocabulary is padded past the tokenizer)."""

    token_ids: Int[Array, "n"]
    vocab_limit: int | Int[Array, ""] | None = None

    def init(self, batch: int, block_length: int) -> PartState:
        """No state."""
        return ()

    def step(self, logits: Logits, is_masked: Bool[Array, "B L"], state: PartState) -> tuple[Logits, PartState]:
        """Logits with -inf on the forbidden ids."""
        ids = jnp.arange(logits.shape[-1])
        # A comparison fuses with its neighbours where a scatter would write the logits once more.
        forbidden = (ids[:, None] == jnp.atleast_1d(jnp.asarray(self.token_ids))[None]).any(-1)
        if self.vocab_limit is not None:
            forbidden |= ids >= self.vocab_limit
        return jnp.where(forbidden, -jnp.inf, logits), state


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


@struct.dataclass
class CreditState:
    """Credit kept as slots: slot j of a position is the token that was its argmax at step j of the block."""

    token: Int[Array, "B L S"]
    """int32; -1 in an unused slot. A token has at most one slot."""
    mass: Float[Array, "B L S"]


@struct.dataclass
class Credit:
    """Credit decoding: tokens that keep being the best guess gain logits (arXiv 2510.08666, section 4.3).

    Each step, on masked positions: mass <- beta * mass, mass[argmax] += p_max ** gamma, and then
    logits + alpha * log(1 + mass). Only ids that were an argmax in this block carry mass, so S = L slots
    per position hold it all: a block takes at most L steps under a strategy that only commits. Under one
    that takes more, the slot with the least mass is given up.
    """

    alpha: float | Float[Array, ""] = 0.7
    beta: float | Float[Array, ""] = 0.8
    gamma: float | Float[Array, ""] = 0.2

    def init(self, batch: int, block_length: int) -> PartState:
        """No credit."""
        slots = (batch, block_length, block_length)
        return CreditState(token=jnp.full(slots, -1, jnp.int32), mass=jnp.zeros(slots, jnp.float32))

    def step(self, logits: Logits, is_masked: Bool[Array, "B L"], state: PartState) -> tuple[Logits, PartState]:
        """Logits raised by the accumulated credit."""
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        p_max = jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))
        known = state.token == best[..., None]
        # An unused slot has no mass, so the first of the least is free while there is a free one.
        weakest = jax.nn.one_hot(jnp.argmin(state.mass, axis=-1), state.mass.shape[-1], dtype=bool)
        slot = jnp.where(known.any(-1, keepdims=True), known, weakest)
        kept = jnp.where(slot & ~known, 0.0, self.beta * state.mass)
        gain = jnp.where(is_masked, p_max ** self.gamma, 0.0)[..., None]
        mass = kept + jnp.where(slot, gain, 0.0)
        token = jnp.where(slot & is_masked[..., None], best[..., None], state.token)
        bonus = jnp.where(token >= 0, self.alpha * jnp.log1p(mass), 0.0)
        batch, length = best.shape
        rows, columns = jnp.arange(batch)[:, None, None], jnp.arange(length)[None, :, None]
        raised = logits.at[rows, columns, jnp.maximum(token, 0)].add(bonus)
        return raised, CreditState(token=token, mass=mass)


@struct.dataclass
class Chain:
    """Several transforms, first to last."""

    transforms: tuple[Transform, ...]

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


def _positive(temperature: float | Float[Array, ""]) -> Float[Array, ""]:
    temperature = jnp.asarray(temperature, jnp.float32)
    return jnp.where(temperature > 0, temperature, 1.0)
