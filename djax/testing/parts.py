"""The contract that all parts share, as one call: for tests of parts that live outside of djax."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from djax.contracts import answers
from djax.contracts.part_shapes import (
    AXES,
    LENGTH,
    METHODS,
    PROTOCOLS,
    VOCAB,
    arguments,
    call,
    check_shapes,
    first_state,
)
from djax.contracts.struct import same_arrays, same_structure
from djax.contracts.types import Candidates, Noise, Reading
from djax.errors import ArgumentError, check_choice
from djax.parts.proposals import Greedy, reading_of
from djax.parts.transforms import ForbidTokens, Identity

_BATCH = 3


def check_part(part: Any, axis: str | None = None) -> None:
    """Check a part against its protocol: its shapes, and that it is pure, jittable, swept for free and row by row.

    One that says `needs_logits = False` has to give the same candidates from a reading as from the logits.

    Args:
        part: an instance, of your own or one of djax.
        axis: "strategy", "cache_policy", "transform", "propose", "smoothing" or "stop_rule"; None is told by the
            methods: the axis of which it has most.

    Raises:
        ArgumentError: named after the axis; says what is broken and how a part does it.
    """
    axis = axis_of(part) if axis is None else check_choice("axis", axis, AXES)
    _check_pytree(axis, part)
    check_shapes(axis, part, advice="mend it; its other properties are checked after its shapes")
    function, given = functools.partial(_two_steps, axis), _given(axis, seed=0)
    jitted: Any = jax.jit(function)
    whole = jitted(part, *given)
    if not _equal(whole, jax.jit(lambda *arguments: function(*arguments))(part, *given)):  # traced once more
        _fail(axis, part, "which gives something else when it is traced again",
              "state in, state out: no global or mutable state; randomness from `keys` only")
    jitted(jax.tree.map(_varied, part), *_given(axis, seed=1))
    if jitted._cache_size() > 1:
        _fail(axis, part, "which compiles anew for other numbers", "keep numbers in fields that are leaves")
    if axis != "cache_policy":
        _check_rows(axis, part, function, given, whole)
    if axis in ("transform", "propose") and not answers.needs_logits(part):
        _check_reading(axis, part)


def axis_of(part: Any) -> str:
    """The axis of whose methods a part has most; among equals the one of which it lacks least.

    Raises:
        ArgumentError: it has none of any.
    """
    has = {axis: sum(hasattr(part, method) for method in methods) for axis, methods in METHODS.items()}
    if any(has.values()):
        return max(has, key=lambda axis: (has[axis], -len(METHODS[axis])))
    raise ArgumentError("part", f"a {type(part).__name__}", allowed="an instance of a part",
                        advice=f"see the protocols in djax.contracts.types: {', '.join(PROTOCOLS.values())}")


def _fail(axis: str, part: Any, what: str, advice: str) -> None:
    raise ArgumentError(axis, f"{type(part).__name__}, {what}",
                        allowed=f"what djax.types.{PROTOCOLS[axis]} says", advice=advice)


def _check_pytree(axis: str, part: Any) -> None:
    is_leaf = any(leaf is part for leaf in jax.tree.leaves(part))
    if not dataclasses.is_dataclass(part) or isinstance(part, type) or is_leaf:
        _fail(axis, part, "which is no pytree of its fields", "decorate its class with djax.struct.dataclass")
    for field in dataclasses.fields(part):
        try:
            setattr(part, field.name, getattr(part, field.name))
        except dataclasses.FrozenInstanceError:
            continue
        _fail(axis, part, "which is not frozen", "decorate its class with djax.struct.dataclass")


def _check_rows(axis: str, part: Any, function: Callable[..., Any], given: tuple[Any, ...], whole: Any) -> None:
    if any(jnp.ndim(leaf) for leaf in jax.tree.leaves(part)) and axis != "stop_rule":
        return  # a number for each row, or a list of ids: which of them, only the part knows
    one_row = jax.jit(function)
    for row in range(_BATCH):
        cut = lambda array, row=row: array[row:row + 1] if jnp.ndim(array) else array  # noqa: E731
        if not _equal(one_row(part, *jax.tree.map(cut, given)), jax.tree.map(cut, whole), exact=False):
            _fail(axis, part, f"in which row {row} depends on the rows beside it",
                  "reduce over the last axes only, never over the rows")


def _check_reading(axis: str, part: Any) -> None:
    """Compare candidates by logits with those by a reading, over the steps of a block."""
    transform, propose = (part, Greedy()) if axis == "transform" else (Identity(), part)
    states, both_ways = [transform.init(_BATCH, LENGTH)] * 2, jax.jit(_both_ways)
    for seed in (0, 1, 0):
        expected, got, states = both_ways(
            transform, propose, states, *_given("transform", seed=seed), *_given("propose", seed=seed)[::2])
        differ = [field.name for field in dataclasses.fields(Candidates) if not np.allclose(
            getattr(got, field.name), getattr(expected, field.name), rtol=1e-4, atol=1e-5, equal_nan=True)]
        if differ:
            methods = "step_reading, forbidden, wanted_ids" if axis == "transform" else "noise, read"
            _fail(axis, part, f"which gives candidates of other {', '.join(differ)} by a reading than by the logits",
                  f"compare its {methods} with step, and their names with the protocol")


def _both_ways(
    transform: Any, propose: Any, states: list[Any], logits: Any, is_masked: Any, keys: Any, tokens: Any
) -> tuple[Candidates, Candidates, list[Any]]:
    """Candidates by logits and by a reading of them, and the transform's next states."""
    changed, by_logits = transform.step(logits, is_masked, states[0])
    reading = _read(transform, states[1], logits, tokens, propose.noise(keys, LENGTH))
    reading, by_reading = transform.step_reading(reading, is_masked, states[1])
    return propose.step(keys, changed, tokens), propose.read(reading, tokens), [by_logits, by_reading]


