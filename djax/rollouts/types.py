"""Data of a policy-gradient loop: rollouts, and the masked states at which they are scored."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from djax.contracts import struct
from djax.contracts.types import Forbidden


@struct.dataclass
class Rollout:
    """Samples and how they came about: all that is needed to ask a model again what it said.

    A pytree. The arrays of `rollout` are on the host, so that they can go to any mesh.
    """

    tokens: Int[Array, "B T"]
    """The untrimmed canvas: left padding, prompt, every generated position, right padding."""
    valid: Bool[Array, "B T"]
    """False on padding, which is never attended."""
    is_open: Bool[Array, "B T"]
    """Positions that were to be generated; False on prompts and other pinned tokens."""
    is_masked: Bool[Array, "B T"]
    """Open positions that were never decoded (rows that ended with NAN or MAX_STEPS); they hold the mask id."""
    positions: Int[Array, "B T"]
    """Rotary positions, 0 at a row's first real token."""
    lengths: Int[Array, " B"]
    """Generated tokens that count: up to and including the first EOS, or up to the first position still masked."""
    nfe: Int[Array, " B"]
    """Forwards of the network while the row was active."""
    steps: Int[Array, " B"]
    """Denoising steps of the row."""
    stop_reason: Int[Array, " B"]
    """A `djax.StopReason` per row."""
    commit_step: Int[Array, "B T"]
    """The row's step (from 0) that committed each position; -1 for pinned, filled and masked ones."""
    log_prob: Float[Array, "B T"]
    """float32 log-prob of each committed token under the distribution it was drawn from; 0 elsewhere."""
    row_ids: Int[Array, " B"]
    """The identity of each row for random keys: what is drawn for a row stays the same when the rollout is cut."""
    mask_id: Int[Array, ""]
    """Token that a masked position feeds the model."""
    temperature: Float[Array, ""]
    """At which tokens were drawn; 0 is greedy, whose log-probs are those at temperature 1."""
    forbidden: Forbidden
    """Tokens that the sampler could not draw: they are outside of the distribution."""
    first_block: int = struct.field(pytree_node=False)
    """Canvas index of the first block; everything before it is given."""
    block_length: int = struct.field(pytree_node=False)
    """Positions that were decoded together."""
    max_steps: int = struct.field(pytree_node=False)
    """Static bound on a row's steps: its blocks times what the strategy may take for each."""
    replayable: bool = struct.field(pytree_node=False, default=True)
    """Whether `score` at `trace_states` gives `log_prob` again."""
    not_replayable_because: str | None = struct.field(pytree_node=False, default=None)
    """The part of the sampler that broke it."""

    @property
    def batch(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """T."""
        return self.tokens.shape[1]

    @property
    def is_completion(self) -> Bool[Array, "B T"]:
        """The generated tokens that count: the first `lengths` open positions."""
        # host arrays stay there: a new array would lie wherever the caller's `jax.set_mesh` says
        library: Any = np if isinstance(self.is_open, np.ndarray) else jnp
        counted = library.cumsum(self.is_open, axis=1, dtype=np.int32) <= self.lengths[:, None]
        found: Bool[Array, "B T"] = self.is_open & counted & ~self.is_masked
        return found

    def take(self, rows: slice | Int[Array, " b"] | Int[np.ndarray, " b"]) -> Rollout:
        """Some of the rows."""
        per_row = {field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)
                   if field.name in PER_ROW}
        return dataclasses.replace(self, **per_row)

    def completions(self) -> list[Int[np.ndarray, " length"]]:
        """The generated tokens that count, row by row, on the host; an EOS at the end is part of them."""
        tokens, counts = jax.device_get((self.tokens, self.is_completion))
        return [row[here] for row, here in zip(tokens, counts, strict=True)]


PER_ROW = ("tokens", "valid", "is_open", "is_masked", "positions", "lengths", "nfe", "steps", "stop_reason",
           "commit_step", "log_prob", "row_ids")
"""Fields of a `Rollout` whose first axis is its rows."""


@struct.dataclass
class MaskedStates:
    """At which of its own masked versions a row is scored, and what for: n states per row.

    Every likelihood estimator is one of these: sum over states s and positions i of
    weights[s, i] * log p(token i | the canvas with masks[s] hidden).
    """

    masks: Bool[Array, "B n T"]
    """Positions shown as the mask id."""
    weights: Float[Array, "B n T"]
    """Weight of each position's log-prob; positions before the rollout's first block are never read."""

    @property
    def num_states(self) -> int:
        """n, the forwards that it takes at most: a state in which no row has any weight costs none."""
        return self.masks.shape[1]

    def take(self, rows: slice | Int[Array, " b"] | Int[np.ndarray, " b"]) -> MaskedStates:
        """Keep some of the rows."""
        return MaskedStates(masks=self.masks[rows], weights=self.weights[rows])
