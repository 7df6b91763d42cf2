"""A plan of a machine: the generation's program compiled for hardware that need not be here, and a roofline.

Memory is exact for parameters and cache, estimated from shapes for the rest, and beside it stands what the compiler
says. Collectives and kernels are read from the compiled program. Times are the roofline's: peaks of data sheets, no
launches, no waiting, so that a real machine is slower.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from djax.contracts.keys import as_key
from djax.devices.sharding import make_mesh
from djax.engine.program import Program
from djax.errors import ArgumentError
from djax.models import Kernels, abstract_params
from djax.models.config import ModelConfig
from djax.plan import hlo
from djax.plan import topology as topologies
from djax.plan.memory import DeviceMemory
from djax.plan.request import (
    DoesNotFit,
    OnMesh,
    Request,
    Shapes,
    advice,
    count_steps,
    mesh_text,
    refuse_what_does_not_fit,
)
from djax.recipes import Recipe

TOKENS_PER_FORWARD = 3.87
"""dInfer's with a cache (arXiv 2510.08666, table 2)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One kind of denoising step, on one device."""

    positions: int
    """That it computes, in all."""
    flops: float
    bytes: float
    """In the device's memory."""
    compute_seconds: float
    exchange_seconds: float
    collectives: Mapping[str, Any] | None = None
    """By kind: count, bytes and the largest; None if nothing was compiled."""
    layer_collectives: Mapping[str, Any] | None = None
    """Collectives of one layer that is not the last."""
    kernels: Mapping[str, int] | None = None
    """Pallas kernels that it calls, and how often."""

    @property
    def seconds(self) -> float:
        """At the peaks."""
        return self.compute_seconds + self.exchange_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of one machine."""

    model: str
    topology: str
    devices: int
    mesh: Mapping[str, int]
    split: Mapping[str, int]
    """Into how many parts each logical axis is split."""
    shapes: Shapes
    canvas_length: int
    """Prompt and new tokens, rounded up to the program's."""
    device_memory: int
    """Bytes of a device that a program may use."""
    estimate: DeviceMemory
    compiled: DeviceMemory | None
    """The compiler's own figure; None if nothing was compiled."""
    compile_seconds: float | None
    steps: Mapping[str, StepPlan]
    """"refresh", a full forward, and with a cache "window"."""
    refreshes: int
    """Full forwards of a generation."""
    forwards: int
    tokens_per_forward: float
    tokens_per_second: float
    """Tokens a second of all rows, at the roofline."""
    compiler_flops: float | None
    """FLOP by the compiler's own count, which has loop bodies once; None where it does not count."""
    compiler_bytes: float | None

    @property
    def memory(self) -> DeviceMemory:
        """The compiler's, else the estimate."""
        return self.estimate if self.compiled is None else self.compiled

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, with the totals and the seconds that follow from it."""
        record = dataclasses.asdict(self)
        for name in ("estimate", "compiled"):
            if record[name] is not None:
                record[name]["total"] = getattr(self, name).total
        for name, step in self.steps.items():
            record["steps"][name]["seconds"] = step.seconds
        return record


def plan(
    config: ModelConfig, *, topology: str, mesh: str | Mapping[str, int] | None = None, batch: int = 1,
    prompt_length: int = 176, max_new_tokens: int = 1024, block_length: int | None = None,
    recipe: Recipe | None = None, tokens_per_forward: float = TOKENS_PER_FORWARD, kernels: Kernels = Kernels(),
    name: str = "", compiled: bool = True,
) -> Plan:
    """Plan a generation; the program is that of `DiffusionLM.generate` on such a mesh.

    Args:
        config: of the model.
        topology: see `djax.plan.topology.devices`.
        mesh: axis sizes, "tensor=4,expert=2", or a preset of `djax.sharding.PRESETS` over all devices; None takes
            the preset with the fastest window among those that fit.
        batch: rows.
        prompt_length: tokens of every prompt.
        max_new_tokens: positions to generate per row.
        block_length: decoded together; None is the model's own, or 64.
        recipe: which decoder; None is `dinfer()`, or `llada2()` for a model that is causal over blocks.
        tokens_per_forward: how many tokens a forward is taken to give.
        kernels: implementations; None in it picks the best for the hardware.
        name: of the model, to be shown.
        compiled: False estimates without a compiler.

    Raises:
        DoesNotFit: with the numbers, and what fits.
        ValueError: an argument is out of range, or mesh and model do not fit together.
        RuntimeError: the compiler for this topology is not installed.
    """
    request = Request.of(
        config, topology=topology, batch=batch, prompt_length=prompt_length, max_new_tokens=max_new_tokens,
        block_length=block_length, recipe=recipe, kernels=kernels, name=name)
    if not 0 < tokens_per_forward <= request.shapes.block_length:
        raise ArgumentError("tokens_per_forward", tokens_per_forward,
                            allowed=f"above 0 and at most the block length, {request.shapes.block_length}")
    sizes = request.best_sizes() if mesh is None else request.sizes(mesh)
    shared = request.on_mesh(sizes)
    refuse_what_does_not_fit(request, sizes, shared.memory, by="the estimate")
    planned = _planned(request, sizes, shared, tokens_per_forward)
    return _with_program(planned, request, sizes) if compiled else planned


def _planned(request: Request, sizes: Mapping[str, int], shared: OnMesh, tokens_per_forward: float) -> Plan:
    """All that needs no compiler."""
    steps = {
        name: StepPlan(
            positions=request.canvas.batch * width, flops=estimate.cost.flops, bytes=estimate.cost.bytes,
            compute_seconds=estimate.compute_seconds, exchange_seconds=estimate.exchange_seconds)
        for name, (width, estimate) in shared.steps.items()}
    forwards, refreshes = count_steps(request, tokens_per_forward)
    seconds = refreshes * steps["refresh"].seconds + (forwards - refreshes) * steps.get(
        "window", steps["refresh"]).seconds
    return Plan(
        model=request.name, topology=request.topology, devices=math.prod(sizes.values()), mesh=dict(sizes),
        split=dataclasses.asdict(shared.split), shapes=request.shapes, canvas_length=request.canvas.length,
        device_memory=int(request.machine.memory_bytes), estimate=shared.memory, compiled=None, compile_seconds=None,
        steps=steps, refreshes=refreshes, forwards=forwards, tokens_per_forward=tokens_per_forward,
        tokens_per_second=request.shapes.batch * request.shapes.max_new_tokens / seconds, compiler_flops=None,
        compiler_bytes=None)


def compile_program(request: Request, sizes: Mapping[str, int]) -> tuple[Any, float]:
    """The generation's program compiled for the request's hardware, and the seconds that it took.

    Raises:
        RuntimeError: the compiler is not installed.
        jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED where a TPU's compiler finds that it does not fit.
    """
    devices = topologies.devices(request.topology)
    mesh = make_mesh(sizes, devices=devices)
    program = Program(request.config, mesh=mesh, kernels=request.kernels)
    canvas = program.pad_rows(request.canvas)
    arguments = program.abstract(
        program.denoiser, abstract_params(request.config), canvas, as_key(0), request.parts,
        np.arange(canvas.batch, dtype=np.int32))  # type: ignore[arg-type]
    started = time.monotonic()
    with jax.default_device(devices[0]):  # kernels ask what they run on
        compiled = program.denoise.lower(*arguments).compile()
    return compiled, time.monotonic() - started


def _with_program(planned: Plan, request: Request, sizes: Mapping[str, int]) -> Plan:
    try:
        compiled, seconds = compile_program(request, sizes)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(
            "mesh", f"{request.name} on {request.topology} with {mesh_text(sizes)}, which the compiler refuses "
            f"({str(error).splitlines()[0]})", allowed=f"{planned.device_memory / 1e9:.2f} GB", advice=advice(request)
        ) from error
    memory = compiled_memory(compiled.memory_analysis(), planned.estimate)
    refuse_what_does_not_fit(request, sizes, memory, by="the compiler")
    bodies = hlo.generation_steps(hlo.read_module(compiled.as_text()), cached=request.window is not None)
    costs = _costs(compiled)
    return dataclasses.replace(
        planned, compiled=memory, compile_seconds=seconds, compiler_flops=costs.get("flops"),
        compiler_bytes=costs.get("bytes accessed"),
        steps={name: _with_body(step, bodies[name]) for name, step in planned.steps.items()})


def _with_body(step: StepPlan, body: hlo.Loop) -> StepPlan:
    found = body.pass_collectives()
    return dataclasses.replace(
        step, collectives=hlo.count(found), kernels=hlo.kernel_names(body.pass_kernels()),
        layer_collectives=hlo.count([one for one in found if one.layer == 0]))


def compiled_memory(analysis: Any, estimate: DeviceMemory) -> DeviceMemory:
    """A compiler's analysis; parameters and cache, which it does not tell apart, are those of the estimate."""
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    parameters, cache = min(estimate.parameters, arguments), min(estimate.cache, temporaries)
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return DeviceMemory(
        parameters=parameters, cache=cache, temporaries=temporaries - cache,
        other=arguments - parameters + results + analysis.generated_code_size_in_bytes)


def _costs(compiled: Any) -> dict[str, float]:
    costs = compiled.cost_analysis() or {}
    return dict(costs[0] if isinstance(costs, list) else costs)
