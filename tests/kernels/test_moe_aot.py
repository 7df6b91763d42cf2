"""`moe` at full size, compiled ahead of time for the devices it is meant for: nothing runs here."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from djax.plan import topology
from kernels_pallas import QuantizedExperts, moe, moe_choice, moe_quantized, top_k_route

EXPERTS, WIDTH, MODEL, SLOTS = 64, 1024, 2048, 8
MATRIX = EXPERTS * WIDTH * MODEL
"""Numbers in one of gate, up and down."""


def needs(name: str) -> pytest.MarkDecorator:
    reason = topology.missing_compiler(name)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def shaped(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def experts(dtype: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Gate, up and down, and their scales if they have 8 bits."""
    wide, narrow = (EXPERTS, WIDTH, MODEL), (EXPERTS, MODEL, WIDTH)
    matrices = tuple(shaped(*shape, dtype=dtype) for shape in (wide, wide, narrow))
    scales = tuple(shaped(*shape[:2], dtype=jnp.float32) for shape in (wide, wide, narrow))
    return matrices if dtype == "bfloat16" else (*matrices, *scales)


def block(x: Any, router: Any, *matrices: Any) -> Any:
    """The model's block: router, choice, experts."""
    logits = jnp.einsum("md,ed->me", x, router, preferred_element_type=jnp.float32)
    ids, weights = top_k_route(logits, experts_per_token=SLOTS)
    if len(matrices) == 3:
        return moe(x, ids, weights, *matrices)
    return moe_quantized(x, ids, weights, QuantizedExperts(*matrices))


def operands(rows: int, dtype: str = "bfloat16") -> tuple[jax.ShapeDtypeStruct, ...]:
    return shaped(rows, MODEL), shaped(EXPERTS, MODEL), *experts(dtype)


def kernels(text: str) -> list[str]:
    """What a compiled GPU program launches, one entry each, by the names of its instructions."""
    launched = []
    for computation in re.split(r"\n\n", text):
        if not re.match(r"\s*(ENTRY|%?command_buffer)", computation):
            continue
        for line in computation.splitlines()[1:]:
            found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*?[\])}] ([a-z\-]+)\(", line)
            if found and found[2] not in ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "call"):
                launched.append(found[1])
    return launched


@needs("h200:1")
@pytest.mark.parametrize(("rows", "dtype"), [
    (96, "bfloat16"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (1, "bfloat16"), (96, "int8"), (96, "float8_e4m3fn")))])
def test_a_decoding_step_is_few_kernels_and_copies_no_weights(rows: int, dtype: str) -> None:
    compiled = topology.compile_for(topology.devices("h200:1")[0], block, operands(rows, dtype))
    launched = kernels(compiled.as_text())
    assert len(launched) <= 9, launched
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 6
    # spread rows, hidden units and outputs in blocks of at most 32 rows: no matrix, and no [E, M, F] in float32
    blocks = rows * SLOTS // 32 + EXPERTS
    assert compiled.memory_analysis().temp_size_in_bytes < blocks * 32 * (2 * MODEL + WIDTH) * 2 + 2**20


@needs("h200:1")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_a_refresh_compiles_within_bounds(dtype: str) -> None:
    rows = 4096
    compiled = topology.compile_for(topology.devices("h200:1")[0], block, operands(rows, dtype))
    blocks = rows * SLOTS // 128 + EXPERTS
    assert compiled.memory_analysis().temp_size_in_bytes < blocks * 128 * (2 * MODEL + WIDTH) * 2 + 2**25
    assert len(kernels(compiled.as_text())) <= 16


_RESOURCES = """
from djax.plan import topology
from tests.kernels.test_moe_aot import block, operands
for dtype in ("bfloat16", "int8", "float8_e4m3fn"):
    topology.compile_for(topology.devices("h200:1")[0], block, operands({rows}, dtype))
"""


