"""Recipes and parts from texts: what they take, and values for it.

    strategy=local_leap                       another part, with its defaults
    cache_policy=vicinity:before=8,after=4    another part and its numbers
    strategy=remasking:threshold=0.4          a part that wraps others: it wraps the one that is there
    strategy.threshold=0.8                    a number of the part that is there, or of the one that it wraps

Type hints say which values are allowed; ranges are checked by the parts themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from djax.errors import ArgumentError, shown
from djax.parts import registry

T = TypeVar("T")


def _ascii(kind: Callable[[str], T]) -> Callable[[str], T]:
    """Read numbers as they are written everywhere: Python's own readers take 1_000 and digits of other scripts too."""

    def read(word: str) -> T:
        if "_" in word or not word.isascii():
            raise ValueError(word)
        return kind(word)

    return read


_SCALARS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    type(None): ("none", lambda word: {"none": None}[word.lower()]),
    bool: ("true, false", lambda word: {"true": True, "false": False}[word.lower()]),
    int: ("an integer", _ascii(int)), float: ("a number", _ascii(float)), str: ("a text", str)}
"""How a text is read, in the order in which it is tried."""


class Taken(NamedTuple):
    """The values that a parameter of a recipe, or a field of a part, takes."""

    hint: Any
    default: Any
    """`inspect.Parameter.empty` where a value has to be given."""

    @property
    def axis(self) -> str | None:
        """The axis of the parts that it takes, one or several of them."""
        return registry.axis_of(get_args(self.hint)[0] if get_origin(self.hint) is tuple else self.hint)

    @property
    def structs(self) -> dict[str, type]:
        """The parts and schedules that it takes, by name."""
        if self.axis is not None:
            return registry.parts(self.axis)
        return {registry.snake_case(kind.__name__): kind for kind in self._kinds
                if inspect.isclass(kind) and dataclasses.is_dataclass(kind)}

    @property
    def has_default_part(self) -> bool:
        """Whether "none" is a part: the default of an axis."""
        return self.axis is not None and self.default is not inspect.Parameter.empty

    def struct(self, text: str) -> type | None:
        """The part or schedule that a text names, with or without numbers after a colon."""
        return self.structs.get(plain(text.partition(":")[0]))

    @property
    def literals(self) -> tuple[Any, ...]:
        """The constants that it takes."""
        return tuple(each for kind in self._kinds if get_origin(kind) is Literal for each in get_args(kind))

    @property
    def scalars(self) -> list[Any]:
        """The types of plain values that it takes, all where the hint says none; an array is given as one number."""
        dtypes = [kind.dtypes for kind in self._kinds if hasattr(kind, "dtypes")]
        kinds = {*self._kinds, *(float if "float32" in each else int for each in dtypes)}
        found = [kind for kind in _SCALARS if kind in kinds]
        return found if found or self.structs or self.literals else list(_SCALARS)

    @property
    def allowed(self) -> list[str]:
        """Everything that it takes, in words."""
        words = [_SCALARS[kind][0] for kind in self.scalars] + [*map(str, self.literals), *self.structs]
        return ["none", *words] if self.has_default_part else words

    @property
    def _kinds(self) -> tuple[Any, ...]:
        return get_args(self.hint) if get_origin(self.hint) in (Union, types.UnionType) else (self.hint,)


def takes(target: Any) -> dict[str, Taken]:
    """List what can be given by name to a recipe's function or a part's class."""
    if not callable(target):
        return {}
    try:
        hints = get_type_hints(target)
    except NameError:  # of an import for type checkers only
        hints = {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: Taken(hints.get(name, Any), parameter.default)
            for name, parameter in inspect.signature(target).parameters.items() if parameter.kind in named}


def make(target: Callable[..., T], texts: Mapping[str, str], *, name: str = "", around: Any = None) -> T:
    """Call a recipe's function or a part's class with values given as texts.

    Args:
        target: what to call.
        texts: values by parameter.
        name: what stands before a parameter's name in errors.
        around: a part to wrap, for parts that wrap one of their own axis.

    Raises:
        ArgumentError: an unknown parameter, a value that it does not take, or one that is missing.
    """
    taken = takes(target)
    for key in texts:
        if key not in taken:
            raise unknown(f"{name}{key}", key, taken)
    values = {key: _read(taken[key], text, name=f"{name}{key}") for key, text in texts.items()}
    for key, each in taken.items():
        if key not in values and around is not None and each.axis is not None and around[0] == each.axis:
            values[key] = (around[1],) if get_origin(each.hint) is tuple else around[1]
        elif key not in values and each.default is inspect.Parameter.empty:
            raise ArgumentError(f"{name}{key}", "nothing", allowed=", ".join(each.allowed),
                                advice=f"give it: {name}{key}=VALUE")
    return _named(lambda: target(**values), name, taken)


