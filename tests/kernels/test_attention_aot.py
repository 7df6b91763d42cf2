"""Attention compiled for hardware that is not here: what the programs hold, read from their text."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from djax.contracts.cache import LayerCache
from djax.models.layers.attention import Attention
from djax.models.layers.basic import rms_norm
from djax.plan.topology import compile_for, devices, missing_compiler
from kernels_pallas import attention, attention_choice
from kernels_pallas.attention.support import unsupported_by_cudnn
from tests.support.gpu_program import FULL_SIZE

needs_h200 = pytest.mark.skipif(missing_compiler("h200:1") is not None, reason=str(missing_compiler("h200:1")))
needs_v5e = pytest.mark.skipif(missing_compiler("v5e:2x4") is not None, reason=str(missing_compiler("v5e:2x4")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    batch: int = 1
    window: int
    length: int
    groups: int = 16
    block_length: int | None = None

    def operands(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """query, key, value, key_mask and window_start."""
        query = jax.ShapeDtypeStruct((self.batch, self.window, 16, 128), jnp.bfloat16)
        key = jax.ShapeDtypeStruct((self.batch, self.length, self.groups, 128), jnp.bfloat16)
        mask = jax.ShapeDtypeStruct((self.batch, self.length), jnp.bool_)
        return query, key, key, mask, jax.ShapeDtypeStruct((), jnp.int32)


def program(topology: str, shape: Shape, *, implementation: str | None = None) -> Any:
    """One call, compiled."""

    def call(query: Any, key: Any, value: Any, key_mask: Any, window_start: Any) -> Any:
        return attention(
            query, key, value, key_mask=key_mask, implementation=implementation, block_length=shape.block_length,
            window_start=None if shape.block_length is None else window_start)

    return compile_for(devices(topology)[0], call, shape.operands())


def instructions(text: str) -> list[tuple[str, str]]:
    """(result, opcode) of what the entry computation runs."""
    entry = text[text.index("\nENTRY") :]
    found = re.findall(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(", entry, flags=re.M)
    free = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple"}
    return [(result, opcode) for result, opcode in found if opcode not in free]


def holds_scores(text: str, shape: Shape) -> bool:
    """Whether any array, inside a fusion too, has a number for each query and key."""
    return re.search(rf"\[(\d+,)*{shape.window},{shape.length}\]", text) is not None


SHAPES = [
    Shape(window=96, length=1200),
    Shape(window=32, length=4096),
    Shape(window=128, length=512, batch=8),
    Shape(window=96, length=1200, groups=4, block_length=32),
]


@needs_h200
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_window_on_a_gpu_takes_one_kernel_and_no_scores(shape: Shape) -> None:
    compiled = program("h200:1", shape)
    text = compiled.as_text()
    ran = instructions(text)
    assert sum(opcode == "custom-call" for _, opcode in ran) == 1
    assert "mosaic_gpu" in text
    assert not holds_scores(text, shape)
    assert not any(opcode in ("copy", "transpose") for _, opcode in ran)
    canvas = f"bf16[{shape.batch},{shape.length},{shape.groups},128]"
    assert not any(canvas in result for result, _ in ran), "keys or values are copied"
    assert len(ran) <= (5 if shape.block_length is None else 7)
    # partial results of the splits, in float32: never more than one for each of the GPU's processors
    assert compiled.memory_analysis().temp_size_in_bytes < 132 * (64 * 129 * 4) + 10**5


@needs_h200
def test_without_the_kernel_there_are_scores() -> None:
    """What the tests above would see."""
    shape = SHAPES[0]
    compiled = program("h200:1", shape, implementation="xla")
    assert holds_scores(compiled.as_text(), shape)


@needs_h200
@pytest.mark.parametrize("shape", [
    Shape(window=1200, length=1200), Shape(window=4096, length=4096, batch=8)], ids=str)
def test_a_refresh_on_a_gpu_holds_no_scores(shape: Shape) -> None:
    compiled = program("h200:1", shape, implementation="mosaic_gpu")
    assert not holds_scores(compiled.as_text(), shape)
    assert compiled.memory_analysis().temp_size_in_bytes < 10**6


@needs_h200
def test_cudnn_is_one_call_and_a_mask() -> None:
    shape = Shape(window=1200, length=1200)
    reason = unsupported_by_cudnn("gpu", *shape.operands()[:4], None)
    if reason is not None:
        pytest.skip(reason)
    compiled = program("h200:1", shape, implementation="cudnn")
    assert "__cudnn$fmha" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * 2 * shape.window * shape.length


@needs_v5e
@pytest.mark.parametrize(("shape", "name"), [
    (Shape(window=96, length=1200), "xla"), (Shape(window=1280, length=1280), "pallas_tpu"),
], ids=str)
def test_on_a_tpu(shape: Shape, name: str) -> None:
    query, key, value, mask, _ = shape.operands()
    assert attention_choice(query, key, value, key_mask=mask, platform="tpu") == name
    compiled = program("v5e:2x4", shape)
    assert ("tpu_custom_call" in compiled.as_text()) == (name == "pallas_tpu")
    if name == "pallas_tpu":
        assert not holds_scores(compiled.as_text(), shape)
        assert compiled.memory_analysis().temp_size_in_bytes < 10**6


WINDOW, LENGTH = 96, 1200


@functools.cache
def blocks(number: int) -> Any:
    """Attention blocks of LLaDA-MoE on a window, one after the other, each with a cache that it may overwrite."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Attention(FULL_SIZE, rngs=nnx.Rngs(0))))
    shape = jax.ShapeDtypeStruct
    canvas = shape((1, LENGTH, 16, 128), jnp.bfloat16)

    def run(params: Any, norms: Any, x: Any, rotation: Any, key_mask: Any, start: Any, write: Any, caches: Any) -> Any:
        new = []
        for block, norm, cache in zip(params, norms, caches, strict=True):
            mixed, written = nnx.merge(graphdef, block)(
                rms_norm(x, norm, eps=1e-5), rotation=rotation, key_mask=key_mask, window_start=start, write=write,
                cache=cache)
            x = x + mixed
            new.append(written)
        return x, new

    angles = shape((1, WINDOW, 128), jnp.float32)
    operands = (
        [params] * number, [shape((2048,), jnp.bfloat16)] * number, shape((1, WINDOW, 2048), jnp.bfloat16),
        (angles, angles), shape((1, LENGTH), jnp.bool_), shape((), jnp.int32), shape((1, WINDOW), jnp.bool_),
        [LayerCache(key=canvas, value=canvas)] * number)
    return compile_for(devices("h200:1")[0], run, operands, donate=(7,))


@needs_h200
def test_a_block_is_eleven_kernels() -> None:
    one, two = (instructions(blocks(number).as_text()) for number in (1, 2))
    assert len(two) - len(one) <= 11, two
    # what layers share: which tiles of keys there are, and the mask in float32
    assert len(one) <= 11 + 3, one


@needs_h200
def test_a_block_writes_its_window_into_the_cache() -> None:
    compiled = blocks(2)
    cache_bytes = 2 * LENGTH * 16 * 128 * 2
    assert compiled.memory_analysis().alias_size_in_bytes == 2 * cache_bytes
    whole = [opcode for result, opcode in instructions(compiled.as_text()) if f"[1,{LENGTH},16,128]" in result]
    assert whole == ["fusion"] * 4, "of each layer's keys and values, the write in place"
    assert len(re.findall(rf"bf16\[1,{LENGTH},16,128\]\S* dynamic-update-slice\(", compiled.as_text())) == 4
