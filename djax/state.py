"""What the loop carries and what it returns."""

from __future__ import annotations

import enum
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key

from djax import struct
from djax.cache_policies import NoCache
from djax.proposals import Greedy
from djax.smoothing import HardTokens
from djax.stopping import Never
from djax.transforms import Identity
from djax.types import (
    Cache,
    CachePolicy,
    PartState,
    Propose,
    Smoothing,
    StopRule,
    Strategy,
    Transform,
)


class StopReason(enum.IntEnum):
    """Why a row stopped."""

    LENGTH = 0
    """Every open position was decoded."""
    EOS = 1
    """The stop rule fired."""
    NAN = 2
    """The model's logits held a NaN; what was committed before stays."""
    MAX_STEPS = 3
    """A block was not finished within the strategy's bound; its masked positions stay masked."""


@struct.dataclass
class Parts:
    """One choice per axis of the loop."""

    strategy: Strategy
    cache_policy: CachePolicy = NoCache()
    transform: Transform = Identity()
    propose: Propose = Greedy()
    smoothing: Smoothing = HardTokens()
    stop_rule: StopRule = Never()


@struct.dataclass
class DenoiseState:
    """All that the loop carries."""

    tokens: Int[Array, "B T"]
    is_masked: Bool[Array, "B T"]
    inputs: Float[Array, "B T D"] | None
    """Input embeddings; None when inputs are the tokens' own."""
    cache: Cache | None
    transform: PartState
    strategy: PartState
    row_keys: Key[Array, "B"]
    block: Int[Array, ""]
    """Block being decoded, -1 before the first step."""
    blocks_entered: Int[Array, ""]
    step_in_block: Int[Array, ""]
    iterations: Int[Array, ""]
    step: Int[Array, "B"]
    nfe: Int[Array, "B"]
    refreshes: Int[Array, "B"]
    commit_step: Int[Array, "B T"]
    log_prob: Float[Array, "B T"]
    done: Bool[Array, "B"]
    stop_reason: Int[Array, "B"]


@struct.dataclass
class Result:
    """A denoised canvas and how it came about."""

    tokens: Int[Array, "B T"]
    """Untrimmed: padding, prompt and generated positions."""
    is_masked: Bool[Array, "B T"]
    """Positions still masked (a row that stopped early without filling)."""
    valid: Bool[Array, "B T"]
    """False on padding."""
    commit_step: Int[Array, "B T"]
    """The row's step (from 0) at which the position was committed; -1 for pinned, filled and masked ones."""
    log_prob: Float[Array, "B T"]
    """log-probability of the committed token under the distribution it was drawn from; 0 elsewhere."""
    lengths: Int[Array, "B"]
    """Tokens from a row's first open position up to and including the first generated EOS, or to its end."""
    nfe: Int[Array, "B"]
    """Forwards of the network while the row was active, full or windowed."""
    steps: Int[Array, "B"]
    """Denoising steps of the row."""
    refreshes: Int[Array, "B"]
    """How many of the steps recomputed the whole canvas."""
    stop_reason: Int[Array, "B"]
    """A `StopReason` per row."""


class Progress(NamedTuple):
    """What the host sees of a state between two stretches: whole on every device, and the state's own no longer."""

    tokens: Int[Array, "B T"]
    is_masked: Bool[Array, "B T"]
    done: Bool[Array, "B"]
    nfe: Int[Array, "B"]
    block: Int[Array, ""]
    iterations: Int[Array, ""]
    step: Int[Array, "B"]
    refreshes: Int[Array, "B"]
    commit_step: Int[Array, "B T"]
    log_prob: Float[Array, "B T"]
    stop_reason: Int[Array, "B"]
