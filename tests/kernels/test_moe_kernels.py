"""The kernels of `moe` for GPUs and TPUs, interpreted on a CPU, against the float64 loop; and experts in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import QuantizedExperts, dequantize_experts, moe_quantized, moe_quantized_choice, quantize_experts
from kernels_pallas.moe.pallas_mosaic_gpu import moe_mosaic_gpu, moe_quantized_mosaic_gpu, regime
from kernels_pallas.moe.pallas_tpu import moe_pallas_tpu
from kernels_pallas.moe.quantized import DTYPES
from kernels_pallas.moe.xla_grouped import moe_xla_grouped
from kernels_pallas.testing.moe_cases import BLOCKS, KERNEL_CASES, Case, operands, oracle

SEED = 7
TOLERANCE = {"bfloat16": 1.5e-2, "float32": 2e-6}
needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.10 does not interpret a transposed reference of Mosaic GPU")
MOSAIC = pytest.param(jax.jit(partial(moe_mosaic_gpu, interpret=True)), id="mosaic_gpu", marks=needs_interpreter)
TPU = pytest.param(jax.jit(partial(moe_pallas_tpu, interpret=True)), id="pallas_tpu")
quantized_mosaic = jax.jit(partial(moe_quantized_mosaic_gpu, interpret=True))


def error(got: Any, expected: np.ndarray) -> float:
    """Largest difference, in units of the largest number."""
    return float(np.abs(np.asarray(got, np.float64) - expected).max() / max(1.0, np.abs(expected).max()))


def check(function: Callable[..., Any], case: Case) -> None:
    arguments = operands(case, SEED)
    got = function(*arguments)
    assert got.shape == arguments[0].shape
    assert got.dtype == jnp.dtype(case.dtype)
    assert error(got, oracle(*arguments)) < TOLERANCE[case.dtype], f"seed {SEED}"


@pytest.mark.parametrize("function", [MOSAIC, TPU])
@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.name == "wide" else []) for case in KERNEL_CASES])
def test_equals_the_loop(case: Case, function: Callable[..., Any]) -> None:
    check(function, case)


@needs_interpreter
def test_a_width_of_64_will_do_on_a_gpu() -> None:
    check(jax.jit(partial(moe_mosaic_gpu, interpret=True)), Case(
        name="narrow", rows=9, slots=2, **(BLOCKS | {"width": 192})))


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 100, 300, 900])
def test_every_regime_equals_the_loop(rows: int) -> None:
    case = Case(name="regime", rows=rows, slots=2, experts=16, width=128, model=256, dtype="bfloat16")
    check(jax.jit(partial(moe_mosaic_gpu, interpret=True)), case)


def test_the_regime_goes_by_an_experts_share() -> None:
    assert [regime(rows, 8, 64) for rows in (1, 32, 96, 160, 320, 512, 8192)] == [
        "few_rows", "few_rows", "decode", "decode", "batch", "refresh", "refresh"]
    assert regime(96, 8, 8) == "decode"  # an eighth of 64 experts: as many of its rows select none


def test_tpu_kernels_take_float32() -> None:
    check(jax.jit(partial(moe_pallas_tpu, interpret=True)), Case(
        name="float32", rows=21, slots=2, **(BLOCKS | {"dtype": "float32"})))


@pytest.mark.parametrize("function", [MOSAIC, TPU])
def test_a_bad_row_stays_in_its_row(function: Callable[..., Any]) -> None:
    x, ids, weights, *matrices = operands(Case(name="bad", rows=21, slots=2, **BLOCKS), SEED)
    clean = np.asarray(function(x, ids, weights, *matrices), np.float32)
    for got in (function(x.at[5].set(jnp.nan), ids, weights, *matrices),
                function(x, ids, weights.at[5, 1].set(jnp.nan), *matrices)):
        assert np.isnan(np.asarray(got[5], np.float32)).all()
        np.testing.assert_array_equal(np.delete(np.asarray(got, np.float32), 5, axis=0), np.delete(clean, 5, axis=0))


@pytest.mark.parametrize("function", [MOSAIC, TPU])
def test_an_expert_that_no_row_chose_is_not_seen(function: Callable[..., Any]) -> None:
    case = Case(name="unseen", rows=21, slots=2, routing="first_two", **BLOCKS)
    x, ids, weights, gate, up, down = operands(case, SEED)
    clean = function(x, ids, weights, gate, up, down)
    got = function(x, ids, weights, gate.at[3].set(jnp.inf), up.at[2].set(jnp.nan), down.at[3].set(jnp.nan))
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(clean, np.float32))


@pytest.mark.parametrize("function", [MOSAIC, TPU])
def test_the_gradient_is_that_of_xla(function: Callable[..., Any]) -> None:
    x, ids, weights, *matrices = operands(Case(name="slope", rows=9, slots=2, **BLOCKS), SEED)

    def loss(function: Callable[..., Any], *variables: jax.Array) -> jax.Array:
        x, weights, *matrices = variables
        return jnp.sum(function(x, ids, weights, *matrices).astype(jnp.float32) ** 2)

    variables = (x, weights, *matrices)
    got = jax.jit(jax.grad(partial(loss, function), argnums=tuple(range(5))))(*variables)
    expected = jax.jit(jax.grad(partial(loss, moe_xla_grouped), argnums=tuple(range(5))))(*variables)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert error(mine, np.asarray(theirs, np.float64)) < 3e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bits_are_rounded_to_nearest(dtype: str) -> None:
    *_, gate, up, down = operands(Case(name="rounded", rows=1, slots=1), SEED)
    gate = gate.at[1, 2].set(0.0)
    experts = quantize_experts(gate, up, down, dtype=dtype)
    for exact, got, scale in zip(
            (gate, up, down), dequantize_experts(experts, dtype=jnp.float32), experts[3:], strict=True):
        largest = np.abs(exact).max(axis=-1, keepdims=True)
        # half a step: one of 127 equal ones, or one of 8 to a power of two
        bound = largest / 254 if dtype == "int8" else np.maximum(np.abs(exact) / 16, largest / 448 / 2**10)
        assert (np.abs(got - exact) <= bound * (1 + 1e-5)).all()
        assert scale.dtype == jnp.float32
        np.testing.assert_allclose(np.abs(got).max(axis=-1, keepdims=True), largest, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["reference", "xla_dense", None])
@pytest.mark.parametrize("routing", ["top_k", "out_of_range"])
def test_experts_in_8_bits_equal_the_loop(dtype: str, implementation: str | None, routing: str) -> None:
    x, ids, weights, *matrices = operands(Case(name="8_bits", rows=21, slots=3, routing=routing), SEED)
    experts = quantize_experts(*matrices, dtype=dtype)
    expected = oracle(x, ids, weights, *dequantize_experts(experts, dtype=jnp.float32))
    got = jax.jit(partial(moe_quantized, implementation=implementation))(x, ids, weights, experts)
    assert error(got, expected) < TOLERANCE["float32"]


@needs_interpreter
@pytest.mark.parametrize(("dtype", "routing"), [("int8", "uneven"), ("float8_e4m3fn", "out_of_range")])
def test_kernels_of_8_bits_equal_the_loop(dtype: str, routing: str) -> None:
    case = Case(name="8_bits", rows=21, slots=3, routing=routing, **(BLOCKS | {"model": 256}))
    x, ids, weights, *matrices = operands(case, SEED)
    experts = quantize_experts(*matrices, dtype=dtype)
    expected = oracle(x, ids, weights, *dequantize_experts(experts, dtype=jnp.float32))
    assert error(quantized_mosaic(x, ids, weights, experts), expected) < TOLERANCE["bfloat16"]


def test_what_8_bits_refuse() -> None:
    x, ids, weights, gate, up, down = operands(Case(name="refused", rows=8, slots=2), SEED)
    with pytest.raises(ValueError, match="dtype: got int4; it must be one of int8, float8_e4m3fn"):
        quantize_experts(gate, up, down, dtype=jnp.int4)
    experts = quantize_experts(gate, up, down, dtype=jnp.int8)
    with pytest.raises(ValueError, match="experts: got dtypes float32, int8, int8"):
        moe_quantized(x, ids, weights, experts._replace(gate=gate))
    with pytest.raises(ValueError, match=r"down_scale: got float32 \(6, 12\); it must be float32 \(6, 20\)"):
        moe_quantized(x, ids, weights, experts._replace(down_scale=experts.up_scale))
    with pytest.raises(NotImplementedError, match="it needs a Hopper GPU, got cpu"):
        moe_quantized(x, ids, weights, experts, implementation="mosaic_gpu")
    assert moe_quantized_choice(x, ids, weights, experts, platform="gpu") == "xla_dense"
    shapes = jax.eval_shape(lambda: operands(Case(name="asked", rows=8, slots=2, **BLOCKS), SEED))
    experts = jax.eval_shape(partial(quantize_experts, dtype=jnp.int8), *shapes[3:])
    assert isinstance(experts, QuantizedExperts)
    expected = "mosaic_gpu" if jax.__version_info__ >= (0, 11) else "xla_dense"
    assert moe_quantized_choice(*shapes[:3], experts, platform="gpu") == expected
