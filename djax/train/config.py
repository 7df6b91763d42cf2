"""A run's configuration, read from TOML. Every wrong field is one line that names it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

import jax
import optax

from djax.config import DTYPES

OPTIMIZERS = ("adamw", "adam", "lion", "sgd", "adafactor")
SCHEDULES = ("constant", "linear", "cosine")


def _at_least(owner: str, values: dict[str, tuple[float, float]]) -> None:
    for name, (value, least) in values.items():
        if not (math.isfinite(value) and value >= least):
            raise ValueError(f"{owner}.{name}: got {value}; allowed at least {least:g}; correct it")


def _one_of(owner: str, name: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise ValueError(f"{owner}.{name}: got {value!r}; allowed {', '.join(allowed)}; pick one of them")


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
    """Names in `djax.train.tasks.TASKS`, never-ending examples."""
    row_length: int = 512
    """Tokens of a row at most: prompt, answer, EOS."""
    longest_tail: int = 64
    """Most EOS learned after an answer."""

    def __post_init__(self) -> None:
        if (self.path is None) == (not self.tasks):
            raise ValueError("data: got " + ("neither path nor tasks" if self.path is None else "path and tasks")
                             + "; allowed one of them; give one")
        _at_least("data", {"row_length": (self.row_length, 2), "longest_tail": (self.longest_tail, 1)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """The optimizer, its learning rate over time, and the clipping before it."""

    name: str = "adamw"
    learning_rate: float
    schedule: str = "cosine"
    """After the warm-up: constant, or to zero at the last update along a line or a cosine."""
    warmup_steps: int = 0
    weight_decay: float = 0.0
    """Of matrices only, and of optimizers that have one (adamw, lion)."""
    clip_norm: float | None = 1.0
    """Global norm that gradients are clipped to; false for none."""

    def __post_init__(self) -> None:
        _one_of("optimizer", "name", self.name, OPTIMIZERS)
        _one_of("optimizer", "schedule", self.schedule, SCHEDULES)
        _at_least("optimizer", {
            "learning_rate": (self.learning_rate, 0), "warmup_steps": (self.warmup_steps, 0),
            "weight_decay": (self.weight_decay, 0), "clip_norm": (self.clip_norm or 0, 0)})
        if self.weight_decay and self.name not in ("adamw", "lion"):
            raise ValueError(f"optimizer.weight_decay: got {self.weight_decay}; allowed 0 with {self.name}, which has "
                             "none; use adamw or lion")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """The run itself. Counts are updates."""

    output: str
    """Directory of the run: checkpoints, metrics, the trained model; relative to the configuration file."""
    steps: int
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    remat: bool = False
    vocab_chunk: int = 8192
    compute_dtype: str | None = None
    """dtype of the forward and backward pass; master weights are float32. Without it the checkpoint's."""
    balance: float = 0.01
    """Weight of the router's load-balance loss."""
    router_z: float = 1e-3
    """Weight of the router's z-loss."""

    def __post_init__(self) -> None:
        _one_of("training", "compute_dtype", self.compute_dtype, DTYPES)
        _at_least("training", {name: (getattr(self, name), 1) for name in (
            "steps", "batch_size", "accumulate", "log_every", "save_every", "keep", "vocab_chunk")})
        _at_least("training", {name: (getattr(self, name), 0) for name in ("seed", "balance", "router_z")})
        if self.batch_size % self.accumulate:
            raise ValueError(f"training.accumulate: got {self.accumulate}; allowed a divisor of "
                             f"batch_size = {self.batch_size}; change one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSection:
    """How many devices each axis has; their product is how many are used."""

    data: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        _at_least("mesh", {name: (getattr(self, name), 1) for name in ("data", "expert", "tensor")})


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
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: got no TOML ({error}); correct it") from error
    try:
        config: TrainConfig = _build(TrainConfig, fields, where="")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    here = path.resolve().parent
    data = config.data
    if data.path is not None:
        data = dataclasses.replace(data, path=str(here / data.path))
    training = dataclasses.replace(config.training, output=str(here / config.training.output))
    return dataclasses.replace(config, data=data, training=training)


def _build(section: Any, fields: Any, *, where: str) -> Any:
    """A section's dataclass from a table."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: got {fields!r:.60}; allowed a table; write [{where}]")
    known = {field.name: field for field in dataclasses.fields(section)}
    prefix = f"{where}." if where else ""
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it"
            raise ValueError(f"{prefix}{name}: got a field that does not exist; allowed {', '.join(known)}; {hint}")
    for name, field in known.items():
        if name not in fields and field.default is dataclasses.MISSING:
            raise ValueError(f"{prefix}{name}: got nothing; allowed {_kind(field.type)}; add it")
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
    if typing.get_origin(kind) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: got {value!r:.60}; allowed {_kind(kind)}; correct it")


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
    }[section.schedule]()
    if not section.warmup_steps:
        return after
    # the first update already moves: a rate of zero would waste it
    warmup = optax.linear_schedule(peak / section.warmup_steps, peak, section.warmup_steps - 1 or 1)
    return optax.join_schedules([warmup, after], [section.warmup_steps])


def make_optimizer(section: OptimizerSection, steps: int) -> optax.GradientTransformation:
    """The optax optimizer of a configuration."""
    rate = learning_rate(section, steps)
    decay: dict[str, Any] = {} if section.name not in ("adamw", "lion") else {
        "weight_decay": section.weight_decay, "mask": _is_matrix}
    core = getattr(optax, section.name)(rate, **decay)
    return core if section.clip_norm is None else optax.chain(optax.clip_by_global_norm(section.clip_norm), core)


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
