"""The router's choice against NumPy, and the plan of blocks against a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import top_k_route, top_k_route_choice
from kernels_pallas.moe.router import top_k_by_maxima, top_k_mosaic_gpu
from kernels_pallas.moe.routing import ALL_PAIRS, group_rows, num_blocks, place_in_blocks

SEED = 3
needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.10 does not interpret these kernels of Mosaic GPU")
ROUTES = [
    *(pytest.param(partial(top_k_route, implementation=name), id=str(name)) for name in ("reference", "xla", None)),
    pytest.param(
        lambda logits, experts_per_token: top_k_mosaic_gpu(logits, experts_per_token, interpret=True), id="mosaic_gpu",
        marks=needs_interpreter),
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("rows", "experts", "k"), [(1, 8, 1), (70, 16, 3), (5, 64, 8)])
def test_the_choice_is_the_largest_shares(route: Callable[..., Any], rows: int, experts: int, k: int) -> None:
    rng = np.random.default_rng(SEED)
    logits = np.round(rng.normal(size=(rows, experts)) * 4) / 2  # many are equal: the lower index goes first
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    ids, weights = jax.jit(partial(route, experts_per_token=k))(jnp.asarray(logits, jnp.float32))
    np.testing.assert_array_equal(ids, best)
    np.testing.assert_allclose(weights, np.take_along_axis(shares, best, 1), rtol=1e-5)
    assert weights.dtype == jnp.float32


@pytest.mark.parametrize("route", ROUTES)
def test_a_nan_stays_in_its_row_and_ids_in_range(route: Callable[..., Any]) -> None:
    logits = jnp.asarray(np.random.default_rng(SEED).normal(size=(9, 8)), jnp.float32).at[4, 3].set(jnp.nan)
    ids, weights = jax.jit(partial(route, experts_per_token=2))(logits)
    assert np.isnan(weights[4]).all()
    assert np.isfinite(np.delete(weights, 4, axis=0)).all()
    assert ((np.asarray(ids) >= 0) & (np.asarray(ids) < 8)).all()


@pytest.mark.parametrize("route", ROUTES)
def test_the_gradient_is_the_softmaxs(route: Callable[..., Any]) -> None:
    rng = np.random.default_rng(SEED)
    logits, cotangent = rng.normal(size=(5, 8)), rng.normal(size=(5, 2))
    loss = lambda logits: jnp.sum(route(logits, experts_per_token=2)[1] * cotangent)  # noqa: E731
    got = jax.jit(jax.grad(loss))(jnp.asarray(logits, jnp.float32))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    upstream = np.zeros_like(shares)
    np.put_along_axis(upstream, np.argsort(-logits, axis=1)[:, :2], cotangent, axis=1)
    expected = shares * (upstream - (shares * upstream).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_best_experts_by_maxima_are_those_of_top_k() -> None:
    spread = np.random.default_rng(SEED).random((40, 16))
    for shares in (spread, np.round(spread * 3) / 3, np.ones((2, 5))):
        values, indices = jax.jit(partial(top_k_by_maxima, k=4))(jnp.asarray(shares, jnp.float32))
        expected = jax.lax.top_k(jnp.asarray(shares, jnp.float32), 4)
        np.testing.assert_array_equal(values, expected[0])
        np.testing.assert_array_equal(indices, expected[1])


def test_the_choice_of_implementation_and_what_is_refused() -> None:
    logits = jnp.zeros((4, 64))
    choice = partial(top_k_route_choice, experts_per_token=8)
    assert choice(logits, platform="cpu") == choice(logits, platform="tpu") == "xla"
    assert choice(logits, platform="gpu") == ("mosaic_gpu" if jax.__version_info__ >= (0, 11) else "xla")
    assert choice(logits[:, :60], platform="gpu") == "xla"
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU, got cpu"):
        top_k_route(logits, experts_per_token=8, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"experts_per_token: got 65.*\[1, 64\]"):
        top_k_route(logits, experts_per_token=65)
    with pytest.raises(ValueError, match="logits: got dtype bfloat16"):
        top_k_route(logits.astype(jnp.bfloat16), experts_per_token=8)
    with pytest.raises(ValueError, match="'sort'; top_k_route has 'reference', 'xla', 'mosaic_gpu'"):
        top_k_route(logits, experts_per_token=8, implementation="sort")


def check_plan(ids: np.ndarray, experts: int, rows: int, place: np.ndarray, expert: np.ndarray) -> None:
    """Every selecting row has one place, in a block of its expert, in its order; blocks in use are no more."""
    assert len(expert) == num_blocks(ids.size, experts, rows=rows)
    flat, place = ids.reshape(-1), place.reshape(-1)
    used: dict[int, list[int]] = {}
    for entry, chosen in enumerate(flat):
        if 0 <= chosen < experts:
            used.setdefault(int(chosen), []).append(int(place[entry]))
        else:
            assert place[entry] == len(expert) * rows
    for chosen, places in used.items():
        assert places == list(range(places[0], places[0] + len(places))), "rows of an expert keep their order"
        assert places[0] % rows == 0
        blocks = range(places[0] // rows, places[-1] // rows + 1)
        assert all(expert[block] == chosen for block in blocks)
        assert np.sum(expert == chosen) == len(blocks)
    assert np.sum(expert == experts) == len(expert) - sum(np.sum(expert == chosen) for chosen in used)


PLANS = [
    (1, 2, 4, 16), (37, 3, 6, 16), (33, 2, 70, 16), pytest.param(96, 8, 64, 32, marks=pytest.mark.slow, id="full_size")]


@pytest.mark.parametrize("implementation", ["xla", pytest.param("mosaic_gpu", marks=needs_interpreter)])
@pytest.mark.parametrize(("num_rows", "slots", "experts", "rows"), PLANS)
def test_the_plan_gives_every_row_its_place(
    num_rows: int, slots: int, experts: int, rows: int, implementation: str
) -> None:
    rng = np.random.default_rng(SEED)
    for ids in (rng.integers(-1, experts + 1, (num_rows, slots)), np.full((num_rows, slots), experts - 1),
                np.sort(rng.integers(0, experts, (num_rows, slots)) // 2, axis=0)):
        if implementation == "xla":
            plan = jax.jit(lambda ids: place_in_blocks(group_rows(ids, experts), rows=rows))
            place, expert = map(np.asarray, plan(jnp.asarray(ids, jnp.int32)))
        else:
            from kernels_pallas.moe.mosaic_gpu_routing import plan_kernel

            plan = jax.jit(partial(plan_kernel, num_experts=experts, rows=rows, interpret=True))
            place, expert = map(np.asarray, plan(jnp.asarray(ids, jnp.int32)))
            expert = expert[: num_blocks(ids.size, experts, rows=rows)]
        check_plan(ids, experts, rows, place[: ids.size] if place.ndim == 1 else place, expert)


def test_many_rows_are_planned_in_chunks() -> None:
    ids = np.random.default_rng(SEED).integers(-1, 7, (ALL_PAIRS // 2 + 13, 2))
    place, expert = jax.jit(lambda ids: place_in_blocks(group_rows(ids, 6), rows=64))(jnp.asarray(ids, jnp.int32))
    check_plan(ids, 6, 64, np.asarray(place), np.asarray(expert))
