"""The kernels of `unembed`: interpreted on a table of cases, and compiled for the GPU and the TPU at full size."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from djax.plan import topology
from kernels_pallas import unembed
from kernels_pallas.testing.unembed_cases import CASES, PLAIN, Case, operands, oracle
from kernels_pallas.testing.unembed_check import check, jitted
from kernels_pallas.unembed import pallas_mosaic_gpu
from kernels_pallas.unembed.pallas_mosaic_gpu import make_tiling, unembed_mosaic_gpu
from kernels_pallas.unembed.pallas_tpu import unembed_pallas_tpu
from tests.support.cover import every_second

SEED = 7
VOCABULARY, WIDTH = 157184, 2048
OLD_JAX = jax.__version_info__ < (0, 11)

needs_interpreter = pytest.mark.skipif(
    OLD_JAX, reason="the kernel needs jax 0.11: plgpu.load without an index, layout_cast interpreted")
no_expected = partial(dataclasses.replace, expected=0)

MOSAIC_CASES = (*(no_expected(case, dtype="bfloat16") for case in CASES if case.name in (
    "everything", "ties_inside_a_tile", "ties_across_tiles", "runner_up_in_another_tile", "argmax_forbidden", "limited",
    "limited_to_none", "cold", "hot", "large_logits", "nan_row", "infinite_rows", "nan_at_a_forbidden_id",
    "later_ids")),
    Case(name="one_row", rows=1, bare=True, dtype="bfloat16", **PLAIN),
    Case(name="two_row_tiles", rows=150, dtype="bfloat16", **PLAIN | {"temperature": 0.7}),
    Case(name="seventy_rows_of_three_columns", rows=70, model=192, dtype="bfloat16", expected=0),
    Case(name="one_tile", vocabulary=128, dtype="bfloat16", expected=0),
)


def _mosaic(call: Any) -> Any:
    rows, vocabulary = call.hidden.shape[0], call.head.shape[0]
    tiling = make_tiling(rows, vocabulary, ids=64, stages=2, blocks=2, slice=32)
    return unembed_mosaic_gpu(call, tiling=tiling, interpret=True)


MOSAIC = jitted(_mosaic)
TPU = jitted(partial(unembed_pallas_tpu, rows=64, ids=128, interpret=True))


@needs_interpreter
@pytest.mark.parametrize("case", MOSAIC_CASES, ids=lambda case: case.name)
def test_the_gpu_kernel_equals_the_oracle(case: Case) -> None:
    arrays, options = operands(case, SEED)
    check(MOSAIC(*arrays, **options), oracle(*arrays, **options), case.dtype)


@needs_interpreter
def test_the_gpu_kernel_has_no_races(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring of stages wraps around several times within a tile and goes on into the next one."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params

    watching = params.InterpretGPUParams(detect_races=True)
    monkeypatch.setattr(pallas_mosaic_gpu, "gpu_interpreter", lambda interpret: watching)
    case = Case(name="races", rows=70, model=192, dtype="bfloat16", expected=0)
    arrays, options = operands(case, SEED)
    check(jitted(_mosaic)(*arrays, **options), oracle(*arrays, **options), case.dtype)
    assert not gpu_callbacks.get_races().races_found


def test_the_plan_covers_the_vocabulary_and_the_rows() -> None:
    for rows in (1, 64, 65, 96, 128, 129, 2048, 10**5):
        for vocabulary in (256, 257, 19648, 157184):
            tiling = make_tiling(rows, vocabulary, ids=128, stages=3, blocks=132, slice=16)
            assert tiling.rows * (tiling.row_tiles - 1) < rows <= tiling.rows * tiling.row_tiles
            assert 256 * (tiling.tiles - 1) < vocabulary <= 256 * tiling.tiles
            assert 1 <= tiling.groups <= tiling.tiles
            assert tiling.groups * tiling.row_tiles <= max(132, tiling.row_tiles)
            assert rows > 128 or tiling.row_tiles == 1, "the head is read from memory once"


@every_second([no_expected(case) for case in CASES])
def test_the_tpu_kernel_equals_the_oracle(case: Case) -> None:
    arrays, options = operands(case, SEED)
    check(TPU(*arrays, **options), oracle(*arrays, **options), case.dtype)


def _compiled(device: str, rows: int, **asked: Any) -> Any:
    """The op at LLaDA-MoE's size. `asked`: `draw`, `expected`, `second`, `entropy`."""
    reason = topology.missing_compiler(device)
    if reason:
        pytest.skip(reason)
    shape = jax.ShapeDtypeStruct
    options = {name: shape(sizes, jnp.int32) for name, sizes in (
        ("at", (rows, 1)), ("forbidden", (3,)), ("vocab_limit", ()))}
    if asked.pop("draw", False):
        options |= {"temperature": shape((), jnp.float32), "noise_keys": shape((rows, 2), jnp.uint32)}
    if asked.pop("expected", False):
        options["embedding"] = shape((VOCABULARY, WIDTH // 2), jnp.bfloat16)  # not to be taken for the head
    operands = shape((rows, WIDTH), jnp.bfloat16), shape((VOCABULARY, WIDTH), jnp.bfloat16), options
    return topology.compile_for(
        topology.devices(device)[0],
        lambda hidden, head, options: unembed(hidden, head, **options, **asked), operands)


def _copies_of_the_head(program: str) -> list[str]:
    """Instructions outside of fusions that make an array with thousands of the head's rows."""
    big = re.compile(r"= bf16\[(\d+),2048\]\S* (?!parameter|get-tuple-element|bitcast)")
    bodies = [part for part in program.split("\n\n") if "fused_computation" not in part.split("(")[0]
              and "fusion" not in part.split("(")[0]]
    return [line for body in bodies for line in body.splitlines() if (hit := big.search(line)) and int(hit[1]) > 4096]


@pytest.mark.skipif(OLD_JAX, reason="the kernel needs jax 0.11")
@pytest.mark.parametrize(("rows", "asked"), [
    (64, {"draw": True, "second": True, "entropy": True}), (96, {}),
    *(pytest.param(rows, {}, marks=pytest.mark.slow) for rows in (32, 128, 2048))])
def test_the_gpu_kernel_keeps_no_logits(rows: int, asked: dict[str, Any]) -> None:
    compiled = _compiled("h200:1", rows, **asked)
    program = compiled.as_text()
    assert program.count('custom_call_target="mosaic_gpu_v2"') == 1
    assert not _copies_of_the_head(program)
    assert str(VOCABULARY) not in re.sub(rf"{VOCABULARY},{WIDTH}\]", "", program.split("ENTRY")[1])
    assert compiled.memory_analysis().temp_size_in_bytes < 3e6
    # the kernel, one reduction over its blocks, what ends it, and the gather of `at`
    entry = program.split("ENTRY")[1]
    assert len(re.findall(r" fusion\(| custom-call\(", entry)) <= 9


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "megabytes"), [(64, 60), (2048, 250)])
def test_expected_embeddings_on_a_gpu_copy_no_head_and_keep_a_chunk(rows: int, megabytes: int) -> None:
    compiled = _compiled("h200:1", rows, expected=True)
    assert not _copies_of_the_head(compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < megabytes * 1e6


@pytest.mark.parametrize(("rows", "asked"), [
    (64, {"draw": True, "second": True, "entropy": True}),
    *(pytest.param(rows, {}, marks=pytest.mark.slow) for rows in (32, 96, 128, 2048))])
def test_the_tpu_kernel_keeps_no_logits(rows: int, asked: dict[str, Any]) -> None:
    compiled = _compiled("v5e:2x4", rows, **asked)
    assert "tpu_custom_call" in compiled.as_text()
    assert not _copies_of_the_head(compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < 3e6


@pytest.mark.slow
def test_expected_embeddings_on_a_tpu_copy_nothing() -> None:
    compiled = _compiled("v5e:2x4", 64, expected=True)
    assert not _copies_of_the_head(compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < 20e6
