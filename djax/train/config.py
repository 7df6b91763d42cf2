"""A run's configuration, read from TOML. Every wrong field is one line that names it."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import optax
from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from djax.errors import ArgumentError, shown

Schedule = Literal["constant", "linear", "cosine", "trapezoid"]
Objective = Literal["masked", "block"]
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Number = Annotated[float, Field(strict=True, ge=0.0, le=3.4e38, allow_inf_nan=False)]
"""One that float32 can hold."""
_FALSE_IS_NONE = BeforeValidator(lambda value: None if value is False else value)
"""TOML has no null."""
_CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True)
_OWN_OPTIONS = ("learning_rate", "weight_decay", "mask", "weight_decay_mask", "muon_weight_dimension_numbers")
"""Names that no `optimizer.options` may hold: there is a field for each, or it follows from the model."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class ModelSection:
    """Source of the model."""

    source: Annotated[str | None, _FALSE_IS_NONE] = None
    """Checkpoint directory or hub id; without it the model bundled with djax."""
    random: StrictBool = False
    """Keep the checkpoint's configuration and tokenizer, and draw fresh weights."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class DataSection:
    """Training data: a JSON Lines file, or built-in tasks."""

    path: Annotated[str | None, _FALSE_IS_NONE] = None
    """{"prompt", "answer"} or {"messages"} a line; relative to the configuration file."""
    tasks: tuple[str, ...] = ()
    """Names in `djax.tasks.TASKS`, never-ending examples."""
    row_length: Annotated[Count, Field(ge=2)] = 512
    """Tokens of a row at most: prompt, answer, EOS."""
    longest_tail: Count = 64
    """Most EOS learned after an answer."""
    group: Count = 1
    """Updates whose rows are shared out by length, which saves padding."""
    given: Annotated[Number, Field(le=1.0)] = 0.0
    """Share of the rows in which a random first part of the answer is never masked, as in block by block decoding."""

    def __post_init__(self) -> None:
        if (self.path is None) == (not self.tasks):
            raise ArgumentError("data", "neither path nor tasks" if self.path is None else "path and tasks",
                                allowed="one of them", advice="give one")


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class OptimizerSection:
    """The optimizer, its learning rate over time, and the clipping before it."""

    name: Literal["adamw", "adam", "lion", "sgd", "adafactor", "muon"] = "adamw"
    """adamw, adam, lion, sgd, adafactor or muon, as optax has them."""
    learning_rate: Number
    """The highest one."""
    schedule: Schedule = "cosine"
    """After the warm-up: constant, to zero at the last update along a line or a cosine, or constant and then along a
    line (trapezoid)."""
    warmup_steps: Whole = 0
    """First updates, in which the rate rises along a line."""
    decay_steps: Whole = 0
    """Last updates of a trapezoid, in which the rate falls."""
    weight_decay: Number = 0.0
    """Decay of matrices only, for optimizers that have one (adamw, lion, muon)."""
    clip_norm: Annotated[Number | None, _FALSE_IS_NONE] = 1.0
    """Global norm that gradients are clipped to; false for none."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further numbers and flags by the names of the optax function's arguments."""

    def __post_init__(self) -> None:
        if self.weight_decay and self.name not in ("adamw", "lion", "muon"):
            raise ArgumentError("optimizer.weight_decay", self.weight_decay,
                                allowed=f"0 with {self.name}, which has none", advice="use adamw, lion or muon")
        if bool(self.decay_steps) != (self.schedule == "trapezoid"):
            raise ArgumentError("optimizer.decay_steps", f"{self.decay_steps} with {self.schedule}",
                                allowed="at least 1 with trapezoid and 0 with others", advice="change one of them")
        known = [name for name in inspect.signature(_function(self.name)).parameters if name not in _OWN_OPTIONS]
        for name, value in self.options.items():
            if name not in known or not isinstance(value, int | float):
                raise ArgumentError(
                    f"optimizer.options.{name}", shown(value), allowed=f"a number or a flag of {', '.join(known)}",
                    advice="correct or remove it")


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class TrainingSection:
    """The run itself. Counts are updates."""

    output: str
    """Directory of the run: checkpoints, metrics, the trained model; relative to the configuration file."""
    steps: Count
    """Updates of the whole run."""
    batch_size: Count
    """Rows of an update."""
    objective: Objective = "masked"
    """The loss: "masked", with all of a row in sight but what is masked, as bidirectional models are used; or "block",
    which learns all of an answer in every pass, each block of it from what is before it (see `djax.train.block`)."""
    accumulate: Count = 1
    """Parts that a batch is cut into, one after the other, to save memory."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    """Seed of the noise, the data's order and fresh weights."""
    log_every: Count = 10
    """Updates between two lines of metrics."""
    save_every: Count = 500
    """Updates between two checkpoints."""
    keep: Count = 2
    """Checkpoints that stay."""
    remat: StrictBool = False
    """Compute a layer's activations again in the backward pass instead of keeping them."""
    vocab_chunk: Count = 8192
    """Columns of the vocabulary whose logits are held at once."""
    compute_dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, _FALSE_IS_NONE] = None
    """dtype of the forward and backward pass; master weights are float32. Without it the checkpoint's."""
    balance: Number = 0.01
    """Weight of the router's load-balance loss."""
    router_z: Number = 1e-3
    """Weight of the router's z-loss."""

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulate:
            raise ArgumentError("training.accumulate", self.accumulate, allowed="a divisor of "
                                f"batch_size = {self.batch_size}", advice="change one of them")


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class MeshSection:
    """Number of devices of each axis; their product is the number used."""

    data: Count = 1
    """Devices over which a batch's rows are split."""
    expert: Count = 1
    """Devices over which experts are split."""
    tensor: Count = 1
    """Devices over which heads, hidden units of experts and the vocabulary are split."""


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class TrainConfig:
    """A whole run."""

    data: DataSection
    optimizer: OptimizerSection
    training: TrainingSection
    model: ModelSection = ModelSection()
    mesh: Annotated[MeshSection | None, _FALSE_IS_NONE] = None
    """Without it everything is on one device."""

    def identity(self) -> dict[str, Any]:
        """Fields that a resumed run has to share: all that decides the weights after a given update."""
        fields = dataclasses.asdict(self)
        del fields["mesh"]
        for name in ("output", "log_every", "save_every", "keep", "remat", "vocab_chunk"):
            del fields["training"][name]
        if self.optimizer.schedule == "constant":  # then a longer run begins like a shorter one
            del fields["training"]["steps"]
        return {f"{section}.{name}": value for section, part in fields.items() for name, value in part.items()}


