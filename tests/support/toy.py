"""A denoiser that compiles in a moment and is real enough to go wrong: attention, a KV cache, positions.

`ToyDenoiser` implements `djax.contracts.types.Denoiser` in JAX. `NumpyToy` is the same function in float64 NumPy for
one row without padding, written apart, for the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from djax.contracts import struct
from djax.contracts.cache import KVCache
from djax.contracts.types import HeadQuery, Reading
from djax.models.layers.head import read_head

VOCAB = 24
WIDTH = 16
LAYERS = 2
"""With one layer a cache would never be stale: its keys and values would only depend on their own token."""
MASK = 23
EOS = 22
PAD = 21
FREQUENCIES = np.exp(np.linspace(np.log(2.9), np.log(0.05), WIDTH // 2))


def make_params(seed: int = 8) -> dict[str, Any]:
    """Weights whose confidences spread from about 0.1 to 1 (`test_toy_is_spread` checks it)."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float) -> np.ndarray:
        return (rng.normal(size=(rows, columns)) * scale / np.sqrt(rows)).astype(np.float32)

    embed = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    embed[MASK] *= 0.3  # What masked positions say should come from their place and their context.
    return {
        "embed": embed,
        "layers": [
            {"query": matrix(WIDTH, WIDTH, 1.5), "key": matrix(WIDTH, WIDTH, 1.5), "value": matrix(WIDTH, WIDTH, 1.0),
             "output": matrix(WIDTH, WIDTH, 2.0)} for _ in range(LAYERS)],
        "head": matrix(WIDTH, VOCAB, 3.0),
    }


def poison(params: dict[str, Any], token: int) -> dict[str, Any]:
    """Weights under which every row that holds `token` turns NaN, from the forward after it appeared.

    Not for soft tokens: their expected embedding would be NaN for every row.
    """
    embed = params["embed"].copy()
    embed[token] = np.nan
    return params | {"embed": embed}


def _matmul(x: jax.Array, weight: Any) -> jax.Array:
    return jnp.matmul(x, jnp.asarray(weight), precision="highest")


