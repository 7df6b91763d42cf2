"""djax and its PyTorch twin behind one interface, each in a worker process that waits for its turn.

Only one worker computes at a time, so that their thread pools never share the cores. Both import their
framework in the worker: the parent has neither.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from benchmarks.decode.products import Product, Rates, gflops, in_torch, in_xla

MATMUL = (1024, 512, 2048)
"""Rows, inner width and columns of a large float32 product: about the best that a matrix library gives."""
LARGE_RUNS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table: a decoder and a batch."""

    recipe: str
    threshold: float
    cache: str
    """"none", "dual" or "vicinity"."""
    batch: int
    prompt_length: int
    max_new_tokens: int
    block_length: int
    before: int = 0
    after: int = 0
    warmup: int = 0

    @property
    def canvas_length(self) -> int:
        """Positions of one row."""
        return self.prompt_length + self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class Run:
    """One timed generation."""

    seconds: float
    cpu_seconds: float
    """Time of all threads of the worker: it shows how much of the wall time the machine gave."""
    tokens: Int[np.ndarray, "B T"]
    commit_step: Int[np.ndarray, "B T"]
    """The row's step that committed each position; -1 in the prompt."""


class Engine(Protocol):
    """A program that a worker drives."""

    def matmul_gflops(self) -> float:
        """Speed of `MATMUL`."""
        ...

    def rates(self, products: tuple[Product, ...]) -> list[float]:
        """GFLOP/s of each product in this engine's matrix library, on all cores."""
        ...

    def prepare(self, case: Case, prompts: Int[np.ndarray, "B P"]) -> dict[str, Any]:
        """Get ready for a case, first generation included; what there is to tell about it."""
        ...

    def generate(self, case: Case, prompts: Int[np.ndarray, "B P"]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and commit steps, both [B, T]."""
        ...


class DjaxEngine:
    """djax through its public API."""

    def __init__(self, directory: Path) -> None:
        import djax

        self._model = djax.load(directory, dtype="float32")
        self._rates = Rates(in_xla)

    def matmul_gflops(self) -> float:
        """See `Engine`."""
        import jax
        import jax.numpy as jnp

        rows, inner, columns = MATMUL
        left, right = jnp.ones((rows, inner)), jnp.ones((columns, inner))
        product = jax.jit(lambda left, right: jnp.dot(left, right.T, precision="highest"))
        return gflops(lambda: product(left, right).block_until_ready(), 2 * rows * inner * columns, runs=LARGE_RUNS)

    def rates(self, products: tuple[Product, ...]) -> list[float]:
        """See `Engine`."""
        return self._rates(products)

    def prepare(self, case: Case, prompts: Int[np.ndarray, "B P"]) -> dict[str, Any]:
        """The first call compiles."""
        before, started = self._model.compile_count, time.perf_counter()
        self.generate(case, prompts)
        return {"first_call_seconds": time.perf_counter() - started,
                "programs": self._model.compile_count - before}

    def generate(self, case: Case, prompts: Int[np.ndarray, "B P"]) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`. Rows run to their full length: no EOS stops them."""
        from djax import recipes

        if case.cache == "vicinity":
            recipe = recipes.dinfer(threshold=case.threshold, smoothing=None, before=case.before, after=case.after,
                                    warmup=case.warmup)
        else:
            recipe = recipes.fast_dllm(threshold=case.threshold, cache="dual" if case.cache == "dual" else "none")
        got = self._model.generate(
            prompts.tolist(), recipe=recipe, max_new_tokens=case.max_new_tokens, block_length=case.block_length,
            stop_on_eos=False)
        shape = len(prompts), case.canvas_length
        # lengths are rounded up to buckets: what is outside a row's own canvas is padding
        return got.canvas[got.canvas_mask].reshape(shape), got.commit_step[got.canvas_mask].reshape(shape)


class TwinEngine:
    """transformers' model in an eager loop, see `benchmarks.decode.torch_twin`."""

    def __init__(self, directory: Path) -> None:
        from benchmarks.decode.torch_twin import TorchTwin
        from benchmarks.harness.report import cores

        self._twin = TorchTwin(directory, threads=cores())
        self._rates = Rates(in_torch)

    def matmul_gflops(self) -> float:
        """See `Engine`."""
        import torch

        rows, inner, columns = MATMUL
        left, right = torch.ones(rows, inner), torch.ones(columns, inner)
        return gflops(lambda: left @ right.T, 2 * rows * inner * columns, runs=LARGE_RUNS)

    def rates(self, products: tuple[Product, ...]) -> list[float]:
        """See `Engine`. The next generation finds the number of threads that the last one left."""
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(self._twin.threads)
        try:
            return self._rates(products)
        finally:
            torch.set_num_threads(threads)

    def prepare(self, case: Case, prompts: Int[np.ndarray, "B P"]) -> dict[str, Any]:
        """Chooses the fastest setting for each width that the case's forwards have."""
        started = time.perf_counter()
        widths = {case.canvas_length}
        if case.cache != "none":
            for start in range(case.prompt_length, case.canvas_length, case.block_length):
                end = min(start + case.block_length + case.after, case.canvas_length)
                widths.add(end - max(start - case.before, 0))
        tried = {width: self._twin.calibrate(case.batch, width) for width in sorted(widths)}
        calibration, started = time.perf_counter() - started, time.perf_counter()
        self.generate(case, prompts)
        return {
            "first_call_seconds": time.perf_counter() - started, "calibration_seconds": calibration,
            "settings_tried": {str(width): {str(setting): seconds for setting, seconds in settings.items()}
                               for width, settings in tried.items()},
            "settings": {str(width): str(self._twin.chosen[case.batch, width]) for width in tried}}

    def generate(self, case: Case, prompts: Int[np.ndarray, "B P"]) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`."""
        from benchmarks.decode.torch_twin import TwinRecipe

        window = {"none": None, "dual": (0, 0), "vicinity": (case.before, case.after)}[case.cache]
        recipe = TwinRecipe(threshold=case.threshold, window=window, warmup=case.warmup)
        trace = self._twin.generate(
            prompts, recipe, max_new_tokens=case.max_new_tokens, block_length=case.block_length)
        return trace.tokens, trace.commit_step


ENGINES: dict[str, type[DjaxEngine] | type[TwinEngine]] = {"djax": DjaxEngine, "twin": TwinEngine}


def serve(name: str, directory: Path, connection: Connection) -> None:
    """A worker's whole life: load, then answer (method, its arguments) until None comes."""
    # the benchmark is about CPUs: an accelerator on one side only would decide it
    os.environ["JAX_PLATFORMS"] = "cpu"
    started = time.perf_counter()
    engine: Engine = ENGINES[name](directory)
    loaded = time.perf_counter() - started
    connection.send({"load_seconds": loaded, "matmul_gflops": engine.matmul_gflops()})
    while (request := connection.recv()) is not None:
        method, *arguments = request
        if method != "generate":
            connection.send(getattr(engine, method)(*arguments))
            continue
        wall, processor = time.perf_counter(), time.process_time()
        tokens, commit_step = engine.generate(*arguments)
        connection.send(Run(time.perf_counter() - wall, time.process_time() - processor, tokens, commit_step))


class Worker:
    """A process that serves one engine."""

    def __init__(self, name: str, directory: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, directory, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.loaded: dict[str, Any] = self._receive()

    def prepare(self, case: Case, prompts: Int[np.ndarray, "B P"]) -> dict[str, Any]:
        """See `Engine.prepare`."""
        return self._ask("prepare", case, prompts)

    def run(self, case: Case, prompts: Int[np.ndarray, "B P"]) -> Run:
        """One timed generation."""
        return self._ask("generate", case, prompts)

    def rates(self, products: tuple[Product, ...]) -> list[float]:
        """See `Engine.rates`."""
        return self._ask("rates", products)

    def close(self) -> None:
        """Let the process end."""
        if self._process.is_alive():
            self._connection.send(None)
        self._process.join(timeout=30)

    def _ask(self, method: str, *arguments: Any) -> Any:
        self._connection.send((method, *arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"a worker ended with exit code {self._process.exitcode}; its error is printed above") from None