def read_config(path: Path) -> TrainConfig:
    """A run's configuration from a TOML file; relative paths in it are taken from the file's directory.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not TOML, or a field is missing, unknown, of a wrong type or out of range.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ArgumentError(str(path), f"no TOML ({error})", allowed="a TOML file", advice="correct it") from error
    try:
        config = TypeAdapter(TrainConfig).validate_python(fields)
    except ValidationError as error:
        # what does not exist first: it may be what is missing, misspelt
        first = min(error.errors(), key=lambda detail: detail["type"] != "unexpected_keyword_argument")
        described = _argument_error(first)
        raise described.renamed(f"{path}: {described.name}") from error
    here = path.resolve().parent
    data = config.data
    if data.path is not None:
        data = dataclasses.replace(data, path=str(here / data.path))
    training = dataclasses.replace(config.training, output=str(here / config.training.output))
    return dataclasses.replace(config, data=data, training=training)


def _argument_error(detail: ErrorDetails) -> ArgumentError:
    """Say what pydantic found, in the four parts of every message."""
    kind, place = detail["type"], detail["loc"]
    name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).removeprefix(".")
    if kind == "value_error":  # raised by a section about its fields together
        return detail["ctx"]["error"]
    if kind == "unexpected_keyword_argument":
        owner: Any = dict(_sections())[str(place[0])] if len(place) > 1 else TrainConfig
        known = [field.name for field in dataclasses.fields(owner)]
        near = difflib.get_close_matches(str(place[-1]), known, n=1)
        return ArgumentError(name, "a field that does not exist", allowed=", ".join(known),
                             advice=f"did you mean {near[0]}?" if near else "remove it")
    if kind == "missing":
        return ArgumentError(name, "nothing", allowed="a value", advice="add it")
    if kind in ("dataclass_type", "dict_type"):
        return ArgumentError(name, shown(detail["input"]), allowed="a table", advice=f"write [{name}]")
    limit = detail["msg"].removeprefix("Input should be ")
    return ArgumentError(name, shown(detail["input"]), advice="correct it",
                         allowed=f"a number {limit}" if limit.startswith(("greater", "less")) else limit)


def describe_fields() -> list[str]:
    """One line for each field of a configuration: its name, its type or default, what it means."""
    lines = []
    for section, kind in _sections():
        schema = TypeAdapter(kind).json_schema()
        for name, field in schema["properties"].items():
            default = field.get("default")
            given = "none" if default in (None, []) else str(default).lower()
            if name in schema.get("required", ()):
                given = f"{field['type']}, required"
            lines.append(f"{section}.{name} ({given}): {' '.join(field['description'].split())}")
    return lines


def field_names() -> list[str]:
    """Every field of a configuration, as section.field."""
    return [f"{name}.{field.name}" for name, kind in _sections() for field in dataclasses.fields(kind)]


def _sections() -> list[tuple[str, Any]]:
    """Names and dataclasses of a configuration's tables."""
    return [(name, next(kind for kind in (typing.get_args(hint) or (hint,)) if dataclasses.is_dataclass(kind)))
            for name, hint in typing.get_type_hints(TrainConfig).items()]


