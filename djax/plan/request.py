"""The planned generation, and whether and where it fits: all that needs shapes and a mesh, and no compiler."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from djax import recipes
from djax.contracts.canvas import Canvas
from djax.contracts.types import StepInfo
from djax.devices.sharding import PRESETS, mesh_axes, parse_mesh, preset_sizes, rules_for, shardings
from djax.engine.options import Sampling, check_block_length, resolve
from djax.errors import ArgumentError, check_integer
from djax.loop.state import Parts
from djax.models import Kernels, abstract_params, logical_axes, parallel_on
from djax.models.config import ModelConfig
from djax.plan import topology as topologies
from djax.plan.machines import Machine, machine
from djax.plan.memory import DeviceMemory, estimate_device_memory
from djax.plan.roofline import Estimate, Split, estimate_forward
from djax.recipes import Recipe


class DoesNotFit(ArgumentError):
    """A generation needs more memory than its devices have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """The generation to plan."""

    batch: int
    prompt_length: int
    max_new_tokens: int
    block_length: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_integer(field.name, getattr(self, field.name), 1)


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """Consequences of a request on a mesh."""

    split: Split
    memory: DeviceMemory
    steps: Mapping[str, tuple[int, Estimate]]
    """Positions and roofline of every kind of step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The question, on whatever mesh."""

    name: str
    config: ModelConfig
    topology: str
    machine: Machine
    shapes: Shapes
    recipe: Recipe
    kernels: Kernels
    canvas: Canvas
    parts: Parts

    @classmethod
    def of(
        cls, config: ModelConfig, *, topology: str, batch: int, prompt_length: int, max_new_tokens: int,
        block_length: int | None = None, recipe: Recipe | None = None, kernels: Kernels = Kernels(), name: str = "",
    ) -> Request:
        """Checked, with the canvas and the parts that `generate` would make."""
        block = check_block_length(config, block_length)
        shapes = Shapes(batch=batch, prompt_length=prompt_length, max_new_tokens=max_new_tokens, block_length=block)
        if prompt_length + max_new_tokens > config.max_positions:
            raise ArgumentError("max_new_tokens", f"{max_new_tokens} after a prompt of {prompt_length} tokens",
                                allowed=f"{config.max_positions} positions in all", advice="shorten one of them")
        recipe = recipes.default_for(config) if recipe is None else recipe
        call = resolve(Sampling(recipe=recipe, block_length=block), config, vocab_limit=config.vocab_size)
        return cls(
            name=name or config.architecture, config=config, topology=topology, machine=machine(topology),
            shapes=shapes, recipe=recipe, kernels=kernels, parts=call.parts,
            canvas=call.canvas([[0] * prompt_length] * batch, max_new_tokens=max_new_tokens))

    @property
    def window(self) -> int | None:
        """Positions of a windowed step; None without a cache, or where a window is the whole canvas."""
        window = self.recipe.cache_policy.window_length(
            self.canvas.length, self.canvas.first_block, self.canvas.block_length)
        return None if window == self.canvas.length else window

    def on(self, topology: str) -> Request:
        """Ask about other hardware."""
        return dataclasses.replace(self, topology=topology, machine=machine(topology))

    def sizes(self, mesh: str | Mapping[str, int]) -> dict[str, int]:
        """Axis sizes; ones make an axis for a single device.

        Raises:
            ValueError: not a mesh, or not one of the topology's devices.
        """
        count = topologies.device_count(self.topology)
        sizes = dict(mesh) if isinstance(mesh, Mapping) else parse_mesh(mesh, devices=count)
        if math.prod(sizes.values()) > count:
            raise ArgumentError("mesh", f"{mesh_text(sizes)}, {math.prod(sizes.values())} devices",
                                allowed=f"{count}, the devices of {self.topology}", advice="use a smaller mesh")
        return sizes or {"data": 1}

    def on_mesh(self, sizes: Mapping[str, int]) -> OnMesh:
        """Memory and roofline on a mesh.

        Raises:
            ValueError: the model cannot be split so.
        """
        config, canvas = self.config, self.canvas
        split, parameter_bytes = split_parameters(config, sizes)
        batch = -(-canvas.batch // split.batch) * split.batch
        memory = estimate_device_memory(
            config, batch=batch, canvas_length=canvas.length, block_length=canvas.block_length, recipe=self.recipe,
            parameter_bytes=parameter_bytes, split=split, vector_memory_bytes=self.machine.vector_memory_bytes)
        soft = self.recipe.smoothing.soft
        widths = {"refresh": canvas.length} | ({} if self.window is None else {"window": self.window})
        steps = {
            name: (width, estimate_forward(
                config, self.machine, batch=batch, window=width, context=canvas.length, expected=soft,
                head_rows=width if soft else canvas.block_length, split=split))
            for name, width in widths.items()}
        return OnMesh(split=split, memory=memory, steps=steps)

    def fitting(self) -> list[tuple[str, dict[str, int], OnMesh]]:
        """Presets over all devices on which the model can be split and fits, the fastest window first."""
        count, found = topologies.device_count(self.topology), []
        for preset in PRESETS:
            try:
                sizes = preset_sizes(preset, count) or {"data": 1}
                shared = self.on_mesh(sizes)
            except ValueError:
                continue
            if shared.memory.total <= self.machine.memory_bytes:
                found.append((preset, sizes, shared))
        return sorted(found, key=lambda entry: list(entry[2].steps.values())[-1][1].seconds)

    def best_sizes(self) -> dict[str, int]:
        """The mesh that `plan` takes if it is given none: where nothing fits, all devices in one tensor axis."""
        fitting = self.fitting()
        return fitting[0][1] if fitting else {"tensor": topologies.device_count(self.topology)}


def refuse_what_does_not_fit(request: Request, sizes: Mapping[str, int], memory: DeviceMemory, *, by: str) -> None:
    """Raise `DoesNotFit`, with the nearest preset or topology that fits, if `memory` is more than a device has."""
    limit = request.machine.memory_bytes
    if memory.total <= limit:
        return
    parts = ", ".join(f"{name} {getattr(memory, name) / 1e9:.2f}" for name in (
        "parameters", "cache", "other", "temporaries"))
    raise DoesNotFit(
        "mesh", f"{request.name} on {request.topology} with {mesh_text(sizes)}: {memory.total / 1e9:.2f} GB a device "
        f"by {by} ({parts} GB)", allowed=f"{limit / 1e9:.2f} GB", advice=advice(request))


def advice(request: Request) -> str:
    """The nearest preset or topology that fits, in words."""
    for name in (request.topology, *topologies.larger_than(request.topology)):
        fitting = request.on(name).fitting()
        if fitting:
            preset, sizes, shared = fitting[0]
            return (f"use --topology {name} --mesh {preset} ({mesh_text(sizes)}): "
                    f"{shared.memory.total / 1e9:.2f} GB a device by the estimate")
    return "no usual size of this hardware holds it: lower the batch or the lengths"


@functools.cache
def _parameters(config: ModelConfig) -> tuple[Any, Any]:
    """Logical axes and shapes of all parameters; a search looks at them on one mesh after the other."""
    return logical_axes(config), abstract_params(config)


def split_parameters(config: ModelConfig, sizes: Mapping[str, int]) -> tuple[Split, int]:
    """Into how many parts each logical axis is split on a mesh, and the bytes of one device's parameters.

    Raises:
        ValueError: the model cannot be split so.
    """
    # an abstract mesh has all that these ask of one
    mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    axes, shapes = _parameters(config)
    rules = rules_for(axes, shapes, mesh)
    places = jax.tree.leaves(shardings(axes, shapes, mesh=mesh, rules=rules))
    nbytes = sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                 for leaf, place in zip(jax.tree.leaves(shapes), places, strict=True))
    parallel = parallel_on(mesh, rules, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads)
    axes_of = vars(parallel) | {"batch": mesh_axes("batch", mesh, rules)}
    return Split(**{field.name: math.prod(sizes[axis] for axis in axes_of[field.name])
                    for field in dataclasses.fields(Split)}), nbytes


def count_steps(request: Request, tokens_per_forward: float) -> tuple[int, int]:
    """Forwards of a generation in which every forward gives so many tokens, and how many of them are full.

    The cache policy says which.
    """
    canvas = request.canvas
    blocks = -(-request.shapes.max_new_tokens // canvas.block_length)
    steps = max(1, round(canvas.block_length / tokens_per_forward))
    policy = request.recipe.cache_policy

    def refreshes(block: Any, step: Any) -> Any:
        info = StepInfo(
            row_step=jnp.full(canvas.batch, block * steps + step, jnp.int32), step_in_block=step, block=block,
            block_start=canvas.first_block + block * canvas.block_length,
            is_open=jnp.ones((canvas.batch, canvas.block_length), bool))
        return policy.window(info, canvas.length, canvas.block_length).refresh

    block, step = (jnp.asarray(grid.ravel(), jnp.int32) for grid in np.indices((blocks, steps)))
    full = int(jax.vmap(refreshes)(block, step).sum())
    return blocks * steps, full


def mesh_text(sizes: Mapping[str, int]) -> str:
    """A mesh in the form that `parse_mesh` reads."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())