@needs("h200:1")
@pytest.mark.slow
@pytest.mark.parametrize(("rows", "kilobytes"), [(96, 113), (4096, 227)])
def test_no_kernel_spills_and_decoding_leaves_room_for_two(
    rows: int, kilobytes: int, tmp_path: pathlib.Path
) -> None:
    """In a process of its own: the dump is asked for before Mosaic starts."""
    variables = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": str(tmp_path), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _RESOURCES.format(rows=rows)], capture_output=True, text=True, check=False,
        cwd=pathlib.Path(__file__).parents[2], env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    reports = [path.read_text() for path in tmp_path.glob("moe_*.ptxas")]
    assert len(reports) >= 15, "a report for each kernel"
    for report in reports:
        assert "0 bytes spill stores, 0 bytes spill loads" in report, report
        assert "serializ" not in report, report
    for path in tmp_path.glob("moe_*.resources.txt"):
        found = re.search(r"smem_scratch_bytes=(\d+)", path.read_text())
        assert found is not None
        assert int(found[1]) <= kilobytes * 1024, path.name


@needs("h200:8")
@pytest.mark.parametrize("split", ["experts", pytest.param("ffn", marks=pytest.mark.slow)])
def test_eight_gpus_share_the_experts(split: str) -> None:
    """Each computes its part in the kernels; what crosses the devices is one sum of the rows."""
    gpus = topology.devices("h200:8")
    mesh = Mesh(np.array(gpus), ("tensor",), axis_types=(AxisType.Auto,))
    whole, part = PartitionSpec(), PartitionSpec("tensor")
    wide = part if split == "experts" else PartitionSpec(None, "tensor")
    narrow = part if split == "experts" else PartitionSpec(None, None, "tensor")

    def share(x: Any, ids: Any, weights: Any, gate: Any, up: Any, down: Any) -> Any:
        first = jax.lax.axis_index("tensor") * len(gate) if split == "experts" else 0
        return jax.lax.psum(moe(x, ids - first, weights, gate, up, down), "tensor")

    specs = (whole, whole, whole, wide, wide, narrow)
    arrays = (shaped(96, MODEL), shaped(96, SLOTS, dtype=jnp.int32), shaped(96, SLOTS, dtype=jnp.float32))
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, s))
              for a, s in zip((*arrays, *experts("bfloat16")), specs, strict=True)]
    with jax.default_device(gpus[0]):
        compiled = jax.jit(jax.shard_map(
            share, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False)).lower(*placed).compile()
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 5
    assert len(re.findall(r" all-reduce(?:-start)?\(", compiled.as_text())) == 1
    assert not re.search(r" all-(gather|to-all)", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < 2**25


@needs("v5e:2x4")
@pytest.mark.parametrize(("rows", "expected"), [
    pytest.param(96, "xla_dense", marks=pytest.mark.slow), (2048, "pallas_tpu")])
def test_a_tpu_takes_it(rows: int, expected: str) -> None:
    device = topology.devices("v5e:2x4")[0]
    arrays = (shaped(rows, MODEL), shaped(rows, SLOTS, dtype=jnp.int32), shaped(rows, SLOTS, dtype=jnp.float32))
    arrays = (*arrays, *experts("bfloat16"))
    with jax.default_device(device):
        assert moe_choice(*arrays) == expected
    compiled = topology.compile_for(device, moe, arrays)
    # the routed rows' inputs, hidden units and outputs in float32; weights as they lie
    bound = rows * SLOTS * (2 * MODEL + 2 * WIDTH) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < min(bound + 2**24, 2 * MATRIX)
    assert ("tpu_custom_call" in compiled.as_text()) == (expected == "pallas_tpu")


@needs("v5e:2x4")
@pytest.mark.slow
def test_a_tpu_kernel_takes_few_rows_too() -> None:
    arrays = (shaped(96, MODEL), shaped(96, SLOTS, dtype=jnp.int32), shaped(96, SLOTS, dtype=jnp.float32))
    compiled = topology.compile_for(
        topology.devices("v5e:2x4")[0], partial(moe, implementation="pallas_tpu"), (*arrays, *experts("bfloat16")))
    assert compiled.memory_analysis().temp_size_in_bytes < 2**24