def learning_rate(section: OptimizerSection, steps: int) -> optax.Schedule:
    """The learning rate of each update: a linear warm-up, then the schedule to the last one."""
    rest = max(steps - section.warmup_steps, 1)
    peak = section.learning_rate
    after: optax.Schedule = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "trapezoid": lambda: optax.linear_schedule(
            peak, 0.0, section.decay_steps, transition_begin=max(rest - section.decay_steps, 0)),
    }[section.schedule]()
    if not section.warmup_steps:
        return after
    # the first update already moves: a rate of zero would waste it
    warmup = optax.linear_schedule(peak / section.warmup_steps, peak, section.warmup_steps - 1 or 1)
    return optax.join_schedules([warmup, after], [section.warmup_steps])


def _function(name: str) -> Callable[..., optax.GradientTransformation]:
    """optax's own function."""
    return getattr(optax.contrib if name == "muon" else optax, name)


def make_optimizer(section: OptimizerSection, steps: int, *, axes: Any | None = None) -> optax.GradientTransformation:
    """The optax optimizer of a configuration.

    Args:
        section: what the configuration says.
        steps: updates of the whole run.
        axes: `djax.models.logical_axes` of the model, which says what is a matrix to muon (arXiv 2502.16982): an
            expert by itself, a projection to heads as one. The embedding, the head and the norms get Adam, as there.
            None leaves muon all arrays of two axes.
    """
    arguments: dict[str, Any] = dict(section.options)
    if section.name in ("adamw", "lion"):
        arguments |= {"weight_decay": section.weight_decay, "mask": _is_matrix}
    elif section.name == "muon":
        arguments |= {"weight_decay": section.weight_decay, "weight_decay_mask": _is_matrix}
        if axes is not None:
            numbers = jax.tree.map(_muon_axes, axes, is_leaf=lambda node: isinstance(node, tuple))
            arguments["muon_weight_dimension_numbers"] = numbers
    core = _function(section.name)(learning_rate(section, steps), **arguments)
    return core if section.clip_norm is None else optax.chain(optax.clip_by_global_norm(section.clip_norm), core)


def _muon_axes(names: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """A parameter's two sides, from its axes' names: rows are outputs, the model's width is a side by itself."""
    axes = [axis for axis, name in enumerate(names) if name != "experts"]
    if "vocab" in names or len(axes) < 2:
        return None
    if names[axes[0]] == "embed":
        return optax.contrib.MuonDimensionNumbers(reduction_axis=tuple(axes[1:]), output_axis=axes[0])
    return optax.contrib.MuonDimensionNumbers(reduction_axis=axes[-1], output_axis=tuple(axes[:-1]))


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