def _read(transform: Any, state: Any, logits: Any, tokens: Any, noise: Noise | None) -> Reading:
    """The answer of a head with these logits to what a transform asks of it. A proposal's noise goes without ids."""
    forbidden, wanted = answers.forbidden(transform), answers.wanted_ids(transform, state)
    logits, _ = ForbidTokens(forbidden.ids, forbidden.limit).step(logits, None, ())  # type: ignore[arg-type]
    reading = reading_of(logits, tokens, noise=noise)
    if wanted is None:
        return reading
    at = jnp.take_along_axis(logits, jnp.clip(wanted, 0, VOCAB - 1), axis=-1)
    at = jnp.where((wanted >= 0) & (wanted < VOCAB), at, -jnp.inf)
    join = lambda one, more: jnp.concatenate([one, more], axis=-1)  # noqa: E731
    return dataclasses.replace(reading, ids=join(reading.ids, wanted), logits=join(reading.logits, at),
                               noise=join(reading.noise, jnp.zeros(wanted.shape)))


def _two_steps(axis: str, part: Any, *given: Any) -> Any:
    """Take two steps of a part from a fresh state."""
    batch = next(leaf.shape[0] for leaf in jax.tree.leaves(given) if leaf.ndim)
    first, state = call(axis, part, first_state(axis, part, batch), *given)
    return first, call(axis, part, state, *given)


def _given(axis: str, *, seed: int) -> tuple[Any, ...]:
    """Arguments for a part of an axis, with rows of different certainty: a part that mixes them decides otherwise."""
    rng = np.random.default_rng(seed)

    def fill(kind: Any) -> Any:
        if jnp.issubdtype(kind.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(seed, impl="threefry2x32"), _BATCH)
        if kind.dtype == bool:
            return jnp.asarray(rng.random(kind.shape) < 0.6)
        if jnp.issubdtype(kind.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, LENGTH, kind.shape), kind.dtype)
        # two axes are probabilities, three are logits or embeddings
        values = rng.random(kind.shape) if len(kind.shape) < 3 else rng.normal(size=kind.shape) * 5
        return jnp.asarray(values * np.array([0.3, 0.6, 1.0]).reshape(-1, *[1] * (len(kind.shape) - 1)), kind.dtype)

    return jax.tree.map(fill, arguments(axis, _BATCH))


def _varied(leaf: Any) -> Any:
    """Another number of the same type: near, so that it stays in any range that the part checks."""
    kind = jnp.result_type(leaf)
    return leaf * 0.9 if jnp.issubdtype(kind, jnp.floating) else leaf + 1 if jnp.issubdtype(kind, jnp.integer) else leaf


def _equal(left: Any, right: Any, *, exact: bool = True) -> bool:
    ours, theirs = jax.tree.leaves(left), jax.tree.leaves(right)
    return same_structure(left, right) and all(
        same_arrays(a, b) if exact or not jnp.issubdtype(a.dtype, jnp.floating)
        else np.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True))
