"""Whether the kernels compute on this device what they should: the tests' own tables, and the model's shapes.

The tables (`kernels_pallas.testing`) are compared with their float64 oracles, with the tests' tolerances. At the
model's shapes, where an oracle on the host would take minutes, an implementation is compared with the op's reference
on the device: the norm of the difference over that of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.cases import Case
from benchmarks.kernels.ops import (
    QUANTIZED_DTYPES,
    Drawn,
    attention_op,
    candidates,
    chained,
    compiled,
    moe_op,
    quantized_op,
    routing_op,
    unembed_op,
)
from kernels_pallas import attention, moe, moe_quantized, top_k_route, unembed
from kernels_pallas.attention import IMPLEMENTATIONS as ATTENTION
from kernels_pallas.moe import IMPLEMENTATIONS as MOE
from kernels_pallas.moe import QUANTIZED_IMPLEMENTATIONS as QUANTIZED
from kernels_pallas.moe import ROUTE_IMPLEMENTATIONS as ROUTE
from kernels_pallas.testing import attention_cases, moe_cases, unembed_cases
from kernels_pallas.testing.unembed_check import check as check_readout
from kernels_pallas.unembed import IMPLEMENTATIONS as UNEMBED

SEED = 7
TOLERANCE = {"float32": 2e-5, "bfloat16": 1.5e-2}
"""Share of the largest entry, as the tests have it but for float32: accelerators add in another order."""
RELATIVE = 1e-2
"""Share of the norm, at the model's shapes in bfloat16: rounding gives 2e-3 to 5e-3, a wrong element far more."""


def cases(drawn: Drawn) -> Iterable[Case]:
    """All checks, the ones at the model's shapes first."""
    yield from model_shapes(drawn)
    yield from tables()


def check(
    op: str, name: str, implementation: str, program: Callable[..., Any], operands: Callable[[], tuple[Any, ...]],
    verdict: Callable[[Any, tuple[Any, ...]], dict[str, Any]],
) -> Case:
    """A case that runs `program` once; `verdict` says of its result "ok" or "wrong"."""

    def prepare() -> Callable[[], dict[str, Any]]:
        arguments = operands()
        ready = compiled(program, arguments)
        return lambda: verdict(jax.block_until_ready(ready(*arguments)), arguments)

    # what was written for the device first; the rest is XLA's
    return Case(group="check", implementation=implementation, shape={"op": op, "case": name}, prepare=prepare,
                priority=0 if implementation.startswith(("mosaic", "pallas", "cudnn")) else 1)


def near(got: Any, expected: np.ndarray, allowed: float) -> dict[str, Any]:
    """The largest difference, of the largest expected entry."""
    got = np.asarray(got, np.float64)
    return judge(float(np.max(np.abs(got - expected)) / max(1.0, np.abs(expected).max())), allowed)


def judge(error: float, allowed: float) -> dict[str, Any]:
    """Whether an error is as small as it should be."""
    if error <= allowed:  # NaN is not
        return {"status": "ok", "error": error, "allowed": allowed, "note": f"error {error:.1e} of {allowed:.1e}"}
    return {"status": "wrong", "error": error if np.isfinite(error) else None, "allowed": allowed,
            "reason": f"error {error:.3g}; allowed {allowed:.1e}"}


def tables() -> Iterator[Case]:
    """The tests' tables on every implementation."""
    yield from moe_table()
    yield from attention_table()
    yield from unembed_table()


def moe_table() -> Iterator[Case]:
    """`kernels_pallas/testing/moe_cases.py`."""
    for case in moe_cases.CASES:
        for name in ("reference", *candidates(MOE)):
            yield check(
                "moe", case.name, name, partial(moe, implementation=name), partial(moe_cases.operands, case, SEED),
                lambda got, operands, dtype=case.dtype: near(got, moe_cases.oracle(*operands), TOLERANCE[dtype]))


def attention_table() -> Iterator[Case]:
    """`kernels_pallas/testing/attention_cases.py`."""
    for case in attention_cases.CASES:
        arrays, options = attention_cases.operands(case, SEED)
        static = {"block_length": options.pop("block_length")}
        # a score's rounding error is a relative one of the weight
        allowed = TOLERANCE[case.dtype] * max(1.0, case.scale**2 / 30)
        for name in ("reference", *candidates(ATTENTION)):
            yield check(
                "attention", case.name, name,
                lambda query, key, value, options, name=name, static=static: attention(
                    query, key, value, **options, **static, implementation=name),
                lambda arrays=arrays, options=options: (*arrays, jax.tree.map(jnp.asarray, options)),
                lambda got, operands, static=static, allowed=allowed: near(
                    got, attention_cases.oracle(*operands[:3], **jax.tree.map(np.asarray, operands[3]), **static),
                    allowed))


