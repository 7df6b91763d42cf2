"""Every implementation of `moe` against a NumPy loop, on one table of cases."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import moe, moe_choice
from kernels_pallas.moe import IMPLEMENTATIONS
from kernels_pallas.moe.xla_grouped import (
    ALIGNMENT,
    BLOCK_SIZES,
    WEIGHTS_LEFT,
    block_sizes,
    capacity,
    group_rows,
    moe_xla_grouped,
)
from kernels_pallas.testing.moe_cases import CASES, Case, operands, oracle
from tests.support.cover import in_turn

TOLERANCE = {"float32": 2e-6, "bfloat16": 1.5e-2}
SEED = 7
NAMES = ["reference", "xla_grouped", "xla_dense", None]  # what a CPU runs as it is
run = jax.jit(moe, static_argnames="implementation")
groups_of = jax.jit(group_rows, static_argnums=(1, 2, 3))


@pytest.fixture(params=NAMES, ids=str)
def implementation(request: pytest.FixtureRequest) -> str | None:
    return request.param


@in_turn(CASES, NAMES)
def test_equals_the_loop(case: Case, implementation: str | None) -> None:
    arguments = operands(case, SEED)
    expected = oracle(*arguments)
    got = run(*arguments, implementation=implementation)
    assert got.shape == expected.shape
    assert got.dtype == jnp.dtype(case.dtype)
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(
        np.asarray(got, np.float64) / scale, expected / scale, atol=TOLERANCE[case.dtype], rtol=0,
        err_msg=f"seed {SEED}")


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_bad_row_stays_in_its_row(poison: float, implementation: str | None) -> None:
    case = Case(name="poisoned", rows=37, slots=3)
    x, *rest = operands(case, SEED)
    clean = np.asarray(run(x, *rest, implementation=implementation))
    got = np.asarray(run(x.at[5].set(poison), *rest, implementation=implementation))
    assert np.isnan(got[5]).any()
    others = np.arange(case.rows) != 5
    np.testing.assert_array_equal(got[others], clean[others])


def test_a_bad_router_weight_stays_in_its_row(implementation: str | None) -> None:
    case = Case(name="poisoned", rows=37, slots=3)
    x, ids, weights, *matrices = operands(case, SEED)
    clean = np.asarray(run(x, ids, weights, *matrices, implementation=implementation))
    got = np.asarray(run(x, ids, weights.at[5, 1].set(np.nan), *matrices, implementation=implementation))
    assert np.isnan(got[5]).all()
    np.testing.assert_array_equal(np.delete(got, 5, axis=0), np.delete(clean, 5, axis=0))


def test_an_expert_that_no_row_chose_is_not_seen(implementation: str | None) -> None:
    case = Case(name="poisoned", rows=40, slots=2, routing="first_two")
    x, ids, weights, gate, up, down = operands(case, SEED)
    clean = run(x, ids, weights, gate, up, down, implementation=implementation)
    got = run(x, ids, weights, gate.at[3].set(np.inf), up.at[3].set(np.inf), down, implementation=implementation)
    np.testing.assert_array_equal(got, clean)


@in_turn([
    Case(name="few", rows=9, slots=3, experts=4, width=5, model=6),
    Case(name="uneven", rows=60, slots=2, experts=8, width=5, model=6, routing="uneven"),
    Case(name="out_of_range", rows=21, slots=3, width=5, model=6, routing="out_of_range"),
], NAMES)
def test_gradients_are_the_loops_slopes(case: Case, implementation: str | None) -> None:
    x, ids, weights, *matrices = operands(case, SEED)
    rng = np.random.default_rng(SEED)
    cotangent = rng.normal(size=x.shape)
    variables = (x, weights, *matrices)

    def loss(*variables: jax.Array) -> jax.Array:
        x, weights, *matrices = variables
        return jnp.sum(moe(x, ids, weights, *matrices, implementation=implementation) * cotangent)

    gradients = jax.jit(jax.grad(loss, argnums=tuple(range(5))))(*variables)
    for index, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = [np.asarray(v, np.float64) for v in variables]
            moved[index] = moved[index] + sign * 1e-5 * direction
            ends.append(np.sum(oracle(moved[0], ids, *moved[1:]) * cotangent))
        slope = (ends[0] - ends[1]) / 2e-5
        assert abs(np.sum(np.asarray(gradient, np.float64) * direction) - slope) < 1e-4 * max(1, abs(slope)), index


@pytest.mark.parametrize("case", [
    Case(name="uneven", rows=60, slots=2, experts=8, width=5, model=6, routing="uneven"),
    pytest.param(Case(name="bfloat16", rows=9, slots=3, experts=4, width=5, model=6, dtype="bfloat16"),
                 marks=pytest.mark.slow),
], ids=lambda case: case.name)
def test_the_other_side_gives_the_same(case: Case) -> None:
    """Product and loop with the weights on the side that is not in use, against the oracle and autodiff."""
    x, ids, *variables = operands(case, SEED)

    def loss(op: Callable[..., jax.Array], x: jax.Array, *variables: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = op(x, ids, *variables)
        return jnp.sum(jnp.sin(jnp.arange(out.size).reshape(out.shape)) * out.astype(jnp.float32)), out

    other, reference = partial(moe_xla_grouped, weights_left=not WEIGHTS_LEFT), partial(moe, implementation="reference")
    gradients, out = jax.jit(jax.grad(partial(loss, other), argnums=tuple(range(5)), has_aux=True))(x, *variables)
    wanted, _ = jax.jit(jax.grad(partial(loss, reference), argnums=tuple(range(5)), has_aux=True))(
        *(array.astype(jnp.float32) for array in (x, *variables)))
    for got, expected in zip((out, *gradients), (oracle(x, ids, *variables), *wanted), strict=True):
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(np.asarray(got, np.float64) / scale, np.asarray(expected) / scale,
                                   atol=TOLERANCE[case.dtype], rtol=0)


def test_the_compiler_keeps_the_weights_on_their_side() -> None:
    case = Case(name="small", rows=4, slots=2, experts=3, width=5, model=6)
    arguments = operands(case, SEED)
    for left, shapes in ((False, {"3,8,5", "3,8,6"}), (True, {"3,5,8", "3,6,8"})):
        program = jax.jit(partial(moe_xla_grouped, weights_left=left)).lower(*arguments).compile().as_text()
        assert program is not None
        assert set(re.findall(r"= f32\[([\d,]+)\]\S* dot\(", program)) == shapes


def test_the_choice_can_be_asked() -> None:
    arguments = operands(Case(name="asked", rows=8, slots=2), SEED)
    shapes = jax.eval_shape(lambda *a: a, *arguments)
    assert moe_choice(*shapes, platform="cpu") == "xla_grouped"
    assert moe_choice(*shapes, platform="gpu") == "xla_dense"
    assert moe_choice(*shapes, platform="tpu") == "xla_dense"
    assert moe_choice(*shapes, implementation="reference", platform="cpu") == "reference"
    assert moe_choice(*arguments) in IMPLEMENTATIONS


@pytest.mark.parametrize("rows", [1, 96, 4096])
def test_the_choice_on_an_accelerator_goes_by_size_and_dtype(rows: int) -> None:
    def choice(platform: str, **changes: object) -> str:
        case = Case(name="asked", rows=rows, slots=2, width=128, model=256, dtype="bfloat16")
        shapes = jax.eval_shape(lambda: operands(dataclasses.replace(case, **changes), SEED))
        return moe_choice(*shapes, platform=platform)

    new = jax.__version_info__ >= (0, 11)
    assert choice("gpu") == ("mosaic_gpu" if new else "xla_dense")
    assert choice("gpu", dtype="float32") == choice("gpu", width=96) == choice("gpu", model=192) == "xla_dense"
    assert choice("tpu") == choice("tpu", dtype="float32") == ("pallas_tpu" if rows > 128 else "xla_dense")
    assert choice("tpu", width=96) == "xla_dense"
    assert choice("cpu") == "xla_grouped"


def test_kernels_say_what_they_lack() -> None:
    arguments = operands(Case(name="asked", rows=8, slots=2), SEED)
    for name, device in (("mosaic_gpu", "Hopper GPU"), ("pallas_tpu", "TPU")):
        with pytest.raises(NotImplementedError, match=f"{name}' does not support this call: it needs a {device}"):
            moe(*arguments, implementation=name)
    with pytest.raises(NotImplementedError, match="multiples of 128, got D 20, F 12"):
        moe_choice(*arguments, implementation="pallas_tpu", platform="tpu")
    if jax.__version_info__ >= (0, 11):
        with pytest.raises(NotImplementedError, match="it takes bfloat16, got float32"):
            moe_choice(*arguments, implementation="mosaic_gpu", platform="gpu")


def test_what_does_not_fit_is_refused() -> None:
    x, ids, weights, gate, up, down = operands(Case(name="refused", rows=8, slots=2), SEED)
    with pytest.raises(ValueError, match=r"'mosaic'; moe has 'reference', 'xla_grouped', 'xla_dense'"):
        moe(x, ids, weights, gate, up, down, implementation="mosaic")
    with pytest.raises(ValueError, match="fold batch axes"):
        moe(x[None], ids, weights, gate, up, down)
    with pytest.raises(ValueError, match=r"down: got shape \(6, 12, 20\).*must be \(6, 20, 12\)"):
        moe(x, ids, weights, gate, up, down.swapaxes(1, 2))
    with pytest.raises(ValueError, match="weights: got shape"):
        moe(x, ids, weights[:, :1], gate, up, down)
    with pytest.raises(ValueError, match="expert_ids: got dtype float32"):
        moe(x, weights, weights, gate, up, down)
    with pytest.raises(ValueError, match="one dtype"):
        moe(x.astype(jnp.bfloat16), ids, weights, gate, up, down)
    with pytest.raises(ValueError, match="at least 1"):
        moe(x[:0], ids[:0], weights[:0], gate, up, down)


def test_the_plan_holds_every_routed_row_once() -> None:
    rng = np.random.default_rng(SEED)
    for rows, slots, experts, places, largest in (
            (37, 3, 6, 8, 16), (1, 1, 40, 8, 8), (64, 2, 4, 16, 32), (5, 4, 4, 24, 1), (40, 2, 2, 8, 8)):
        ids = rng.integers(-1, experts + 1, (rows, slots))
        plan = jax.tree.map(np.asarray, groups_of(jnp.asarray(ids, jnp.int32), experts, places, largest))
        entries = np.arange(rows * slots).reshape(rows, slots)
        blocks = {
            int(entry): int(plan.expert[block]) for block in range(plan.num_blocks)
            for entry in plan.overflow[plan.start[block] : plan.start[block] + plan.rows[block]]}
        assert sum(plan.rows[: plan.num_blocks]) == len(blocks), "an entry stands in two blocks"
        seen = {expert: 0 for expert in range(experts)}
        for (row, slot), expert in np.ndenumerate(ids):
            entry, place = int(entries[row, slot]), int(plan.place[row, slot])
            if not 0 <= expert < experts:
                assert place == experts * places
                assert entry not in blocks
                continue
            if seen[expert] < places:  # the first ones in the product, in their order
                assert place == expert * places + seen[expert]
                assert plan.source[place] == entry
                assert entry not in blocks
            else:
                assert place == experts * places
                assert blocks.pop(entry) == expert
            seen[expert] += 1
        assert not blocks
        assert sum(plan.source < rows * slots) == sum(min(count, places) for count in seen.values())
        assert len(plan.overflow) == rows * slots + largest


def test_the_plan_has_room_for_the_worst_routing() -> None:
    for rows, slots, experts, largest in ((24, 1, 3, 8), (9, 2, 6, 8), (1, 2, 2, 8), (33, 1, 4, 16)):
        for ids in (np.arange(rows * slots) % experts, np.minimum(np.arange(rows * slots), experts - 1)):
            plan = groups_of(jnp.asarray(ids.reshape(rows, slots), jnp.int32), experts, 1, largest)
            assert int(plan.num_blocks) <= len(plan.expert)
            assert int(plan.rows.sum()) == sum(max(np.sum(ids == expert) - 1, 0) for expert in range(experts))
            assert int((plan.start + plan.rows)[: plan.num_blocks].max(initial=0)) + largest <= len(plan.overflow)


def test_the_product_takes_an_even_share_and_small_calls_need_no_loop() -> None:
    for rows, experts in ((128, 16), (384, 16), (6144, 16), (768, 64), (10**5, 8)):
        share = rows / experts
        assert share < capacity(rows, experts) < share + share**0.5 + ALIGNMENT + 1
        assert capacity(rows, experts) % ALIGNMENT == 0
    for rows, experts in ((1, 64), (9, 1), (32, 4)):
        assert capacity(rows, experts) >= rows
        assert block_sizes(rows, experts) == ()
    assert block_sizes(33, 64) == (8,)
    assert block_sizes(32 * 4, 16) == (8, 32)
    assert block_sizes(10**6, 4) == BLOCK_SIZES


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from kernels_pallas import moe
from kernels_pallas.testing.moe_cases import Case, operands, oracle
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
case = Case(name="sharded", rows=16, slots=2, experts=8, width=8, model=16)
arguments = operands(case, 7)
for specs in ((P("data"), P("data"), P("data"), P(None, "tensor"), P(None, "tensor"), P(None, None, "tensor")),
              (P("data"), P("data"), P("data"), P("tensor"), P("tensor"), P("tensor"))):
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arguments, specs)]
    for name in ("reference", "xla_grouped", "xla_dense"):
        got = jax.jit(moe, static_argnames="implementation")(*placed, implementation=name)
        expected = oracle(*arguments)
        assert np.abs(np.asarray(got) - expected).max() < 2e-6 * np.abs(expected).max(), (name, specs)
whole, part = P(), P("tensor")
for wide, narrow, by_expert in ((part, part, True), (P(None, "tensor"), P(None, None, "tensor"), False)):
    specs = (P("data"), P("data"), P("data"), wide, wide, narrow)
    for name in ("reference", "xla_grouped", "xla_dense", None):
        def share(x, ids, weights, gate, up, down):  # a device's own experts, or its own columns of all
            first = jax.lax.axis_index("tensor") * len(gate) if by_expert else 0
            return jax.lax.psum(moe(x, ids - first, weights, gate, up, down, implementation=name), "tensor")
        got = jax.jit(jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False))(*arguments)
        assert np.abs(np.asarray(got) - expected).max() < 2e-6 * np.abs(expected).max(), (name, by_expert)
print("sharded ok", jax.device_count())
"""


@pytest.mark.slow
def test_under_jit_on_eight_devices() -> None:
    """In a process of its own: the number of devices is fixed before JAX starts."""
    script = f"import jax; jax.config.update('jax_num_cpu_devices', 8)\n{_SHARDED}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        cwd=pathlib.Path(__file__).parents[2], env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    assert "sharded ok 8" in done.stdout
