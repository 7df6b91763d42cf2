"""Collectives and kernels of a compiled module, from its text: kind, size, and the loop that holds them.

The text is that of `jax.stages.Compiled.as_text()`, for CPUs, GPUs and TPUs. They spell one thing in several ways: a
collective is an instruction of its own, a pair `-start` and `-done`, or sits in a fusion that runs as one kernel; a
group of devices is a list, an iota, or axes of a mesh.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")
"""Collectives, by XLA's names."""

_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
          "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]\w*)\[(?P<shape>[\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_PALLAS = re.compile(r'custom_call_target="(tpu_custom_call|mosaic_gpu\w*)"')
_NO_NAME = re.compile(
    r"jit\(.*\)|while|body|cond|shard_map|layer_\d+|pallas_call|mpmd_map|core_map|anonymous|moe|experts|head")
"""Scopes that a kernel may be called in."""
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One exchange between devices."""

    kind: str
    """One of `KINDS`."""
    nbytes: int
    """The whole array on one device: what is summed, what is gathered, what is there before it is scattered."""
    shapes: tuple[str, ...]
    """Shapes of the results, such as "bf16[96,2048]"; several if XLA combined several collectives."""
    group: int
    """Devices that exchange with each other."""
    scope: str
    """Scopes in which it was traced, separated by slashes."""

    @property
    def layer(self) -> int | None:
        """The scope's number of a layer; None outside of the layers."""
        found = re.search(r"\blayer_(\d+)\b", self.scope)
        return None if found is None else int(found[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A call of a Pallas kernel."""

    name: str
    """That it was given, or of the function that called it."""
    scope: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """A loop's body, or the whole module: what one pass through it does."""

    name: str
    trips: int | None
    """How often it runs, where the compiler knows."""
    instructions: int
    """Number in this body and in what it calls, inner loops included."""
    inner: tuple[Loop, ...]
    """Loops inside, in the order in which they run."""
    collectives: tuple[Collective, ...]
    """Outside of the loops inside."""
    kernels: tuple[Kernel, ...]
    """Likewise."""

    def pass_collectives(self) -> tuple[Collective, ...]:
        """Collectives of one pass; inner loops count once per trip (once if the trip count is unknown)."""
        return (*self.collectives,
                *(one for loop in self.inner for one in loop.pass_collectives() * (loop.trips or 1)))

    def pass_kernels(self) -> tuple[Kernel, ...]:
        """Kernels of one pass, counted in the same way."""
        return (*self.kernels, *(one for loop in self.inner for one in loop.pass_kernels() * (loop.trips or 1)))


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str
    opcode: str
    text: str

    @property
    def called(self) -> list[str]:
        """Computations that run when it does. Those that reduce two numbers are none."""
        branches = [name.strip().lstrip("%") for found in _BRANCHES.findall(self.text) for name in found.split(",")]
        return [*_CALLED.findall(self.text), *branches]


def read_module(text: str) -> Loop:
    """A compiled module as a tree of loops; the root is the module's entry.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError(f"text: got {text[:60]!r}; it must be a compiled module's, with an ENTRY computation")
    return _Reader(text, computations).loop("ENTRY", [entry], trips=1)


def generation_steps(module: Loop, *, cached: bool) -> dict[str, Loop]:
    """The bodies of a generation's denoising steps: "refresh", and with a cache "window" too.

    The module is that of `djax.denoise`: the largest loop of its entry is the generation. With a cache that one
    has two loops inside, full forwards first and windowed ones then; without, it is the step itself.

    Raises:
        ValueError: there are no such loops.
    """
    if not module.inner:
        raise ValueError("module: got one without a loop; it must be that of a generation")
    outer = max(module.inner, key=lambda loop: loop.instructions)
    if not cached:
        return {"refresh": outer}
    if len(outer.inner) < 2:
        raise ValueError(f"module: got {len(outer.inner)} loops inside the generation's; with a cache there are two")
    largest = sorted(outer.inner, key=lambda loop: loop.instructions, reverse=True)[:2]
    refresh, window = [loop for loop in outer.inner if loop in largest]
    return {"refresh": refresh, "window": window}


def count(collectives: Sequence[Collective]) -> dict[str, Any]:
    """By kind: how many, their bytes in all and of the largest, as JSON values."""
    return {
        kind: {"count": len(mine), "bytes": sum(one.nbytes for one in mine),
               "largest": max(one.nbytes for one in mine)}
        for kind in KINDS if (mine := [one for one in collectives if one.kind == kind])}


def kernel_names(kernels: Sequence[Kernel]) -> dict[str, int]:
    """Calls of each kernel."""
    return dict(Counter(kernel.name for kernel in kernels))


class _Reader:
    """Walks the calls from a computation, keeping apart what is in which loop."""

    def __init__(self, text: str, computations: Mapping[str, Sequence[_Instruction]]) -> None:
        self.computations, self.devices, self.functions = computations, _devices(text), _functions(text)

    def loop(self, name: str, bodies: Sequence[str], *, trips: int | None) -> Loop:
        instructions = [one for body in bodies for one in self.reached(body)]
        inner = tuple(
            self.loop(one.name, one.called, trips=_trips(one.text)) for one in instructions if one.opcode == "while")
        return Loop(
            name=name, trips=trips, inner=inner,
            instructions=len(instructions) + sum(loop.instructions for loop in inner),
            collectives=tuple(self.collective(one, kind) for one in instructions if (kind := _kind(one.opcode))),
            kernels=tuple(
                Kernel(name=self.kernel_name(one), scope=_scope(one.text)) for one in instructions
                if one.opcode == "custom-call" and _PALLAS.search(one.text)))

    def kernel_name(self, one: _Instruction) -> str:
        """The innermost scope's, where the way there was kept; else the calling function's."""
        scopes = [part for part in _scope(one.text).split("/") if part and not _NO_NAME.fullmatch(part)]
        if scopes:
            return scopes[-1]
        frame = re.search(r"stack_frame_id=(\d+)", one.text)
        return self.functions.get(frame[1], "unnamed") if frame else "unnamed"

    def reached(self, computation: str) -> Iterator[_Instruction]:
        """A computation's instructions and those of what it calls, except loops' bodies."""
        for one in self.computations.get(computation, ()):
            yield one
            if one.opcode != "while":
                for called in one.called:
                    yield from self.reached(called)

    def collective(self, one: _Instruction, kind: str) -> Collective:
        group = 2 if kind == "collective-permute" else _group(one.text) or self.devices
        shapes = _results(one)
        whole = sum(map(_nbytes, shapes)) * (group if kind == "reduce-scatter" else 1)
        return Collective(kind=kind, nbytes=whole, shapes=shapes, group=group, scope=_scope(one.text))


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    """Every computation's instructions, and the entry's name."""
    found: dict[str, list[_Instruction]] = {}
    entry = None
    for is_entry, name, body in _COMPUTATION.findall(text):
        lines = filter(None, map(_INSTRUCTION.match, body.splitlines()))
        found[name] = [_instruction(line["name"], line["rest"]) for line in lines]
        entry = name if is_entry else entry
    return found, entry


def _instruction(name: str, rest: str) -> _Instruction:
    """Result shape, opcode and the rest; a tuple's shape has spaces and brackets of its own."""
    depth, end = 0, len(rest)
    for position, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if letter == " " and not depth:
            end = position
            break
    opcode = re.match(r"([\w\-]+)\(", rest[end + 1:])
    return _Instruction(name, rest[:end], "" if opcode is None else opcode[1], rest)


def _kind(opcode: str) -> str | None:
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _results(one: _Instruction) -> tuple[str, ...]:
    """The arrays that come out. What starts one in the background gives its operands back too, before them."""
    arrays = tuple(f"{match['dtype']}[{match['shape']}]" for match in _ARRAY.finditer(one.result))
    if not one.opcode.endswith("-start") or (one.opcode == "all-reduce-start" and not one.result.startswith("((")):
        return arrays
    if one.opcode == "collective-permute-start":  # a TPU's has two semaphores behind
        return arrays[1:2]
    return arrays[len(arrays) // 2:]


def _nbytes(array: str) -> int:
    dtype, shape = array.rstrip("]").split("[")
    width = _BYTES.get(dtype, 1)  # all others, float8 and its like, are bytes
    return width * math.prod(int(size) for size in shape.split(",") if size)


def _group(text: str) -> int | None:
    """Devices of one replica group; None if all take part."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text)
    if mesh is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in named)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text)
    if iota is not None:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    return None if listed is None else len(listed[1].split(","))


def _functions(text: str) -> dict[str, str]:
    """Stack frame to the name of its function, from the tables before the computations."""

    def table(name: str) -> dict[str, str]:
        found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        return dict(line.split(" ", 1) for line in found[1].splitlines()) if found else {}

    names, places = table("FunctionNames"), table("FileLocations")

    def number(field: str, line: str) -> str:
        found = re.search(rf"\b{field}=(\d+)", line)
        return found[1] if found else ""

    functions = {}
    for frame, line in table("StackFrames").items():
        place = places.get(number("file_location_id", line), "")
        functions[frame] = names.get(number("function_name_id", place), "unnamed").strip('"')
    return functions


def _devices(text: str) -> int:
    """Devices of the module, from its header."""
    header = text.split("\n", 1)[0]
    sizes = [re.search(rf"\b{name}=(\d+)", header) for name in ("replica_count", "num_partitions")]
    return math.prod(int(size[1]) for size in sizes if size is not None)


def _trips(text: str) -> int | None:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', text)
    return None if known is None else int(known[1])


def _scope(text: str) -> str:
    found = re.search(r'op_name="([^"]*)"', text)
    return "" if found is None else found[1]
