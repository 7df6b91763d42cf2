"""Whole generation programs compiled for a GPU that is not here, and what can be read from them.

XLA's dump has the thunks, in the order in which they are launched: every kernel, copy and library call, inside the
loops and command buffers that hold them.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from djax import recipes, transforms
from djax.contracts.canvas import Canvas
from djax.loop.denoise import denoise
from djax.models import Kernels, ModelDenoiser, abstract_params, build
from djax.models.config import LladaMoeConfig
from djax.plan.topology import compile_for, devices
from djax.recipes import Recipe

FULL_SIZE = LladaMoeConfig(
    vocab_size=157184, hidden_size=2048, num_layers=16, num_heads=16, num_kv_heads=16, head_dim=128,
    num_experts=64, experts_per_token=8, expert_size=1024, rms_norm_eps=1e-5, rope_theta=50000.0,
    max_positions=8192, mask_id=156895, eos_id=156892, pad_id=156892)
ONE_COMMAND_BUFFER = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE",
    "xla_gpu_graph_min_graph_size": "1"}
"""XLA's defaults, and loops: what `--xla_gpu_enable_command_buffer=+WHILE` says on a command line."""

CONTROL = ("kWhile", "kSequential", "kConditional", "kCommandBuffer")
"""Thunks that launch nothing themselves."""


@dataclasses.dataclass
class Thunk:
    """A node of the dump: a loop or a command buffer has the thunks it holds."""

    kind: str
    name: str
    inner: list[Thunk] = dataclasses.field(default_factory=list)

    def launches(self) -> list[Thunk]:
        """What is launched in one pass through it, nested loops once."""
        own = [] if self.kind in CONTROL else [self]
        return own + [launch for thunk in self.inner for launch in thunk.launches()]

    def find(self, kind: str) -> list[Thunk]:
        """All thunks of a kind, itself included."""
        return [self] * (self.kind == kind) + [found for thunk in self.inner for found in thunk.find(kind)]


@dataclasses.dataclass
class Program:
    text: str
    """The module as it was scheduled."""
    thunks: Thunk
    temporary_bytes: int
    argument_bytes: int
    alias_bytes: int

    def innermost_loops(self) -> list[Thunk]:
        """Loops without a loop inside: the refresh steps, then the window steps."""
        return [loop for loop in self.thunks.find("kWhile") if len(loop.find("kWhile")) == 1]


def parse_thunks(text: str) -> Thunk:
    """The tree that the indentation of a dump draws."""
    root = Thunk("kSequential", "")
    stack: list[tuple[int, Thunk]] = [(-1, root)]
    for line in text.splitlines():
        match = re.match(r"( *)\d+: (k\w+)\s+\[.*?\]\s*(\S*)", line)
        if match is None:
            continue
        depth, thunk = len(match[1]), Thunk(match[2], match[3])
        while stack[-1][0] >= depth:
            stack.pop()
        stack[-1][1].inner.append(thunk)
        stack.append((depth, thunk))
    return root


@functools.cache
def generation(
    *, layers: int, recipe: Recipe | None = None, kernels: Kernels = Kernels(), command_buffer: bool = False,
    prompt: int = 48, new_tokens: int = 1152, block_length: int = 64,
) -> Program:
    """The program that decodes one row with `layers` layers of LLaDA-MoE's full size, for one H200."""
    config = dataclasses.replace(FULL_SIZE, num_layers=layers)
    denoiser = ModelDenoiser(nnx.split(build(config, kernels=kernels))[0])
    canvas = Canvas.from_prompts([[1] * prompt], max_new_tokens=new_tokens, block_length=block_length,
                                 mask_id=config.mask_id, pad_id=config.pad_id, bucket=False)
    chosen = recipes.dinfer(smoothing=None) if recipe is None else recipe

    def run(params: Any, canvas: Canvas, words: jax.Array) -> Any:
        return denoise(
            denoiser, params, canvas, jax.random.wrap_key_data(words), strategy=chosen.strategy,
            cache_policy=chosen.cache_policy, smoothing=chosen.smoothing,
            transform=transforms.Chain((transforms.ForbidTokens(jnp.array([config.mask_id])), chosen.transform)))

    with tempfile.TemporaryDirectory() as directory:
        options: dict[str, Any] = {"xla_dump_to": directory} | (ONE_COMMAND_BUFFER if command_buffer else {})
        words = jax.ShapeDtypeStruct((2,), jnp.uint32)
        compiled = compile_for(
            devices("h200:1")[0], run, (abstract_params(config), canvas, words), options=options)
        dumps = list(Path(directory).glob("*jit_run*.thunk_sequence_after_thunk_passes.txt"))
        assert len(dumps) == 1, dumps
        thunks = parse_thunks(dumps[0].read_text("utf-8"))
    memory = compiled.memory_analysis()
    return Program(
        text=compiled.as_text(), thunks=thunks, temporary_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes, alias_bytes=memory.alias_size_in_bytes)