@struct.dataclass
class ToyDenoiser:
    """Two attention layers with one head; `sharpness` scales the logits."""

    sharpness: Any = 1.0
    needs_logits: bool = struct.field(pytree_node=False, default=False)
    """True gives the loop logits only."""

    @property
    def vocab_size(self) -> int:
        return VOCAB

    @property
    def forwards(self) -> int:
        return 1

    def init_cache(self, params: Any, batch: int, length: int) -> KVCache:
        return KVCache.zeros(
            num_layers=LAYERS, batch=batch, length=length, num_kv_heads=1, head_dim=WIDTH, dtype=jnp.float32)

    def embed(self, params: Any, tokens: jax.Array) -> jax.Array:
        return jnp.asarray(params["embed"])[tokens]

    def prepare_positions(self, params: Any, positions: jax.Array) -> jax.Array:
        return positions

    def apply(
        self, params: Any, inputs: jax.Array, *, positions: jax.Array, key_mask: jax.Array,
        window_start: jax.Array, write: jax.Array, cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        angle = positions[..., None].astype(jnp.float32) * jnp.asarray(FREQUENCIES, jnp.float32)[None, None]
        x = inputs + jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
        layers = []
        for index, weights in enumerate(params["layers"]):
            query, key, value = (_matmul(x, weights[name]) for name in ("query", "key", "value"))
            key, value = key[:, :, None], value[:, :, None]
            if cache is not None:
                layer = cache.layers[index].write(key, value, window_start=window_start, write=write)
                layers.append(layer)
                key, value = layer.key, layer.value
            scores = jnp.einsum("bwk,btk->bwt", query, key[:, :, 0], precision="highest") / WIDTH**0.5
            attention = jax.nn.softmax(jnp.where(key_mask[:, None], scores, -jnp.inf), -1)
            # A NaN outside the row's keys must not come in through 0 * NaN.
            safe = jnp.where(key_mask[..., None], value[:, :, 0], 0.0)
            x = x + _matmul(jnp.einsum("bwt,btk->bwk", attention, safe, precision="highest"), weights["output"])
            x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        gain = 1.0 + 0.6 * jnp.sin(1.7 * positions[..., None].astype(jnp.float32))
        return x * gain, cache if cache is None else KVCache(tuple(layers))

    def unembed(self, params: Any, hidden: jax.Array) -> jax.Array:
        return self.sharpness * _matmul(hidden, params["head"])

    def read(
        self, params: Any, hidden: jax.Array, query: HeadQuery, *, expected: bool
    ) -> tuple[Reading, jax.Array | None]:
        embed = jnp.asarray(params["embed"]) if expected else None
        return read_head(self.sharpness * hidden, jnp.asarray(params["head"]).T, query, embed=embed)

    def expected_embedding(self, params: Any, logits: jax.Array) -> jax.Array:
        return _matmul(jax.nn.softmax(logits.astype(jnp.float32), -1), params["embed"])


class NumpyToy:
    """The same function for one row without padding: every position is attended, positions are indices."""

    def __init__(self, params: dict[str, Any], sharpness: float = 1.0) -> None:
        self.weights = jax.tree.map(lambda value: np.asarray(value, np.float64), params)
        self.sharpness = sharpness

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        return self.weights["embed"][tokens]

    def init_cache(self, length: int) -> list[dict[str, np.ndarray]]:
        return [{name: np.zeros((length, WIDTH)) for name in ("key", "value")} for _ in range(LAYERS)]

    def forward(self, inputs: np.ndarray, start: int, cache: list[dict[str, np.ndarray]] | None) -> np.ndarray:
        """Logits [W, V] of positions start..start+W; updates `cache`, all positions' keys and values."""
        positions = np.arange(start, start + len(inputs))
        x = inputs.copy()
        for i, frequency in enumerate(FREQUENCIES):
            x[:, i] += np.sin(positions * frequency)
            x[:, WIDTH // 2 + i] += np.cos(positions * frequency)
        for index, weights in enumerate(self.weights["layers"]):
            keys, values = x @ weights["key"], x @ weights["value"]
            if cache is not None:
                layer = cache[index]
                layer["key"][start:start + len(x)] = keys
                layer["value"][start:start + len(x)] = values
                keys, values = layer["key"], layer["value"]
            scores = (x @ weights["query"]) @ keys.T / WIDTH ** 0.5
            odds = np.exp(scores - scores.max(1, keepdims=True))
            x = x + (odds / odds.sum(1, keepdims=True)) @ values @ weights["output"]
            x = x / np.sqrt((x ** 2).mean(1, keepdims=True) + 1e-6)
        gain = (1 + 0.6 * np.sin(1.7 * positions))[:, None]
        return self.sharpness * ((x * gain) @ self.weights["head"])


@struct.dataclass
class ScriptedDenoiser:
    """Says what `params["script"]` [B, T, V] holds for each row and canvas position, whatever the canvas holds."""

    @property
    def forwards(self) -> int:
        return 1

    def init_cache(self, params: Any, batch: int, length: int) -> KVCache:
        return KVCache.zeros(num_layers=1, batch=batch, length=length, num_kv_heads=1, head_dim=1, dtype=jnp.float32)

    def embed(self, params: Any, tokens: jax.Array) -> jax.Array:
        return jnp.zeros((*tokens.shape, 1), jnp.float32)

    def prepare_positions(self, params: Any, positions: jax.Array) -> jax.Array:
        return positions

    def apply(
        self, params: Any, inputs: jax.Array, *, positions: jax.Array, key_mask: jax.Array,
        window_start: jax.Array, write: jax.Array, cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        return jax.lax.dynamic_slice_in_dim(params["script"], window_start, inputs.shape[1], axis=1), cache

    def unembed(self, params: Any, hidden: jax.Array) -> jax.Array:
        return hidden

    def expected_embedding(self, params: Any, logits: jax.Array) -> jax.Array:
        return jnp.zeros((*logits.shape[:2], 1), jnp.float32)


def script(tokens: Sequence[Sequence[int]], *, certainty: float = 8.0) -> dict[str, jax.Array]:
    """Weights of a `ScriptedDenoiser` that says these tokens; earlier positions a little more surely."""
    said = jnp.asarray(tokens)
    sure = certainty - 0.1 * jnp.arange(said.shape[1])[:, None]
    return {"script": jax.nn.one_hot(said, VOCAB) * sure}
