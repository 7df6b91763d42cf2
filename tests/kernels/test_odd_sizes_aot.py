"""Sizes that are no multiple of a tile, compiled for hardware that is not here: what is chosen is also accepted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from djax.plan.topology import compile_for, devices, missing_compiler
from kernels_pallas import attention, attention_choice, moe, unembed, unembed_choice

Shape = jax.ShapeDtypeStruct


def needs(name: str) -> pytest.MarkDecorator:
    reason = missing_compiler(name)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


TOPOLOGIES = [pytest.param("h200:1", marks=needs("h200:1")),
              pytest.param("v5e:1x1", marks=[needs("v5e:1x1"), pytest.mark.slow])]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("window", "length", "groups", "block_length"), [
    (9, 12, 16, None), *(slow(*case) for case in (
        (1, 1, 16, None), (3, 5, 16, None), (12, 64, 16, None), (64, 12, 16, None), (20, 201, 16, 20), (65, 65, 4, 4),
        (7, 200, 4, None), (200, 203, 16, None), (4, 1200, 16, 4), (193, 256, 16, None)))])
def test_attention(topology: str, window: int, length: int, groups: int, block_length: int | None) -> None:
    def call(query: Any, key: Any, mask: Any, start: Any) -> Any:
        return attention(query, key, key, key_mask=mask, block_length=block_length,
                         window_start=None if block_length is None else start)

    query, key = (Shape((1, rows, heads, 128), jnp.bfloat16) for rows, heads in ((window, 16), (length, groups)))
    mask = Shape((1, length), jnp.bool_)
    compiled = compile_for(devices(topology)[0], call, (query, key, mask, Shape((), jnp.int32)))
    name = attention_choice(query, key, key, key_mask=mask, platform="gpu")
    assert not topology.startswith("h200") or name != "mosaic_gpu" or "mosaic_gpu" in compiled.as_text()


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("rows", "vocabulary", "dtype"), [
    (9, 1001, "bfloat16"), *(slow(*case) for case in (
        (1, 1024, "bfloat16"), (9, 1024, "bfloat16"), (65, 1024, "bfloat16"), (100, 1032, "bfloat16"),
        (8, 157153, "bfloat16"), (12, 1001, "float32")))])
def test_unembed(topology: str, rows: int, vocabulary: int, dtype: str) -> None:
    operands = Shape((rows, 256), dtype), Shape((vocabulary, 256), dtype)
    compiled = compile_for(devices(topology)[0], lambda *arrays: unembed(*arrays, second=True).best, operands)
    if topology.startswith("h200") and unembed_choice(*operands, platform="gpu") == "mosaic_gpu":
        assert "mosaic_gpu" in compiled.as_text()


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("rows", [1, 3, 9, 12, 65, 300])
def test_moe(topology: str, rows: int) -> None:
    routed = [Shape((rows, 2), dtype) for dtype in (jnp.int32, jnp.float32)]
    experts = [Shape((8, *shape), jnp.bfloat16) for shape in ((128, 256), (128, 256), (256, 128))]
    compiled = compile_for(devices(topology)[0], moe, (Shape((rows, 256), jnp.bfloat16), *routed, *experts))
    assert not topology.startswith("h200") or "mosaic_gpu" in compiled.as_text()


@needs("h200:1")
def test_a_vocabulary_that_is_no_multiple_of_a_tile_is_refused_by_name() -> None:
    operands = Shape((9, 256), jnp.bfloat16), Shape((1001, 256), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="multiple of 8 ids, got 1001"):
        unembed_choice(*operands, platform="gpu", implementation="mosaic_gpu")
    assert unembed_choice(*operands, platform="gpu") == "xla_stream"
