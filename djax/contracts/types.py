"""The contracts: what the loop hands to its parts and what it gets back.

A part is a frozen `djax.contracts.struct.dataclass`. A field that decides a shape or a Python branch is static
(`struct.field(pytree_node=False)`); every other number is a leaf. Nobody inherits from a protocol.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from djax.contracts import struct

Params = Any
"""A pytree of weights (an `nnx.State` or a plain dict)."""
Hidden = Any
"""Output of a denoiser's `apply` for its own `unembed`: a pytree of arrays with leading axes [B, W]."""
Cache = Any
"""State that a denoiser keeps between forwards: a pytree, opaque to the loop."""
Positions = Any
"""Positions as a denoiser's `prepare_positions` gives them: a pytree of arrays with leading axes [B, T], or [B, W]."""
PartState = Any
"""A part's own state: a pytree of arrays with a leading axis B (on a mesh their rows are split), or () for none."""
Logits = Float[Array, "B L V"]


@struct.dataclass
class StepInfo:
    """Counters of the loop, from 0."""

    row_step: Int[Array, " B"]
    """Denoising steps of the row so far, over the whole sequence."""
    step_in_block: Int[Array, ""]
    """Steps since the block was entered; the same for every row still at work in it."""
    block: Int[Array, ""]
    """Index of the block; block 0 is the first one that has something to decode."""
    block_start: Int[Array, ""]
    """Canvas index of the block's first position."""
    is_open: Bool[Array, "B L"]
    """Positions of the block that were masked when the canvas was built; the others are pinned."""

    @property
    def num_open(self) -> Int[Array, " B"]:
        """Open positions of the block, whether committed since or not."""
        return self.is_open.sum(-1, dtype=jnp.int32)


@struct.dataclass
class Candidates:
    """One proposed token per position of the block: all that is left of the vocabulary.

    `confidence` is the token's probability under the transformed logits at temperature 1, in float32.
    -inf means "no proposal here": no strategy commits such a position.
    """

    token: Int[Array, "B L"]
    confidence: Float[Array, "B L"]
    log_prob: Float[Array, "B L"]
    """log-probability of `token` under the distribution it was drawn from (temperature 1 when greedy)."""
    current: Float[Array, "B L"]
    """Probability, at temperature 1, of the token that the canvas holds now."""


@struct.dataclass
class Forbidden:
    """Tokens that must not be proposed."""

    ids: Int[Array, " n"]
    """Negative ones forbid nothing."""
    limit: Int[Array, ""]
    """Every id from here on is forbidden too."""


# NumPy: making a JAX array would start the backend on import. Not empty: XLA for GPUs fails on empty arrays in programs
# for several devices.
FORBID_NOTHING = Forbidden(ids=np.full(1, -1, np.int32), limit=np.int32(2**31 - 1))  # type: ignore[arg-type]
"""Every token is allowed."""


@struct.dataclass
class Noise:
    """Randomness of a draw: the largest of logits + temperature * Gumbel noise is drawn."""

    temperature: Float[Array, ""]
    """0 draws the most probable token."""
    keys: UInt32[Array, "B L 2"]
    """Two random words per position; the noise is a function of them and of the token's id (`gumbel_noise`)."""


@struct.dataclass
class HeadQuery:
    """A step's question to the head when no part needs all logits; see `ReadingDenoiser.read`."""

    ids: Int[Array, "B L A"]
    """Tokens whose logits are wanted; a negative id asks for nothing."""
    forbidden: Forbidden
    noise: Noise | None
    """None where nothing is drawn."""


