"""One generation: the loop in stretches, with the host in between."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from djax.contracts.ambient import without_mesh
from djax.contracts.canvas import Canvas
from djax.contracts.types import Denoiser, Params
from djax.devices.distributed import with_peers
from djax.engine.interrupts import check, wait
from djax.engine.program import Program
from djax.engine.results import Generation, Watch, to_generation
from djax.engine.tokenizer import Tokenizer
from djax.engine.weights import check_alive
from djax.loop.state import Parts, Progress, stop_reasons


class Run:
    """A generation on its way; the arguments are those of `Program.begin`, placed."""

    def __init__(
        self, program: Program, denoiser: Denoiser, params: Params, canvas: Canvas, key: Key[Array, ""], parts: Parts,
        rows: Int[Array, " B"],
    ) -> None:
        self._program, self._denoiser, self._params, self._canvas, self._parts = (
            program, denoiser, check_alive(params), canvas, parts)
        self._pace = program.pace(canvas, parts)
        self._iterations = 0
        check()
        with with_peers(program.mesh), without_mesh():
            self._state, self._left = program.run(program.begin, denoiser, params, canvas, key, parts, rows)

    @property
    def left(self) -> bool:
        """Whether anything is left to decode."""
        with with_peers(self._program.mesh):
            return bool(jax.device_get(self._left))

    def generation(
        self, canvas: Canvas, *, eos_ids: Sequence[int], tokenizer: Tokenizer | None, watch: Watch | None,
        limit: int | None = None,
    ) -> Generation:
        """Go on to the end; `canvas` is the caller's, whose rows come back. `limit` as in `to_generation`."""
        while True:
            shown = self.advance()
            if self.left and watch is None:
                continue
            with with_peers(self._program.mesh):
                got = to_generation(canvas, shown, eos_ids=eos_ids, tokenizer=tokenizer,
                                    reasons=stop_reasons(self._parts.stop_rule), limit=limit)
            if not self.left:
                return got
            if watch is not None:
                watch(got)

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
