"""Bidirectional attention, then a dense SwiGLU block."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from djax.models.config import FeedForward, ModelConfig
from djax.models.layers.attention import Attention
from djax.models.layers.basic import SwiGlu, rms_norm
from djax.models.layers.parameters import ones
from djax.models.layers.trunk import Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(ModelConfig):
    dense_size: int
    architecture: str = dataclasses.field(default="toy", init=False)


def feed_forwards(config: ToyConfig) -> tuple[FeedForward, ...]:
    return (FeedForward(dense_size=config.dense_size),) * config.num_layers


class Layer(nnx.Module):
    def __init__(self, config: ToyConfig, index: int, *, rngs: nnx.Rngs, kernels: Any, parallel: Any) -> None:
        self.config, self.parallel = config, parallel
        self.attention_norm = ones((config.hidden_size,), axes=("embed",), dtype=config.dtype)
        self.attention = Attention(config, rngs=rngs, implementation=kernels.attention, parallel=parallel)
        self.mlp_norm = ones((config.hidden_size,), axes=("embed",), dtype=config.dtype)
        self.mlp = SwiGlu(config.hidden_size, config.dense_size, rngs=rngs, dtype=config.dtype)

    def mix(self, x: Any, *, cache: Any, **place: Any) -> tuple[Any, Any]:
        normed = rms_norm(x, self.attention_norm[...], eps=self.config.rms_norm_eps)
        mixed, cache = self.attention(normed, cache=cache, **place)
        return x + mixed, cache

    def transform(self, x: Any) -> tuple[Any, None]:
        rows = rms_norm(x, self.mlp_norm[...], eps=self.config.rms_norm_eps).reshape(-1, x.shape[-1])
        return x + self.parallel.sum((self.mlp(rows), self.parallel.ffn)).reshape(x.shape), None


FAMILY = Family(
    config=ToyConfig, layer=Layer, rotary_dim=lambda config: config.head_dim, feed_forwards=feed_forwards,
    published={
        "toy": ToyConfig(
            vocab_size=1000, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, dense_size=128,
            rms_norm_eps=1e-5, rope_theta=1e4, max_positions=4096, mask_id=999, eos_id=1, pad_id=1)})
