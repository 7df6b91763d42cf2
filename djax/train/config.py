"""A run's configuration, read from TOML. Every wrong field is one line that names it."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

from djax.errors import ArgumentError, check_choice, check_integer, check_number, shown
from djax.models.config import DTYPES

OPTIMIZERS = ("adamw", "adam", "lion", "sgd", "adafactor", "muon")
OBJECTIVES = ("masked", "block")
SCHEDULES = ("constant", "linear", "cosine", "trapezoid")
_OWN_OPTIONS = ("learning_rate", "weight_decay", "mask", "weight_decay_mask", "muon_weight_dimension_numbers")
"""What no `optimizer.options` may hold: there is a field for it, or it follows from the model."""


def _integers(section: str, owner: object, least: int, *names: str) -> None:
    for name in names:
        check_integer(f"{section}.{name}", getattr(owner, name), least, advice="correct it")


def _numbers(section: str, owner: object, *names: str, high: float = math.inf) -> None:
    for name in names:
        check_number(f"{section}.{name}", getattr(owner, name), 0.0, high, advice="correct it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Where the model comes from."""

    source: str | None = None
    """Checkpoint directory or hub id; without it the model bundled with djax."""
    random: bool = False
    """Keep the checkpoint's configuration and tokenizer, and draw fresh weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSection:
    """What is learned: a JSON Lines file, or built-in tasks."""

    path: str | None = None
    """{"prompt", "answer"} or {"messages"} a line; relative to the configuration file."""
    tasks: tuple[str, ...] = ()
    """Names in `djax.tasks.TASKS`, never-ending examples."""
    row_length: int = 512
    """Tokens of a row at most: prompt, answer, EOS."""
    longest_tail: int = 64
    """Most EOS learned after an answer."""
    group: int = 1
    """Updates whose rows are shared out by length, which saves padding."""
    given: float = 0.0
    """Share of the rows in which a random first part of the answer is never masked, as in block by block decoding."""

    def __post_init__(self) -> None:
        if (self.path is None) == (not self.tasks):
            raise ArgumentError("data", "neither path nor tasks" if self.path is None else "path and tasks",
                                allowed="one of them", advice="give one")
        _integers("data", self, 2, "row_length")
        _integers("data", self, 1, "longest_tail", "group")
        _numbers("data", self, "given", high=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """The optimizer, its learning rate over time, and the clipping before it."""

    name: str = "adamw"
    """adamw, adam, lion, sgd, adafactor or muon, as optax has them."""
    learning_rate: float
    """The highest one."""
    schedule: str = "cosine"
    """After the warm-up: constant, to zero at the last update along a line or a cosine, or constant and then along a
    line (trapezoid)."""
    warmup_steps: int = 0
    """First updates, in which the rate rises along a line."""
    decay_steps: int = 0
    """Last updates of a trapezoid, in which the rate falls."""
    weight_decay: float = 0.0
    """Of matrices only, and of optimizers that have one (adamw, lion, muon)."""
    clip_norm: float | None = 1.0
    """Global norm that gradients are clipped to; false for none."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further numbers and flags by the names of the optax function's arguments."""

    def __post_init__(self) -> None:
        check_choice("optimizer.name", self.name, OPTIMIZERS)
        check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        _integers("optimizer", self, 0, "warmup_steps", "decay_steps")
        _numbers("optimizer", self, "learning_rate", "weight_decay", *[] if self.clip_norm is None else ["clip_norm"])
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """The run itself. Counts are updates."""

    output: str
    """Directory of the run: checkpoints, metrics, the trained model; relative to the configuration file."""
    steps: int
    """Updates of the whole run."""
    batch_size: int
    """Rows of an update."""
    objective: str = "masked"
    """The loss: "masked", with all of a row in sight but what is masked, as bidirectional models are used; or "block",
    which learns all of an answer in every pass, each block of it from what is before it (see `djax.train.block`)."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after the other, to save memory."""
    seed: int = 0
    """Of the noise, the data's order and fresh weights."""
    log_every: int = 10
    """Updates between two lines of metrics."""
    save_every: int = 500
    """Updates between two checkpoints."""
    keep: int = 2
    """Checkpoints that stay."""
    remat: bool = False
    """Compute a layer's activations again in the backward pass instead of keeping them."""
    vocab_chunk: int = 8192
    """Columns of the vocabulary whose logits are held at once."""
    compute_dtype: str | None = None
    """dtype of the forward and backward pass; master weights are float32. Without it the checkpoint's."""
    balance: float = 0.01
    """Weight of the router's load-balance loss."""
    router_z: float = 1e-3
    """Weight of the router's z-loss."""

    def __post_init__(self) -> None:
        check_choice("training.objective", self.objective, OBJECTIVES)
        if self.compute_dtype is not None:
            check_choice("training.compute_dtype", self.compute_dtype, DTYPES)
        _integers("training", self, 1, "steps", "batch_size", "accumulate", "log_every", "save_every", "keep",
                  "vocab_chunk")
        check_integer("training.seed", self.seed, 0, 2**63 - 1, advice="correct it")
        _numbers("training", self, "balance", "router_z")
        if self.batch_size % self.accumulate:
            raise ArgumentError("training.accumulate", self.accumulate, allowed="a divisor of "
                                f"batch_size = {self.batch_size}", advice="change one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSection:
    """How many devices each axis has; their product is how many are used."""

    data: int = 1
    """Devices over which a batch's rows are split."""
    expert: int = 1
    """Devices over which experts are split."""
    tensor: int = 1
    """Devices over which heads, hidden units of experts and the vocabulary are split."""

    def __post_init__(self) -> None:
        _integers("mesh", self, 1, "data", "expert", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    data: DataSection
    optimizer: OptimizerSection
    training: TrainingSection
    model: ModelSection = ModelSection()
    mesh: MeshSection | None = None
    """Without it everything is on one device."""

    def identity(self) -> dict[str, Any]:
        """What a resumed run has to share: all that decides the weights after a given update."""
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
        config: TrainConfig = _build(TrainConfig, fields, where="")
    except ArgumentError as error:
        raise error.renamed(f"{path}: {error.name}") from error
    here = path.resolve().parent
    data = config.data
    if data.path is not None:
        data = dataclasses.replace(data, path=str(here / data.path))
    training = dataclasses.replace(config.training, output=str(here / config.training.output))
    return dataclasses.replace(config, data=data, training=training)


def describe_fields() -> list[str]:
    """One line for each field of a configuration: its name, its type or default, what it means."""
    lines = []
    for name, kind in _sections():
        documented = _docstrings(kind)
        lines += [f"{name}.{field.name} ({_default(field)}): {documented[field.name]}"
                  for field in dataclasses.fields(kind)]
    return lines


def field_names() -> list[str]:
    """Every field of a configuration, as section.field."""
    return [f"{name}.{field.name}" for name, kind in _sections() for field in dataclasses.fields(kind)]


def _sections() -> list[tuple[str, Any]]:
    """Names and dataclasses of a configuration's tables."""
    return [(name, next(kind for kind in (typing.get_args(hint) or (hint,)) if dataclasses.is_dataclass(kind)))
            for name, hint in typing.get_type_hints(TrainConfig).items()]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "none"
    if field.default is dataclasses.MISSING:
        return f"{_kind(field.type)}, required"
    return "none" if field.default in (None, ()) else str(field.default).lower()


def _docstrings(section: type) -> dict[str, str]:
    """Texts below the fields of a dataclass; Python keeps them in the source only."""
    body = ast.parse(inspect.getsource(section)).body[0].body  # type: ignore[attr-defined]
    return {
        first.target.id: " ".join(str(second.value.value).split())
        for first, second in itertools.pairwise(body)
        if isinstance(first, ast.AnnAssign) and isinstance(first.target, ast.Name)
        and isinstance(second, ast.Expr) and isinstance(second.value, ast.Constant)}


def _build(section: Any, fields: Any, *, where: str) -> Any:
    """A section's dataclass from a table."""
    if not isinstance(fields, dict):
        raise ArgumentError(where, shown(fields), allowed="a table", advice=f"write [{where}]")
    known = {field.name: field for field in dataclasses.fields(section)}
    prefix = f"{where}." if where else ""
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it"
            raise ArgumentError(f"{prefix}{name}", "a field that does not exist", allowed=", ".join(known), advice=hint)
    for name, field in known.items():
        if name not in fields and field.default is field.default_factory is dataclasses.MISSING:
            raise ArgumentError(f"{prefix}{name}", "nothing", allowed=_kind(field.type), advice="add it")
    hints = typing.get_type_hints(section)
    return section(**{name: _value(hints[name], value, where=prefix + name) for name, value in fields.items()})


def _value(hint: Any, value: Any, *, where: str) -> Any:
    """A TOML value as a field's type."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and value is False:  # TOML has no null
        return None
    kind = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where=where)
    if typing.get_origin(kind) is dict:
        if isinstance(value, dict):
            return value
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ArgumentError(where, shown(value), allowed=_kind(kind), advice="correct it")


def _kind(kind: Any) -> str:
    text = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    words = {"int": "an integer", "float": "a number", "str": "a text", "bool": "true or false",
             "tuple": "a list of texts"}
    return next((word for name, word in words.items() if text.startswith(name)), "a table")


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
