"""The cases that every implementation of `attention` runs, and a float64 NumPy loop as their oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one call, and what is special about it."""

    name: str
    window: int
    length: int
    batch: int = 2
    heads: int = 2
    groups: int = 2
    width: int = 8
    dtype: str = "float32"
    mask: str = "random"
    block_length: int | None = None
    window_start: int | None = None
    block_origin: int = 0
    scale: float = 1.0
    """Factor of queries and keys: scores grow with its square."""


CASES = (
    Case(name="one_query_one_key", window=1, length=1, mask="all"),
    Case(name="one_query", window=1, length=13),
    Case(name="canvas", window=24, length=24, mask="all"),
    Case(name="window", window=7, length=29),
    Case(name="two_heads_to_a_key_head", window=5, length=17, heads=4),
    Case(name="four_heads_to_one_key_head", window=5, length=17, heads=4, groups=1),
    Case(name="left_padding", window=6, length=21, batch=3, mask="left_padding"),
    Case(name="ragged_ends", window=6, length=21, batch=3, mask="ends"),
    Case(name="a_row_without_keys", window=6, length=21, batch=3, mask="empty_row"),
    Case(name="a_mask_for_each_query", window=9, length=20, heads=4, mask="each_query"),
    Case(name="blocks", window=24, length=24, mask="all", block_length=8),
    Case(name="blocks_in_a_window", window=7, length=29, heads=4, block_length=4, window_start=13),
    Case(name="blocks_from_an_origin", window=7, length=29, block_length=6, window_start=10, block_origin=5),
    Case(name="blocks_before_the_first_key", window=7, length=29, mask="left_padding", block_length=2, window_start=0),
    Case(name="blocks_and_a_mask_for_each_query", window=9, length=20, mask="each_query", block_length=4,
         window_start=6),
    Case(name="large_scores", window=5, length=17, scale=30.0),
    Case(name="bfloat16", window=7, length=29, dtype="bfloat16"),
    Case(name="bfloat16_large_scores", window=7, length=29, heads=4, dtype="bfloat16", scale=6.0),
    # whole tiles of the kernels, and parts of them
    Case(name="tile", window=64, length=128, batch=1, heads=1, groups=1, width=64, dtype="bfloat16"),
    Case(name="tiles_of_grouped_heads", window=32, length=192, batch=1, heads=4, width=64, dtype="bfloat16",
         mask="left_padding", block_length=32, window_start=96, block_origin=64),
    Case(name="part_of_a_tile", window=12, length=100, batch=1, heads=2, width=64, dtype="bfloat16"),
    Case(name="one_query_of_a_tile", window=1, length=65, batch=1, heads=1, groups=1, width=64, dtype="bfloat16",
         mask="all"),
    Case(name="rows_of_a_tile", window=65, length=130, batch=3, heads=1, groups=1, width=64, dtype="bfloat16",
         mask="empty_row"),
    Case(name="grouped_heads_in_a_tile", window=9, length=200, batch=2, heads=4, groups=1, width=64,
         dtype="bfloat16", mask="ends"),
    Case(name="blocks_in_a_tile", window=20, length=150, batch=2, heads=2, groups=1, width=64, dtype="bfloat16",
         mask="left_padding", block_length=8, window_start=60, block_origin=4),
    Case(name="large_scores_in_a_tile", window=8, length=130, batch=1, heads=1, groups=1, width=64,
         dtype="bfloat16", scale=6.0),
    Case(name="lanes", window=20, length=256, batch=3, width=128, dtype="bfloat16", mask="empty_row"),
    Case(name="lanes_float32", window=16, length=128, width=128),
)


def mask_for(case: Case, rng: np.random.Generator) -> np.ndarray:
    """key_mask of a case."""
    shape = (case.batch, case.length)
    if case.mask == "all":
        return np.ones(shape, bool)
    if case.mask == "each_query":
        mask = rng.random((case.batch, case.window, case.length)) < 0.5
        mask[0, 0] = False
        return mask
    if case.mask in ("left_padding", "ends"):
        padding = rng.integers(1, case.length // 2, (case.batch, 1))
        mask = np.arange(case.length) >= padding
        return mask[:, ::-1].copy() if case.mask == "ends" else mask
    mask = rng.random(shape) < 0.7
    if case.mask == "empty_row":
        mask[-1] = False
    return mask


def operands(case: Case, seed: int) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """query, key, value; and the keywords of the call."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape, scale=case.scale: (rng.normal(size=shape) * scale).astype(jnp.dtype(case.dtype))  # noqa: E731
    query = draw(case.batch, case.window, case.heads, case.width)
    canvas = (case.batch, case.length, case.groups, case.width)
    arrays = query, draw(*canvas), draw(*canvas, scale=1.0)
    keywords = {"key_mask": mask_for(case, rng), "block_length": case.block_length}
    if case.block_length is not None:
        keywords |= {"window_start": case.window_start, "block_origin": case.block_origin}
    return arrays, keywords


def oracle(
    query: Any, key: Any, value: Any, *, key_mask: Any, window_start: int | None = None,
    block_length: int | None = None, block_origin: int = 0,
) -> np.ndarray:
    """The op as a loop over queries in float64, key by key."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    mask = np.asarray(key_mask)
    out = np.zeros_like(query)
    batch, window, heads, width = query.shape
    for b, w, h in np.ndindex(batch, window, heads):
        group = h // (heads // key.shape[2])
        keys = np.nonzero(mask[b] if mask.ndim == 2 else mask[b, w])[0]
        if block_length is not None:
            own = ((window_start or 0) + w - block_origin) // block_length
            keys = np.array([t for t in keys if (t - block_origin) // block_length <= own], int)
        if len(keys):
            scores = key[b, keys, group] @ query[b, w, h] / np.sqrt(width)
            shares = np.exp(scores - scores.max())
            out[b, w, h] = shares / shares.sum() @ value[b, keys, group]
    return out
