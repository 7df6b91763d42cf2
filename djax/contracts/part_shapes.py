"""Shapes and dtypes that a part has to give, asked of it without running anything.

A part that breaks its protocol would fail deep inside the loop, in an error that does not name it. Here it is traced
alone on a small block, when a choice of parts is made.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from djax.contracts import answers
from djax.contracts.struct import same_structure
from djax.contracts.types import Candidates, Decision, Forbidden, Noise, Reading, StepInfo, Window
from djax.errors import ArgumentError, one_line

AXES = ("strategy", "cache_policy", "transform", "propose", "smoothing", "stop_rule")
"""The axes of the loop, by the names of `Parts`' fields."""
LENGTH, VOCAB, CANVAS, FIRST, WIDTH = 8, 12, 40, 16, 5
"""Sizes of the small block and canvas; all differ, so that a mistaken axis shows."""
Shaped = jax.ShapeDtypeStruct


def check_shapes(axis: str, part: Any, *, advice: str | None = None) -> None:
    """Trace a part of an axis on a small block and compare what it gives with its protocol.

    Args:
        axis: one of `AXES`.
        part: of that axis; its numbers may be traced.
        advice: on a part that breaks its protocol; None points to `djax.testing.check_part`.

    Raises:
        ArgumentError: named after the axis: the part lacks a method, fails, or gives other shapes or dtypes.
    """
    name = type(part).__name__
    if isinstance(part, type):
        raise ArgumentError(axis, f"the class {part.__name__}", allowed="an instance of a part",
                            advice=f"call it: {part.__name__}(...)")
    missing = [method for method in METHODS[axis] if not hasattr(part, method)]
    if missing:
        raise ArgumentError(axis, f"{name}, which has no {', '.join(missing)}",
                            allowed=f"what djax.types.{PROTOCOLS[axis]} says", advice="add what is missing")
    leaves, structure = jax.tree.flatten(part)
    for leaf in leaves:
        if not _is_number(leaf):
            raise ArgumentError(axis, f"{name} with a field that holds a {type(leaf).__name__}",
                                allowed="numbers, arrays and parts; static fields for anything else",
                                advice="declare that field with djax.struct.field(pytree_node=False)")
    for field in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
        value = getattr(part, field.name)
        if not field.metadata.get("pytree_node", True) and not _is_hashable(value):
            raise ArgumentError(axis, f"{name} with a {type(value).__name__}, which cannot be hashed, in its static "
                                f"field {field.name}", allowed="texts, numbers and tuples in static fields",
                                advice="jit looks programs up by them")
    problem = _problem(axis, structure, tuple(map(_kind, leaves)))
    if problem is not None:
        raise ArgumentError(axis, f"{name}, {problem}", allowed=f"what djax.types.{PROTOCOLS[axis]} says",
                            advice=advice or f"djax.testing.check_part({name}(...)) tells more")


PROTOCOLS = {"strategy": "Strategy", "cache_policy": "CachePolicy", "transform": "Transform", "propose": "Propose",
             "smoothing": "Smoothing", "stop_rule": "StopRule"}
"""The protocol of each axis, in `djax.contracts.types`."""
METHODS = {
    "strategy": ("reopens", "max_steps", "init", "step"), "cache_policy": ("exact", "window_length", "window"),
    "transform": ("init", "step"), "propose": ("step",), "smoothing": ("soft", "step"),
    "stop_rule": ("reasons", "step", "ends", "fill")}
"""Methods that a part of each axis must have."""
_READING_METHODS = {"transform": ("step_reading",), "propose": ("noise", "read")}
"""Methods that it must have besides if it says `needs_logits = False`."""


def _kind(leaf: Any) -> type | tuple[tuple[int, ...], str]:
    """A Python number's type (it is weakly typed), or shape and dtype."""
    return type(leaf) if isinstance(leaf, bool | int | float) else (tuple(leaf.shape), leaf.dtype.name)


def _batch(kinds: tuple[Any, ...]) -> int:
    """Rows of the small block: as many as a part with a number for each row has."""
    rows = {kind[0][0] for kind in kinds if isinstance(kind, tuple) and len(kind[0]) == 1 and "float" in kind[1]}
    return max(rows) if rows else 2


@functools.lru_cache(maxsize=512)
def _problem(axis: str, structure: Any, kinds: tuple[Any, ...]) -> str | None:
    """The way in which a part of this structure breaks its protocol, or None."""
    part = jax.tree.unflatten(structure, [kind(1) if isinstance(kind, type) else Shaped(*kind) for kind in kinds])
    try:
        return _CHECKS[axis](part, _batch(kinds))
    except ArgumentError:
        raise
    except Exception as error:  # whatever a part's code raises is told in one line, under the part's name
        return f"which fails: {type(error).__name__}: {one_line(str(error))[:300]}"


def call(axis: str, part: Any, state: Any, *given: Any) -> tuple[Any, Any]:
    """Call a part with `arguments(axis, ...)` of these shapes: what it gives, and its next state."""
    if axis in ("strategy", "transform"):
        return part.step(*given, state)
    if axis == "cache_policy":
        return part.window(*given, CANVAS, LENGTH), state
    if axis == "stop_rule":
        return (part.step(*given), part.ends(given[0])), state
    return part.step(*given), state


