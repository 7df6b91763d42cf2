"""Models as denoisers: what the loop in `djax.denoise` calls."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from djax.contracts import struct
from djax.contracts.types import Cache, Denoiser, HeadQuery, Hidden, Logits, Params, Positions, Reading


@struct.dataclass
class ModelDenoiser:
    """A model as a `djax.contracts.types.Denoiser`. `params` may be the model's `nnx.State` or its pure dict."""

    graphdef: Any = struct.field(pytree_node=False)
    """The model without its parameters, as `nnx.split` or `djax.models.build` gives it."""

    @property
    def forwards(self) -> int:
        """One forward of the network."""
        return 1

    def init_cache(self, params: Params, batch: int, length: int) -> Cache:
        """An empty cache for `batch` canvases of `length` positions, in the weights' dtype."""
        return self._model(params).init_cache(batch, length)

    def embed(self, params: Params, tokens: Int[Array, "B W"]) -> Float[Array, "B W D"]:
        """Input embeddings of tokens."""
        return self._model(params).embed_tokens(tokens)

    def prepare_positions(self, params: Params, positions: Int[Array, "B T"]) -> Positions:
        """The rotation of every position, the same in all layers and forwards."""
        return self._model(params).rotation(positions)

    def apply(
        self,
        params: Params,
        inputs: Float[Array, "B W D"],
        *,
        positions: Positions,
        key_mask: Bool[Array, "B T"],
        window_start: Int[Array, ""],
        write: Bool[Array, "B W"],
        cache: Cache | None,
    ) -> tuple[Hidden, Cache | None]:
        """Hidden states of a window; see `djax.contracts.types.Denoiser.apply`.

        They end before the last layer's experts: the loop reads one block of the window, and `unembed` runs
        the rest of the network there only.
        """
        return self._model(params).trunk(
            inputs, rotation=positions, key_mask=key_mask, window_start=window_start, write=write,
            cache=cache)

    def unembed(self, params: Params, hidden: Hidden) -> Logits:
        """float32 logits of hidden states."""
        model = self._model(params)
        return model.unembed(model.finish(hidden))

    def expected_embedding(self, params: Params, logits: Logits) -> Float[Array, "B L D"]:
        """`softmax(logits) @ W_embed`, the softmax in float32."""
        return self._model(params).expected_embedding(logits)

    needs_logits: ClassVar[bool] = False

    def read(
        self, params: Params, hidden: Hidden, query: HeadQuery, *, expected: bool
    ) -> tuple[Reading, Float[Array, "B L D"] | None]:
        """Answer a query about the logits; see `djax.contracts.types.ReadingDenoiser.read`."""
        model = self._model(params)
        return model.read(model.finish(hidden), query, expected=expected)

    def _model(self, params: Params) -> Any:
        return nnx.merge(self.graphdef, params)


@struct.dataclass
class Guided:
    """Classifier-free guidance: two forwards, logits = uncond + (scale + 1) * (cond - uncond).

    LLaDA (arXiv 2502.09992, section on inference; the `cfg_scale` of its code): the unconditional forward
    sees the prompt's positions as masked. Hidden states and caches are pairs (conditional, unconditional).
    """

    denoiser: Denoiser
    scale: Float[Array, ""]
    """Strength; 0 gives the conditional logits."""
    mask_id: Int[Array, ""]
    unconditional: Bool[Array, "B T"]
    """Canvas positions that the unconditional forward sees as the mask token."""

    @property
    def forwards(self) -> int:
        """Two forwards of what it wraps."""
        return 2 * self.denoiser.forwards

    def init_cache(self, params: Params, batch: int, length: int) -> Cache:
        """One cache for each of the two forwards."""
        return tuple(self.denoiser.init_cache(params, batch, length) for _ in range(2))

    def embed(self, params: Params, tokens: Int[Array, "B W"]) -> Float[Array, "B W D"]:
        """Input embeddings of tokens."""
        return self.denoiser.embed(params, tokens)

    def prepare_positions(self, params: Params, positions: Int[Array, "B T"]) -> Positions:
        """Both forwards see the same positions."""
        return self.denoiser.prepare_positions(params, positions)

    def apply(
        self,
        params: Params,
        inputs: Float[Array, "B W D"],
        *,
        positions: Positions,
        key_mask: Bool[Array, "B T"],
        window_start: Int[Array, ""],
        write: Bool[Array, "B W"],
        cache: Cache | None,
    ) -> tuple[Hidden, Cache | None]:
        """Both forwards of a window; see `djax.contracts.types.Denoiser.apply`."""
        masked = lax.dynamic_slice_in_dim(self.unconditional, window_start, inputs.shape[1], axis=1)
        mask_embedding = self.denoiser.embed(params, jnp.full((1, 1), self.mask_id, jnp.int32))
        blinded = jnp.where(masked[..., None], mask_embedding.astype(inputs.dtype), inputs)
        first, second = (None, None) if cache is None else cache

        def forward(inputs: Float[Array, "B W D"], cache: Cache | None) -> tuple[Hidden, Cache | None]:
            return self.denoiser.apply(
                params, inputs, positions=positions, key_mask=key_mask, window_start=window_start,
                write=write, cache=cache)

        conditional, first = forward(inputs, first)
        unconditional, second = forward(blinded, second)
        return (conditional, unconditional), None if cache is None else (first, second)

    def unembed(self, params: Params, hidden: Hidden) -> Logits:
        """Guided float32 logits."""
        conditional, unconditional = (self.denoiser.unembed(params, part) for part in hidden)
        return unconditional + (self.scale + 1.0) * (conditional - unconditional)

    def expected_embedding(self, params: Params, logits: Logits) -> Float[Array, "B L D"]:
        """`softmax(logits) @ W_embed` of the guided logits."""
        return self.denoiser.expected_embedding(params, logits)
