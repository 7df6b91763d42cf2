"""State of the loop, and its result."""

from __future__ import annotations

import enum
from typing import Literal, NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key

from djax.contracts import struct
from djax.contracts.part_shapes import AXES, check_shapes
from djax.contracts.types import Cache, CachePolicy, PartState, Propose, Smoothing, StopRule, Strategy, Transform
from djax.errors import check_choice
from djax.parts.cache_policies import NoCache
from djax.parts.proposals import Greedy
from djax.parts.smoothing import HardTokens
from djax.parts.stopping import Never
from djax.parts.transforms import Identity


class StopReason(enum.IntEnum):
    """Reason why a row stopped."""

    LENGTH = 0
    """Every open position was decoded."""
    EOS = 1
    """A finished block holds a token that ends a sequence."""
    NAN = 2
    """The model's logits held a NaN; what was committed before stays."""
    MAX_STEPS = 3
    """A block was not finished within the strategy's bound; its masked positions stay masked."""


def stop_reasons(rule: StopRule) -> tuple[str, ...]:
    """Names of the numbers in `Result.stop_reason`: those of `StopReason`, then the rule's own other than "eos"."""
    known = tuple(reason.name.lower() for reason in StopReason)
    return known + tuple(reason for reason in rule.reasons if reason not in known)


@struct.dataclass
class Parts:
    """One choice per axis of the loop. A recipe is the same: the choices that a published decoder makes.

    Raises:
        ArgumentError: a part does not give the shapes and dtypes of its axis' protocol in `djax.contracts.types`.
    """

    strategy: Strategy
    cache_policy: CachePolicy = NoCache()
    transform: Transform = Identity()
    propose: Propose = Greedy()
    """In a recipe `Greedy()` leaves the draw to the call's temperature and filters."""
    smoothing: Smoothing = HardTokens()
    stop_rule: StopRule = Never()
    """In a recipe it stops rows besides the call's EOS ids."""
    mask_token: Literal["forbid", "refuse"] = struct.field(pytree_node=False, default="forbid")
    """Treatment of the mask id: "forbid" drops it before the argmax; "refuse" lets it win and then commits
    nothing there, as dInfer's code does (a block whose remaining positions all predict it ends with "max_steps")."""

    def __post_init__(self) -> None:
        check_choice("mask_token", self.mask_token, ("forbid", "refuse"))
        for axis in AXES:
            check_shapes(axis, getattr(self, axis))


_ROWS, _WHOLE = ("batch",), ()


@struct.dataclass
class DenoiseState:
    """All that the loop carries. A field says how its arrays are split on a mesh."""

    tokens: Int[Array, "B T"] = struct.field(axes=_ROWS)
    is_masked: Bool[Array, "B T"] = struct.field(axes=_ROWS)
    inputs: Float[Array, "B T D"] | None = struct.field(axes=_ROWS)
    """Input embeddings; None when inputs are the tokens' own."""
    cache: Cache | None = struct.field(axes=("batch", None, "heads"))
    transform: PartState = struct.field(axes=_ROWS)
    strategy: PartState = struct.field(axes=_ROWS)
    row_keys: Key[Array, " B"] = struct.field(axes=_ROWS)
    block: Int[Array, ""] = struct.field(axes=_WHOLE)
    """Block being decoded, -1 before the first step."""
    blocks_entered: Int[Array, ""] = struct.field(axes=_WHOLE)
    step_in_block: Int[Array, ""] = struct.field(axes=_WHOLE)
    iterations: Int[Array, ""] = struct.field(axes=_WHOLE)
    step: Int[Array, " B"] = struct.field(axes=_ROWS)
    nfe: Int[Array, " B"] = struct.field(axes=_ROWS)
    refreshes: Int[Array, " B"] = struct.field(axes=_ROWS)
    commit_step: Int[Array, "B T"] = struct.field(axes=_ROWS)
    log_prob: Float[Array, "B T"] = struct.field(axes=_ROWS)
    done: Bool[Array, " B"] = struct.field(axes=_ROWS)
    stop_reason: Int[Array, " B"] = struct.field(axes=_ROWS)


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
    lengths: Int[Array, " B"]
    """Tokens from a row's first open position up to and including the first generated EOS, or to its end."""
    nfe: Int[Array, " B"]
    """Forwards of the network while the row was active, full or windowed."""
    steps: Int[Array, " B"]
    """Denoising steps of the row."""
    refreshes: Int[Array, " B"]
    """Steps that recomputed the whole canvas."""
    stop_reason: Int[Array, " B"]
    """A `StopReason` per row, or from 4 on one of the stop rule's own (`stop_reasons`)."""


class Progress(NamedTuple):
    """The host's view of a state between two stretches: whole on every device, in buffers of its own."""

    result: Result
    """The result of a state that may not be finished."""
    done: Bool[Array, " B"]
    block: Int[Array, ""]
    iterations: Int[Array, ""]
