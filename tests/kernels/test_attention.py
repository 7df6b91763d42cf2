"""Every implementation of `attention` against a NumPy loop, on one table of cases."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import attention, attention_choice
from kernels_pallas.attention import IMPLEMENTATIONS
from kernels_pallas.attention.pallas_mosaic_gpu import ROWS, Tiling, attention_mosaic_gpu, make_tiling
from kernels_pallas.attention.pallas_tpu import attention_pallas_tpu
from kernels_pallas.attention.xla import attention_xla
from kernels_pallas.testing.attention_cases import CASES, Case, operands, oracle
from tests.support.cover import in_turn

TOLERANCE = {"float32": 3e-6, "bfloat16": 1.5e-2}
SEED = 7
KEY_TILE = 64
XLA_NAMES = ["reference", "xla", None]
interprets_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10's interpreter of Mosaic GPU has no transposed wgmma operands")
run = jax.jit(attention, static_argnames=("implementation", "block_length"))


def supported_by(name: str, platform: str) -> list[Case]:
    """Cases that an implementation says it can compute."""
    return [case for case in CASES if IMPLEMENTATIONS[name].unsupported(
        platform, *operands(case, SEED)[0], operands(case, SEED)[1]["key_mask"], case.block_length) is None]


def key_limit(case: Case) -> np.ndarray | None:
    """First key that each query does not see, counted block by block."""
    if case.block_length is None:
        return None
    ends = range(case.block_origin - 100 * case.block_length, 10**4, case.block_length)
    return np.array([
        next(end for end in ends if end > (case.window_start or 0) + w) for w in range(case.window)], np.int32)


def assert_equals_the_loop(got: jax.Array, case: Case) -> None:
    arrays, keywords = operands(case, SEED)
    expected = oracle(*arrays, **keywords)
    assert got.shape == expected.shape
    assert got.dtype == jnp.dtype(case.dtype)
    scale = max(1.0, np.abs(expected).max())
    # a score's rounding error is a relative one of the weight
    tolerance = TOLERANCE[case.dtype] * max(1.0, case.scale**2 / 30)
    np.testing.assert_allclose(
        np.asarray(got, np.float64) / scale, expected / scale, atol=tolerance, rtol=0, err_msg=f"seed {SEED}")


@in_turn(CASES, XLA_NAMES)
def test_equals_the_loop(case: Case, implementation: str | None) -> None:
    arrays, keywords = operands(case, SEED)
    assert_equals_the_loop(run(*arrays, **keywords, implementation=implementation), case)


def interpreted(case: Case, tiling: Tiling) -> jax.Array:
    """The Mosaic GPU kernel on the host."""
    arrays, keywords = operands(case, SEED)
    kernel = functools.partial(attention_mosaic_gpu, tiling=tiling, interpret=True)
    return jax.jit(kernel)(*arrays, keywords["key_mask"], key_limit(case))


def small_tiling(case: Case, *, blocks: int) -> Tiling:
    (query, key, _), _ = operands(case, SEED)
    return make_tiling(query, key, key_tile=KEY_TILE, stages=2, blocks=blocks, max_splits=8)


@interprets_mosaic
@pytest.mark.parametrize("case", supported_by("mosaic_gpu", "gpu"), ids=lambda case: case.name)
@pytest.mark.parametrize("blocks", [1, 10**6], ids=["one_split", "splits"])
def test_mosaic_equals_the_loop(case: Case, blocks: int) -> None:
    tiling = small_tiling(case, blocks=blocks)
    assert tiling.splits == (1 if blocks == 1 else tiling.key_tiles)
    assert_equals_the_loop(interpreted(case, tiling), case)


@pytest.mark.parametrize("case", supported_by("pallas_tpu", "tpu"), ids=lambda case: case.name)
def test_tpu_equals_the_loop(case: Case) -> None:
    arrays, keywords = operands(case, SEED)
    kernel = functools.partial(attention_pallas_tpu, interpret=True)
    assert_equals_the_loop(jax.jit(kernel)(*arrays, keywords["key_mask"], None), case)


def test_kernels_run_the_cases_that_are_theirs() -> None:
    names = {case.name for case in supported_by("mosaic_gpu", "gpu")}
    assert {"tile", "part_of_a_tile", "grouped_heads_in_a_tile", "blocks_in_a_tile", "rows_of_a_tile"} <= names
    assert len(supported_by("pallas_tpu", "tpu")) == 2


@pytest.mark.parametrize("implementation", XLA_NAMES, ids=str)
def test_keys_outside_the_mask_may_be_anything(implementation: str | None) -> None:
    case = Case(name="poisoned", window=6, length=21, mask="left_padding")
    (query, key, value), keywords = operands(case, SEED)
    clean = run(query, key, value, **keywords, implementation=implementation)
    outside = ~keywords["key_mask"][..., None, None]
    for poison in (np.nan, np.inf):
        got = run(query, jnp.where(outside, poison, key), value, **keywords, implementation=implementation)
        np.testing.assert_array_equal(got, clean)


@interprets_mosaic
def test_mosaic_keys_outside_the_mask_may_be_anything() -> None:
    case = next(case for case in CASES if case.name == "tile")
    (query, key, value), keywords = operands(case, SEED)
    kernel = jax.jit(functools.partial(attention_mosaic_gpu, tiling=small_tiling(case, blocks=1), interpret=True))
    mask = keywords["key_mask"]
    poisoned = jnp.where(mask[..., None, None], key, jnp.nan)
    np.testing.assert_array_equal(kernel(query, poisoned, value, mask, None), kernel(query, key, value, mask, None))


@pytest.mark.parametrize("implementation", XLA_NAMES, ids=str)
def test_a_bad_query_stays_in_its_row(implementation: str | None) -> None:
    (query, key, value), keywords = operands(Case(name="poisoned", window=6, length=21), SEED)
    clean = np.array(run(query, key, value, **keywords, implementation=implementation))
    got = np.array(run(jnp.asarray(query).at[1, 2].set(jnp.nan), key, value, **keywords, implementation=implementation))
    assert np.isnan(got[1, 2]).all()
    got[1, 2] = clean[1, 2]
    np.testing.assert_array_equal(got, clean)


GRADIENT_CASES = [
    Case(name="grouped", window=5, length=9, heads=4, mask="empty_row"),
    Case(name="each_query", window=5, length=9, mask="each_query"),
    Case(name="blocks", window=5, length=9, block_length=3, window_start=2),
]


def assert_gradients_are_slopes(function: Any, arrays: Any, keywords: dict[str, Any], *, tolerance: float) -> None:
    """The gradient along a random direction against the loop's central difference."""
    rng = np.random.default_rng(SEED)
    cotangent = rng.normal(size=arrays[0].shape)
    loss = lambda *arrays: jnp.sum(function(*arrays).astype(jnp.float32) * cotangent)  # noqa: E731
    for index, gradient in enumerate(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)):
        direction = rng.normal(size=gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = [np.asarray(array, np.float64) for array in arrays]
            moved[index] = moved[index] + sign * 1e-5 * direction
            ends.append(np.sum(oracle(*moved, **keywords) * cotangent))
        slope = (ends[0] - ends[1]) / 2e-5
        got = np.sum(np.asarray(gradient, np.float64) * direction)
        assert abs(got - slope) < tolerance * max(1, abs(slope)), (index, got, slope)


@in_turn(GRADIENT_CASES, XLA_NAMES)
def test_gradients_are_the_loops_slopes(case: Case, implementation: str | None) -> None:
    arrays, keywords = operands(case, SEED)
    assert_gradients_are_slopes(
        functools.partial(attention, **keywords, implementation=implementation), arrays, keywords, tolerance=1e-4)


@interprets_mosaic
def test_mosaic_has_the_gradient_of_xla() -> None:
    case = next(case for case in CASES if case.name == "tiles_of_grouped_heads")
    arrays, keywords = operands(case, SEED)
    kernel = functools.partial(attention_mosaic_gpu, tiling=small_tiling(case, blocks=1), interpret=True)
    rest = keywords["key_mask"], key_limit(case)

    def gradients(function: Any) -> Any:
        loss = lambda *arrays: jnp.sum(jnp.sin(function(*arrays, *rest).astype(jnp.float32)))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    for got, expected in zip(gradients(kernel), gradients(attention_xla), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=3e-2)
        assert np.abs(np.asarray(expected, np.float32)).max() > 0.1


def test_the_window_may_be_anywhere_without_compiling_again() -> None:
    case = Case(name="moved", window=4, length=20, block_length=4)
    arrays, keywords = operands(case, SEED)
    moved = jax.jit(lambda start: attention(*arrays, **(keywords | {"window_start": start})))
    for start in (0, 3, 16):
        np.testing.assert_allclose(
            moved(start), oracle(*arrays, **(keywords | {"window_start": start})), atol=3e-6, err_msg=f"seed {SEED}")
    assert moved._cache_size() == 1


def shapes(
    *, batch: int = 1, window: int, length: int, heads: int = 16, groups: int = 16, width: int = 128,
    dtype: str = "bfloat16",
) -> tuple[tuple[Any, Any, Any], jax.ShapeDtypeStruct]:
    query = jax.ShapeDtypeStruct((batch, window, heads, width), dtype)
    key = jax.ShapeDtypeStruct((batch, length, groups, width), dtype)
    return (query, key, key), jax.ShapeDtypeStruct((batch, length), bool)


def choice(platform: str, *, implementation: str | None = None, block_length: int | None = None, **of: Any) -> str:
    arrays, mask = shapes(**of)
    return attention_choice(
        *arrays, key_mask=mask, platform=platform, implementation=implementation, block_length=block_length,
        window_start=None if block_length is None else 0)


def test_the_choice_can_be_asked() -> None:
    assert choice("cpu", window=96, length=1200) == "xla"
    assert choice("gpu", window=96, length=1200) == "mosaic_gpu"
    assert choice("gpu", window=96, length=1200, block_length=32) == "mosaic_gpu"
    assert choice("gpu", window=1200, length=1200) in ("cudnn", "mosaic_gpu")  # as cuDNN is installed or not
    assert choice("gpu", batch=32, window=4096, length=4096) == "mosaic_gpu"  # cuDNN's mask would be a gigabyte
    assert choice("gpu", window=1201, length=1201) == "mosaic_gpu"  # cuDNN's gradient takes even lengths
    (query, key, value), _ = shapes(window=1200, length=1200)
    each_query = jax.ShapeDtypeStruct((1, 1200, 1200), bool)
    assert attention_choice(query, key, value, key_mask=each_query, platform="gpu") in ("cudnn", "xla")
    assert choice("gpu", window=96, length=1200, dtype="float32") == "xla"
    assert choice("tpu", window=96, length=1280) == "xla"
    assert choice("tpu", window=1280, length=1280) == "pallas_tpu"
    assert choice("tpu", window=1200, length=1200) == "xla"
    assert choice("cpu", window=96, length=1200, implementation="reference") == "reference"


@pytest.mark.parametrize(("platform", "name", "of", "why"), [
    ("cpu", "mosaic_gpu", {}, "needs a Hopper GPU, got cpu"),
    ("gpu", "mosaic_gpu", {"dtype": "float32"}, "takes bfloat16 or float16, got float32"),
    ("gpu", "mosaic_gpu", {"width": 96}, "64 or 128 wide, got 96"),
    ("cpu", "cudnn", {}, "needs an NVIDIA GPU, got cpu"),
    ("gpu", "cudnn", {"dtype": "float32"}, "takes bfloat16 or float16, got float32"),
    ("gpu", "cudnn", {"width": 256}, "multiple of 8 up to 128, got 256"),
    ("gpu", "cudnn", {"length": 1201}, "even lengths, got 96 queries and 1201 keys"),
    ("gpu", "pallas_tpu", {}, "needs a TPU, got gpu"),
    ("tpu", "pallas_tpu", {"length": 1200}, "multiple of 128, got 1200"),
    ("tpu", "pallas_tpu", {"groups": 4}, "grouped heads"),
    ("tpu", "pallas_tpu", {"block_length": 32}, "no block_length"),
])
def test_what_is_not_supported_says_why(platform: str, name: str, of: dict[str, Any], why: str) -> None:
    with pytest.raises(NotImplementedError, match=why):
        choice(platform, implementation=name, **({"window": 96, "length": 1280} | of))


def test_what_does_not_fit_is_refused() -> None:
    (query, key, value), keywords = operands(Case(name="refused", window=5, length=17, heads=4), SEED)
    mask = keywords["key_mask"]
    with pytest.raises(ValueError, match=r"'fast'; attention has 'reference', 'xla', 'cudnn', 'mosaic_gpu', 'pallas_"):
        attention(query, key, value, key_mask=mask, implementation="fast")
    with pytest.raises(ValueError, match=r"\[B, W, H, K\]"):
        attention(query[0], key, value, key_mask=mask)
    with pytest.raises(ValueError, match="G a divisor of 3"):
        attention(query[:, :, :3], key, value, key_mask=mask)
    with pytest.raises(ValueError, match="value: got shape"):
        attention(query, key, value[:, 1:], key_mask=mask)
    with pytest.raises(ValueError, match=r"key_mask: got bool \(2, 16\); it must be bool \(2, 17\), or \(2, 5, 17\)"):
        attention(query, key, value, key_mask=mask[:, 1:])
    with pytest.raises(ValueError, match="key_mask: got float32"):
        attention(query, key, value, key_mask=mask.astype(jnp.float32))
    with pytest.raises(ValueError, match="window_start: block_length needs it"):
        attention(query, key, value, key_mask=mask, block_length=4)
    with pytest.raises(ValueError, match="block_length, which is None"):
        attention(query, key, value, key_mask=mask, window_start=4)
    with pytest.raises(ValueError, match="block_length: got 0"):
        attention(query, key, value, key_mask=mask, window_start=4, block_length=0)


def test_a_plan_covers_the_window_and_fills_the_gpu_once() -> None:
    for batch, window, length, heads, groups in (
            (1, 96, 1200, 16, 16), (1, 32, 4096, 16, 16), (8, 96, 1200, 16, 16), (1, 96, 1200, 32, 8),
            (1, 1, 1, 16, 1), (2, 33, 512, 20, 4), (1, 4096, 4096, 16, 16)):
        (query, key, _), _ = shapes(batch=batch, window=window, length=length, heads=heads, groups=groups)
        tiling = make_tiling(query, key, key_tile=64, stages=2, blocks=132, max_splits=16)
        assert tiling.fold * tiling.queries == ROWS
        assert heads // groups % tiling.fold == 0
        assert 0 <= tiling.query_tiles * tiling.queries - window < tiling.queries
        assert 0 <= tiling.key_tiles * tiling.key_tile - length < tiling.key_tile
        blocks = batch * heads // tiling.fold * tiling.query_tiles
        assert tiling.splits == 1 or blocks * tiling.splits <= 132
        assert 1 <= tiling.splits <= tiling.key_tiles