def first_state(axis: str, part: Any, batch: int) -> Any:
    """A part's state on entering the small block; () on an axis without one."""
    return part.init(batch, LENGTH) if axis in ("strategy", "transform") else ()


def arguments(axis: str, batch: int) -> tuple[Any, ...]:
    """Shapes of what `call` hands to a part of an axis."""
    block, canvas = (batch, LENGTH), (batch, CANVAS)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl="threefry2x32"), batch))
    tokens, is_masked, number = Shaped(block, jnp.int32), Shaped(block, bool), Shaped(block, jnp.float32)
    scalar, logits = Shaped((), jnp.int32), Shaped((*block, VOCAB), jnp.float32)
    info: Any = StepInfo(row_step=Shaped((batch,), jnp.int32), step_in_block=scalar,  # type: ignore[arg-type]
                         block=scalar, block_start=scalar, is_open=is_masked)  # type: ignore[arg-type]
    candidates: Any = Candidates(token=tokens, confidence=number, log_prob=number,  # type: ignore[arg-type]
                                 current=number)  # type: ignore[arg-type]
    flags, inputs = Shaped(canvas, bool), Shaped((*block, WIDTH), jnp.float32)
    return {"strategy": (keys, candidates, is_masked, info), "transform": (logits, is_masked),
            "propose": (keys, logits, tokens), "cache_policy": (info,), "smoothing": (inputs, inputs, is_masked, info),
            "stop_rule": (Shaped(canvas, jnp.int32), flags, flags, info)}[axis]


def _traced(axis: str, part: Any, batch: int) -> tuple[Any, str | None]:
    """Trace the part: what it gives, and how its next state differs from the one that the loop carries."""
    before = jax.eval_shape(lambda part: first_state(axis, part, batch), part)
    given, after = jax.eval_shape(functools.partial(call, axis), part, before, *arguments(axis, batch))
    return given, _changed("step", "a state", "init", before, after)


def _changed(method: str, what: str, source: str, before: Any, after: Any) -> str | None:
    """How the arrays that a method gives differ from those that it was given by `source`."""
    if not same_structure(before, after):
        return f"whose {method} gives {what} of another structure than {source}"
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            return (f"whose {method} gives {what} of shape {list(new.shape)} and dtype {new.dtype} where {source} gave "
                    f"{list(old.shape)} and {old.dtype}")
    return None


def _strategy(part: Any, batch: int) -> str | None:
    bounds = []

    def bound(part: Any) -> Any:
        bounds.append(part.max_steps(LENGTH))
        return jnp.asarray(bounds[0], jnp.int32)

    if jax.eval_shape(bound, part).shape != () or (isinstance(bounds[0], int | float) and
                                                   not (isinstance(bounds[0], int) and bounds[0] >= 1)):
        return f"whose max_steps gives {bounds[0]!r}, not a whole number of at least 1"
    if not isinstance(part.reopens, bool):
        return f"whose reopens is {part.reopens!r}, not True or False"
    given, changed = _traced("strategy", part, batch)
    return _other_fields("step", given, Decision, (batch, LENGTH), commit="bool", reopen="bool") or changed


def _transform(part: Any, batch: int) -> str | None:
    given, changed = _traced("transform", part, batch)
    return _differs("step's logits", given, (batch, LENGTH, VOCAB), "float32") or changed or _by_reading(
        "transform", part, batch)


def _transform_reading(part: Any, batch: int) -> str | None:
    before = jax.eval_shape(lambda part: first_state("transform", part, batch), part)
    forbidden, wanted = jax.eval_shape(
        lambda part, state: (answers.forbidden(part), answers.wanted_ids(part, state)), part, before)
    problem = _other_fields("forbidden", forbidden, Forbidden, (), limit="int32") or _differs(
        "forbidden's ids", forbidden.ids, _last_axis(forbidden.ids), "int32")
    if problem is None and wanted is not None:
        problem = _differs("wanted_ids", wanted, (batch, LENGTH, *_last_axis(wanted)), "int32")
    if problem is not None:
        return problem
    reading = _reading(batch, 1 if wanted is None else 1 + wanted.shape[-1], Shaped((), jnp.float32))
    is_masked = arguments("transform", batch)[1]
    pair = jax.eval_shape(lambda part, *given: part.step_reading(*given), part, reading, is_masked, before)
    if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], Reading):
        return "whose step_reading gives no pair (Reading, state)"
    return (_changed("step_reading", "a Reading", "the head", reading, pair[0])
            or _changed("step_reading", "a state", "init", before, pair[1]))


def _propose(part: Any, batch: int) -> str | None:
    given, _ = _traced("propose", part, batch)
    return _other_candidates("step", given, batch) or _by_reading("propose", part, batch)