def unembed_table() -> Iterator[Case]:
    """`kernels_pallas/testing/unembed_cases.py`."""
    for case in unembed_cases.CASES:
        arrays, options = unembed_cases.operands(case, SEED)
        static = {name: options.pop(name) for name in ("second", "entropy") if name in options}
        for name in ("reference", *candidates(UNEMBED)):
            yield check(
                "unembed", case.name, name,
                lambda hidden, head, options, name=name, static=static: unembed(
                    hidden, head, **options, **static, implementation=name),
                lambda arrays=arrays, options=options: (*arrays, jax.tree.map(jnp.asarray, options)),
                lambda got, operands, static=static, dtype=case.dtype: asserted(
                    got, unembed_cases.oracle(*operands[:2], **operands[2], **static), dtype))


def asserted(got: Any, rows: Any, dtype: str) -> dict[str, Any]:
    """Compare a readout as the tests do."""
    try:
        check_readout(got, rows, dtype)
    except AssertionError as error:
        return {"status": "wrong", "reason": " ".join(str(error).split())[:400]}
    return {"status": "ok"}


def model_shapes(drawn: Drawn) -> Iterator[Case]:
    """Every implementation against the reference where the targets are, and on a full refresh."""
    window, context, batch = drawn.sizes.main
    for rows in (1, batch * window, batch * context):
        op = moe_op(drawn, rows, 0)
        for name in candidates(MOE):
            yield against("moe", f"{rows} rows", name, moe, op)
        for dtype in QUANTIZED_DTYPES:
            for name in candidates(QUANTIZED):
                yield against("moe_quantized", f"{rows} rows, {dtype}", name, moe_quantized,
                              quantized_op(drawn, rows, 0, dtype))
        route = partial(_route, slots=drawn.sizes.config.experts_per_token)
        for name in candidates(ROUTE):
            yield against("top_k_route", f"{rows} rows", name, route, routing_op(drawn, rows))
    for width in (window, context):
        op = attention_op(drawn, width, context, batch, 0)
        for name in candidates(ATTENTION):
            yield against("attention", f"{width} of {context}", name, _attend, op)
    rows = batch * drawn.sizes.block(window)
    for name in candidates(UNEMBED):
        yield against("unembed", f"{rows} rows", name, _read, unembed_op(drawn, rows, 0))


def _route(logits: Any, *, implementation: str, slots: int) -> Any:
    """The weights of a row's experts at their places among all, so that equal ones may change places."""
    ids, weights = top_k_route(logits, experts_per_token=slots, implementation=implementation)
    return jnp.sum(jax.nn.one_hot(ids, logits.shape[1]) * weights[..., None], axis=1)


def _attend(query: Any, mask: Any, *caches: Any, implementation: str) -> Any:
    """One link of the op's chain, its first keys masked as left padding is."""
    mask &= jnp.arange(mask.shape[1]) >= mask.shape[1] // 8
    return chained(lambda q, k, v, mask: attention(q, k, v, key_mask=mask, implementation=implementation))(
        query, mask, *caches[:2])


def _read(hidden: Any, head: Any, at: Any, forbidden: Any, limit: Any, *, implementation: str) -> Any:
    """Every float of a readout as one array; a row's best id may be another of an equal logit, and is left out."""
    found = unembed(hidden, head, at=at, forbidden=forbidden, vocab_limit=limit, implementation=implementation)
    at = jnp.where(jnp.isneginf(found.at), 0.0, found.at)  # a forbidden id's
    return jnp.concatenate([found.best_logit[:, None], found.log_total[:, None], at], axis=1)


def against(op: str, name: str, implementation: str, function: Callable[..., Any], made: Any) -> Case:
    """`function` by one implementation against the reference, both on the device."""

    def prepare() -> Callable[[], dict[str, Any]]:
        ready = compiled(partial(function, implementation=implementation), made.operands)
        reference = compiled(partial(function, implementation="reference"), made.operands)

        def act() -> dict[str, Any]:
            operands = made.draw()[0]
            got, expected = (np.asarray(program(*operands), np.float64) for program in (ready, reference))
            return judge(float(np.linalg.norm(got - expected) / np.linalg.norm(expected)), RELATIVE)

        return act

    return Case(group="check", implementation=implementation, shape={"op": op, "case": name}, prepare=prepare,
                priority=0)