def assign(part: T, path: str, text: str, *, name: str = "--set ") -> T:
    """`part`, a recipe or one of its parts, with the field at a dotted path set to what a text says.

    Raises:
        ArgumentError: named by the path: no such field, or a value that it does not take.
    """
    first, _, rest = path.partition(".")
    taken = takes(type(part))
    if first not in taken:
        return _assign_inner(part, path, text, name=name)
    present = getattr(part, first)
    if not rest:
        value = _read(taken[first], text, name=f"{name}{first}", present=present)
    elif dataclasses.is_dataclass(present):
        value = assign(present, rest, text, name=f"{name}{first}.")
    else:
        raise ArgumentError(f"{name}{path}", f"a field of {shown(present)}", allowed="fields of parts and schedules",
                            advice=f"set {first} itself")
    return _named(lambda: dataclasses.replace(part, **{first: value}), name, taken)  # type: ignore[type-var]


def plain(word: str) -> str:
    """A name as it stands in tables: `Local-Leap` is local_leap."""
    return word.strip().lower().replace("-", "_")


def unknown(name: str, word: str, allowed: Iterable[str]) -> ArgumentError:
    """The refusal of a word that is none of those allowed, with the nearest of them."""
    allowed = list(allowed)
    near = difflib.get_close_matches(word, allowed, 1)
    return ArgumentError(name, shown(word), allowed=", ".join(allowed) or "nothing",
                         advice=f"did you mean {near[0]}?" if near else "give one of them")


def _assign_inner(part: T, path: str, text: str, *, name: str) -> T:
    """As `assign`, in the first of the parts that `part` wraps which has the field."""
    first = path.partition(".")[0]
    for field, inner in _wrapped(part).items():
        for index, each in enumerate(inner):
            if first in names(each):
                changed = (*inner[:index], assign(each, path, text, name=name), *inner[index + 1:])
                value = changed if isinstance(getattr(part, field), tuple) else changed[0]
                return dataclasses.replace(part, **{field: value})  # type: ignore[type-var]
    raise unknown(f"{name}{first}", first, names(part))


def _wrapped(part: Any) -> dict[str, tuple[Any, ...]]:
    """The parts that a part holds, by field."""
    held = {name: getattr(part, name) for name, each in takes(type(part)).items() if each.axis is not None}
    return {name: value if isinstance(value, tuple) else (value,) for name, value in held.items()}


def names(part: Any) -> list[str]:
    """A part's fields and those of the parts that it holds."""
    return list(dict.fromkeys([*takes(type(part)), *(
        name for inner in _wrapped(part).values() for each in inner for name in names(each))]))


def _read(taken: Taken, text: str, *, name: str, present: Any = None) -> Any:
    """The value of a text; a part goes behind those that are there where several are taken."""
    word = text.strip()
    if taken.has_default_part and word.lower() == "none":
        return taken.default
    for option in taken.literals:
        if word == str(option):
            return option
    for kind in taken.scalars:
        with contextlib.suppress(ValueError, KeyError):
            return _SCALARS[kind][1](word)
    head, _, numbers = word.partition(":")
    struct = taken.struct(word)
    if struct is None:
        raise unknown(name, head if taken.structs else word, taken.allowed)
    several = get_origin(taken.hint) is tuple
    made = make(struct, _pairs(numbers, name), name=f"{name}={head}:",
                around=None if several or taken.axis is None else (taken.axis, present))
    return (*(present or ()), made) if several else made


def _pairs(text: str, name: str) -> dict[str, str]:
    """`before=8,after=4` as a dictionary; what follows a part or schedule with numbers is its own."""
    pairs: dict[str, str] = {}
    rest = text.strip()
    while rest:
        pair, comma, rest = rest.partition(",")
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key in pairs:
            raise ArgumentError(name, f"{key} twice" if equals else shown(key),
                                allowed="NAME=VALUE after the colon, with commas between, each name once",
                                advice="write it that way")
        if ":" in value:
            value, rest = f"{value}{comma}{rest}", ""
        pairs[key] = value
    return pairs


def _named(call: Callable[[], T], name: str, taken: Mapping[str, Taken]) -> T:
    """Call; in the errors `name` stands before what is taken."""
    try:
        return call()
    except ArgumentError as error:
        raise error.renamed(f"{name}{error.name}" if error.name in taken else error.name) from error
