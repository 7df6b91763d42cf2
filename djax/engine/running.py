"""One generation: the loop in stretches, with the host in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from djax.contracts import answers
from djax.contracts.ambient import without_mesh
from djax.contracts.canvas import Canvas
from djax.contracts.keys import as_key
from djax.contracts.types import Denoiser, Params
from djax.devices.distributed import with_peers
from djax.engine.interrupts import check, wait
from djax.engine.program import Program
from djax.engine.weights import check_alive
from djax.errors import check_integer
from djax.loop.state import Parts, Progress
from djax.models import Guided


def arguments(
    program: Program, params: Params, canvas: Canvas, parts: Parts, *, guidance: float | None = None,
    key: int | Key[Array, ""] = 0, row_ids: Sequence[int] | None = None,
) -> tuple[Denoiser, Params, Canvas, Key[Array, ""], Parts, Int[Array, " B"]]:
    """Place the arguments of a program's jitted functions on its devices: these may need more rows than `canvas` has.

    Args:
        program: of the model.
        params: its weights, where the program wants them.
        canvas: the same on every process of the mesh.
        parts: likewise.
        guidance: scale of classifier-free guidance; None is off.
        key: seed or random key.
        row_ids: identity of each row for the key; None is 0, 1, 2, ...

    Raises:
        ValueError: not one row id for each row, a cache policy that is not for this model or canvas, or weights that
            are gone.
    """
    config = program.config
    answers.check_model(parts.cache_policy, architecture=config.architecture, model_block_length=config.block_length,
                        block_length=canvas.block_length, gaps=False)
    ids = np.arange(canvas.batch) if row_ids is None else np.asarray(row_ids)
    if ids.shape != (canvas.batch,):
        raise ValueError(f"row_ids: got {ids.size} ids; allowed one for each of the {canvas.batch} prompts")
    check_integer("row_ids", row_ids, optional=True)
    padded = program.pad_rows(canvas)
    row_numbers: Any = np.concatenate([ids, np.zeros(padded.batch - canvas.batch, ids.dtype)]).astype(np.int32)
    denoiser: Denoiser = program.denoiser
    if guidance is not None:
        denoiser = Guided(denoiser, scale=jax.device_put(np.float32(guidance)), mask_id=padded.mask_id,
                          unconditional=padded.valid & ~padded.is_masked)
    random_key = as_key(key)
    denoiser, padded, row_numbers = program.place_rows((denoiser, padded, row_numbers))
    random_key, parts = program.place((random_key, parts))
    return denoiser, check_alive(params), padded, random_key, parts, row_numbers


class Run:
    """A generation on its way; it is begun as `arguments` says."""

    def __init__(
        self, program: Program, params: Params, canvas: Canvas, parts: Parts, *, guidance: float | None = None,
        key: int | Key[Array, ""] = 0, row_ids: Sequence[int] | None = None,
    ) -> None:
        placed = arguments(program, params, canvas, parts, guidance=guidance, key=key, row_ids=row_ids)
        self._program, self._rows = program, canvas.batch
        self._denoiser, self._params, self._canvas, _, self._parts, _ = placed
        self._pace = program.pace(self._canvas, self._parts)
        self._iterations = 0
        check()
        with with_peers(program.mesh), without_mesh():
            self._state, self._left = program.run(program.begin, *placed)

    @property
    def mesh(self) -> Mesh | None:
        """The program's mesh."""
        return self._program.mesh

    @property
    def left(self) -> bool:
        """Whether anything is left to decode."""
        with with_peers(self.mesh):
            return bool(jax.device_get(self._left))

    def finish(self, watch: Callable[[Progress], None] | None = None) -> Progress:
        """Go on to the end: what `fetch` gives then. `watch` is called with it after every stretch but the last."""
        while True:
            shown = self.advance()
            if not self.left:
                return self.fetch(shown)
            if watch is not None:
                watch(self.fetch(shown))

    def fetch(self, shown: Progress) -> Progress:
        """On the host, in one transfer, without the rows that a mesh was filled up with."""
        with with_peers(self.mesh), without_mesh():
            got = jax.device_get(shown)
        return jax.tree.map(lambda array: array[:self._rows] if array.ndim else array, got)

    def advance(self, *, steps: int | None = None, before_block: int | None = None) -> Progress:
        """The loop goes on: by so many steps, until that block is reached, or else for about `STRETCH_SECONDS`."""
        end = self._canvas.num_blocks if before_block is None else before_block
        while True:
            shown, whole = self._stretch(self._pace.steps if steps is None else steps, end, timed=steps is None)
            if before_block is None or not (whole and self.left):
                return shown

    def _stretch(self, steps: int, before_block: int, *, timed: bool) -> tuple[Progress, bool]:
        """One stretch, and whether it took all its steps."""
        check()
        check_alive(self._params)
        limits = self._program.place((np.int32(steps), np.int32(before_block)))
        started = time.perf_counter()
        with with_peers(self._program.mesh), without_mesh():
            self._state, shown, self._left = self._program.run(
                self._program.advance, self._denoiser, self._params, self._canvas, self._state, self._parts, *limits)
            wait(shown)
            iterations, self._left = jax.device_get((shown.iterations, self._left))
        taken, self._iterations = int(iterations) - self._iterations, int(iterations)
        if timed and taken == steps:
            self._pace.took(time.perf_counter() - started)
        return shown, taken == steps


def full_logits(program: Program, params: Params, rows: Sequence[Sequence[int]]) -> Float[np.ndarray, "B T V"]:
    """float32 logits of one forward over whole rows of token ids; shorter ones are padded on the left."""
    length = max(max(len(row) for row in rows), 1)
    batch = -(-len(rows) // program.row_parts) * program.row_parts
    tokens = np.full((batch, length), program.config.pad_id, np.int32)
    valid, positions = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, np.int32)
    for index, row in enumerate(rows):
        here = slice(length - len(row), length)
        tokens[index, here], valid[index, here], positions[index, here] = row, True, np.arange(len(row))
    with with_peers(program.mesh):
        got = program.run(
            program.logits, program.denoiser, check_alive(params), *program.place_rows((tokens, valid, positions)))
        return np.asarray(jax.device_get(got))[: len(rows)]