@struct.dataclass
class Reading:
    """A head's answer about each position, without the vocabulary axis. Probabilities are over allowed tokens.

    Logits and log-sums are float32; a forbidden token's logit is -inf.
    """

    ids: Int[Array, "B L A"]
    """The query's ids."""
    logits: Float[Array, "B L A"]
    """Their logits; -inf for a negative id."""
    noise: Float[Array, "B L A"]
    """Their Gumbel noise; zeros where nothing is drawn, as in the other two."""
    best: Int[Array, "B L"]
    """The most probable token, the lowest id among equals."""
    best_logit: Float[Array, "B L"]
    best_noise: Float[Array, "B L"]
    drawn: Int[Array, "B L"]
    """The draw; the most probable token where nothing is drawn."""
    drawn_logit: Float[Array, "B L"]
    drawn_noise: Float[Array, "B L"]
    log_total: Float[Array, "B L"]
    """logsumexp of the logits; NaN where any logit is."""
    log_sum_tempered: Float[Array, "B L"]
    """log of the sum of exp((logit - best_logit) / temperature); at temperature 1 where it is 0 or nothing is drawn."""
    temperature: Float[Array, ""] | None
    """The query's; None where nothing is drawn."""

    def logit_of(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L"]:
        """Logits of tokens that were asked for; -inf for others."""
        return jnp.max(jnp.where(self.ids == tokens[..., None], self.logits, -jnp.inf), axis=-1, initial=-jnp.inf)


@struct.dataclass
class Decision:
    """A strategy's decision about each position of the block.

    `commit` writes the candidate and closes the position (on an open position that is not masked it
    rewrites the token); `reopen` masks the position again. The loop ignores both on pinned positions.
    """

    commit: Bool[Array, "B L"]
    reopen: Bool[Array, "B L"]


@struct.dataclass
class Window:
    """The positions that the next forward recomputes: all of them (`refresh`), or those in [start, end)."""

    refresh: Bool[Array, ""]
    start: Int[Array, ""]
    end: Int[Array, ""]


class Denoiser(Protocol):
    """The mask predictor as a function. A pytree, so that its numbers are leaves."""

    @property
    def forwards(self) -> int:
        """Forwards of the network in one `apply`: what a step adds to NFE."""
        ...

    def init_cache(self, params: Params, batch: int, length: int) -> Cache:
        """An empty cache for `batch` canvases of `length` positions."""
        ...

    def embed(self, params: Params, tokens: Int[Array, "B W"]) -> Float[Array, "B W D"]:
        """Input embeddings of tokens."""
        ...

    def prepare_positions(self, params: Params, positions: Int[Array, "B T"]) -> Positions:
        """Prepare what `apply` needs of positions (rotation angles, say), once before the loop."""
        ...

    def apply(
        self,
        params: Params,
        inputs: Float[Array, "B W D"],
        *,
        positions: Positions,
        key_mask: Bool[Array, "B T"],
        window_start: Int[Array, ""],
        write: Bool[Array, "B W"],
        cache: Cache | None,
    ) -> tuple[Hidden, Cache | None]:
        """Hidden states of a window of the canvas; `positions` is the window's part of what `prepare_positions` gave.

        With a cache, the window's keys and values replace the cache's where `write` is set and the
        queries attend to the whole cache; without one the window is the canvas (W = T) and `write` is
        not read. Keys outside `key_mask` are never attended.
        """
        ...

    def unembed(self, params: Params, hidden: Hidden) -> Logits:
        """float32 logits of hidden states (any slice of `apply`'s along axis 1)."""
        ...

    def expected_embedding(self, params: Params, logits: Logits) -> Float[Array, "B L D"]:
        """`softmax(logits) @ W_embed`, the softmax in float32."""
        ...


class ReadingDenoiser(Denoiser, Protocol):
    """A denoiser that can answer a `HeadQuery` without holding the logits of the vocabulary.

    The loop asks it to where neither it nor transform nor proposal `needs_logits`; one that does not say is always
    asked for logits.
    """

    @property
    def needs_logits(self) -> bool:
        """False where `read` may be called."""
        ...

    def read(
        self, params: Params, hidden: Hidden, query: HeadQuery, *, expected: bool
    ) -> tuple[Reading, Float[Array, "B L D"] | None]:
        """The reading of hidden states, and with `expected` their expected embeddings over the whole vocabulary.

        The latter are `softmax(logits) @ W_embed` with nothing forbidden.
        """
        ...


class Transform(Protocol):
    """Logits to logits, with a state that lives for one block."""

    def init(self, batch: int, block_length: int) -> PartState:
        """State on entering a block."""
        ...

    def step(self, logits: Logits, is_masked: Bool[Array, "B L"], state: PartState) -> tuple[Logits, PartState]:
        """Transformed logits (float32) and the next state."""
        ...


class ReadingTransform(Transform, Protocol):
    """A transform that can do with a `Reading`: it forbids tokens, or changes logits of a few tokens it can name.

    One that does not say `needs_logits = False` is always given logits. Both ways give the same candidates. One that
    forbids nothing may leave `forbidden` out, and one that wants no ids `wanted_ids` (`djax.contracts.answers`).
    """

    @property
    def needs_logits(self) -> bool:
        """False where the other methods may be called in place of `step`."""
        ...

    def forbidden(self) -> Forbidden:
        """The tokens that it drops from the vocabulary."""
        ...

    def wanted_ids(self, state: PartState) -> Int[Array, "B L S"] | None:
        """Tokens whose logits it has to know, negative for none; None if it never needs any."""
        ...

    def step_reading(
        self, reading: Reading, is_masked: Bool[Array, "B L"], state: PartState
    ) -> tuple[Reading, PartState]:
        """The reading of the transformed logits, and the next state."""
        ...


class Filter(Protocol):
    """A restriction of the tokens that may be drawn."""

    def keep(self, logits: Logits) -> Logits:
        """Set logits to -inf where a token may not be drawn; the most probable token always stays."""
        ...


class Propose(Protocol):
    """Logits to candidates. The vocabulary axis ends here."""

    def step(self, keys: Key[Array, " B"], logits: Logits, tokens: Int[Array, "B L"]) -> Candidates:
        """One candidate per position; `tokens` are the block's tokens now; row i only uses `keys[i]`."""
        ...


class ReadingPropose(Propose, Protocol):
    """A proposal that can do with a `Reading`. One that does not say is always given logits."""

    @property
    def needs_logits(self) -> bool:
        """False where the other methods may be called in place of `step`."""
        ...

    def noise(self, keys: Key[Array, " B"], block_length: int) -> Noise | None:
        """The randomness of the draw; None to propose the most probable token."""
        ...

    def read(self, reading: Reading, tokens: Int[Array, "B L"]) -> Candidates:
        """One candidate per position, as `step` would give it; `tokens` are among the reading's ids."""
        ...


class Strategy(Protocol):
    """A rule that chooses the candidates to commit. Its state lives for one block."""

    @property
    def reopens(self) -> bool:
        """Whether it ever reopens or rewrites (then `commit_step` does not replay the trajectory)."""
        ...

    def max_steps(self, block_length: int) -> int:
        """Static bound on the steps a block may take."""
        ...

    def init(self, batch: int, block_length: int) -> PartState:
        """State on entering a block."""
        ...

    def step(
        self,
        keys: Key[Array, " B"],
        candidates: Candidates,
        is_masked: Bool[Array, "B L"],
        info: StepInfo,
        state: PartState,
    ) -> tuple[Decision, PartState]:
        """The decision for this step."""
        ...


class CachePolicy(Protocol):
    """A rule that says when to recompute the whole canvas, and which window otherwise."""

    @property
    def exact(self) -> bool:
        """Whether every step sees the same logits as without a cache."""
        ...

    def window_length(self, canvas_length: int, first_block: int, block_length: int) -> int | None:
        """Static width of the recomputed window; None for no cache at all."""
        ...

    def window(self, info: StepInfo, canvas_length: int, block_length: int) -> Window:
        """Depends on the block index and the step in the block only, never on a row."""
        ...


class Smoothing(Protocol):
    """A rule that makes the next inputs of masked positions."""

    @property
    def soft(self) -> bool:
        """Whether inputs differ from the tokens' own embeddings (then the loop carries them)."""
        ...

    def step(
        self,
        embedded: Float[Array, "B W D"],
        expected: Float[Array, "B W D"],
        is_masked: Bool[Array, "B W"],
        info: StepInfo,
    ) -> Float[Array, "B W D"]:
        """Next inputs of the window from the tokens' embeddings and the expected embeddings."""
        ...


class StopRule(Protocol):
    """A rule that says which rows are finished, asked of every row that has just completed its block."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Its reasons, in the words of `Generation.stop_reason`; "eos" for a token that ends a sequence."""
        ...

    def step(
        self, tokens: Int[Array, "B T"], is_open: Bool[Array, "B T"], is_masked: Bool[Array, "B T"], info: StepInfo
    ) -> Bool[Array, " B"] | Int[Array, " B"]:
        """True for rows to stop, or k to stop for the k-th of several reasons (from 1); 0 and False go on.

        `is_open` marks generated positions, pinned ones do not count.
        """
        ...

    def ends(self, tokens: Int[Array, "B T"]) -> Bool[Array, "B T"]:
        """Tokens that end a sequence: a row's length counts up to the first generated one."""
        ...

    def fill(self) -> Int[Array, ""] | Int[Array, " reasons"] | None:
        """Token that fills a stopped row's remaining masked positions, or one for each of the reasons.

        None, and -1 for a reason, leave them masked.
        """
        ...