def _propose_reading(part: Any, batch: int) -> str | None:
    keys, _, tokens = arguments("propose", batch)
    noise = jax.eval_shape(lambda part, keys: part.noise(keys, LENGTH), part, keys)
    problem = None if noise is None else _other_fields("noise", noise, Noise, (), temperature="float32") or _differs(
        "noise's keys", noise.keys, (batch, LENGTH, 2), "uint32")
    if problem is not None:
        return problem
    reading = _reading(batch, 1, None if noise is None else noise.temperature)
    given = jax.eval_shape(lambda part, *given: part.read(*given), part, reading, tokens)
    return _other_candidates("read", given, batch)


def _other_candidates(method: str, given: Any, batch: int) -> str | None:
    return _other_fields(method, given, Candidates, (batch, LENGTH), token="int32", confidence="float32",
                         log_prob="float32", current="float32")


def _by_reading(axis: str, part: Any, batch: int) -> str | None:
    """How a part that says that it can do with a `Reading` cannot."""
    said: list[bool] = []
    jax.eval_shape(lambda part: said.append(answers.needs_logits(part)), part)  # traced: a leaf cannot say it
    if said[0]:
        return None
    missing = [method for method in _READING_METHODS[axis] if not hasattr(part, method)]
    if missing:
        return f"whose needs_logits is False but which has no {', '.join(missing)}"
    return (_transform_reading if axis == "transform" else _propose_reading)(part, batch)


def _reading(batch: int, asked: int, temperature: Any) -> Reading:
    """Shapes of a head's answer about the small block when it was asked for so many tokens of each position."""
    block = (batch, LENGTH)
    fields: Any = {
        field.name: Shaped((*block, asked) if field.name in ("ids", "logits", "noise") else block,
                           jnp.int32 if field.name in ("ids", "best", "drawn") else jnp.float32)
        for field in dataclasses.fields(Reading) if field.name != "temperature"}
    return Reading(**fields, temperature=temperature)


def _cache_policy(part: Any, batch: int) -> str | None:
    width = part.window_length(CANVAS, FIRST, LENGTH)
    if width is not None and not (isinstance(width, int) and 1 <= width <= CANVAS):
        return f"whose window_length gives {width!r}, neither None nor a whole number from 1 to the canvas' length"
    if not isinstance(part.exact, bool):
        return f"whose exact is {part.exact!r}, not True or False"
    given, _ = _traced("cache_policy", part, batch)
    return _other_fields("window", given, Window, (), refresh="bool", start="int32", end="int32")


def _smoothing(part: Any, batch: int) -> str | None:
    if not isinstance(part.soft, bool):
        return f"whose soft is {part.soft!r}, not True or False"
    given, _ = _traced("smoothing", part, batch)
    shape = (batch, LENGTH, WIDTH)
    if getattr(given, "shape", None) != shape or not jnp.issubdtype(given.dtype, jnp.floating):
        return _differs("step's inputs", given, shape, "float32")
    return None


def _stop_rule(part: Any, batch: int) -> str | None:
    reasons = part.reasons
    if not isinstance(reasons, tuple) or not all(isinstance(reason, str) for reason in reasons):
        return f'whose reasons is {reasons!r}, not a tuple of texts such as ("eos",)'
    (given, ends), _ = _traced("stop_rule", part, batch)
    fill = jax.eval_shape(lambda part: part.fill(), part)
    if getattr(given, "dtype", None) not in (bool, jnp.int32):
        return _differs("step", given, (batch,), "bool")
    return (_differs("step", given, (batch,), given.dtype.name) or _differs("ends", ends, (batch, CANVAS), "bool")
            or (None if fill is None or getattr(fill, "shape", None) == (len(reasons),)
                else _differs("fill", fill, (), "int32")))


_CHECKS: dict[str, Callable[[Any, int], str | None]] = {
    "strategy": _strategy, "cache_policy": _cache_policy, "transform": _transform, "propose": _propose,
    "smoothing": _smoothing, "stop_rule": _stop_rule}


def _other_fields(method: str, given: Any, kind: type, shape: tuple[int, ...], **dtypes: str) -> str | None:
    """How what a method gave differs from a dataclass of arrays of one shape."""
    if not isinstance(given, kind):
        return f"whose {method} gives a {type(given).__name__}, not a {kind.__name__}"
    found = (_differs(f"{method}'s {name}", getattr(given, name), shape, dtype) for name, dtype in dtypes.items())
    return next(filter(None, found), None)


def _differs(what: str, given: Any, shape: tuple[int, ...], dtype: str) -> str | None:
    found = (getattr(given, "shape", None), getattr(getattr(given, "dtype", None), "name", type(given).__name__))
    if found == (shape, dtype):
        return None
    axes = "a scalar" if not shape else f"shape {list(shape)}"
    return f"whose {what} has {'no shape' if found[0] is None else f'shape {list(found[0])}'} and dtype {found[1]}, " \
           f"not {axes} and {dtype}"


def _last_axis(array: Any) -> tuple[int, ...]:
    """The length of an axis that may have any."""
    return getattr(array, "shape", ())[-1:] or (1,)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float) or hasattr(leaf, "dtype")
