"""A model with its weights where they run: what every call starts from."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from djax.contracts.ambient import without_mesh
from djax.contracts.types import Params
from djax.devices.sharding import Rules
from djax.engine.options import Call, Sampling, check_lengths, resolve
from djax.engine.program import Program
from djax.engine.prompts import Prompt, shared_prompts
from djax.engine.running import full_logits
from djax.engine.tokenizer import Tokenizer
from djax.engine.weights import accept
from djax.models import Kernels, ModelDenoiser, build, kernels_on
from djax.models.config import ModelConfig
from djax.models.layers.kernels import check_kernels


class LoadedModel:
    """Configuration, weights, tokenizer and mesh, and the programs that run on them."""

    @without_mesh()
    def __init__(
        self, config: ModelConfig, params: Params, *, tokenizer: Tokenizer | None = None, mesh: Mesh | None = None,
        rules: Rules | None = None, kernels: Kernels | None = None,
    ) -> None:
        """Wrap loaded weights. `params` is the `nnx.State` (or pure dict) of `djax.models.build(config)`.

        On a mesh they are placed by `rules`; what lies there already is not copied. `kernels` names the
        implementations to run on.

        Raises:
            ValueError: the mesh or the rules do not fit the model; names the parameter and the numbers.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.kernels = kernels
        self.program = Program(config, mesh=mesh, rules=rules, kernels=check_kernels(kernels))
        self.params = self.program.place_params(params)

    def __repr__(self) -> str:
        config, leaves = self.config, jax.tree.leaves(self.params)
        size = sum(leaf.size for leaf in leaves)
        where = "one device" if self.mesh is None else f"mesh {dict(self.mesh.shape)}"
        words = "no tokenizer" if self.tokenizer is None else f"{self.tokenizer.size} tokens"
        return (f"{type(self).__name__}({config.architecture}, {size:,} parameters, {config.dtype}, "
                f"{config.num_layers} layers of {config.hidden_size}, {words}, {where})")

    @functools.cached_property
    @without_mesh()
    def denoiser(self) -> ModelDenoiser:
        """The model for `djax.denoise` inside your own `jax.jit`; on a mesh XLA partitions it."""
        kernels = kernels_on(self.mesh) if self.kernels is None else self.kernels
        return ModelDenoiser(nnx.split(build(self.config, kernels=kernels))[0])

    @property
    def compile_count(self) -> int:
        """Programs compiled by this object so far."""
        return self.program.compile_count

    @property
    def vocab_limit(self) -> int:
        """Ids from here on are vocabulary padding and never generated."""
        return self.config.vocab_size if self.tokenizer is None else min(self.tokenizer.size, self.config.vocab_size)

    @without_mesh()
    def update_params(self, params: Params, filter_types: Sequence[type[nnx.Variable[Any]]] | None = None) -> None:
        """Generate with new weights from the next call on; nothing is compiled for them.

        They are checked first, then moved to the devices of the old ones and cast to their dtype. What is there
        already is shared and not copied: a training step that donates its parameters would delete them here too.
        Streams that have begun go on with the old weights.

        Args:
            params: an `nnx.State` or a pure dict of arrays, on any mesh.
            filter_types: variable types, such as `(nnx.LoRAParam,)`: only leaves of these types are replaced.

        Raises:
            ValueError: other leaves, shapes, or dtypes that are no floats; names the leaf, and nothing has changed.
        """
        self.params = accept(self.params, params, filter_types=filter_types)

    @without_mesh()
    def logits(
        self, prompts: Prompt | Sequence[Prompt] | None, *, allow_special_tokens: bool = False
    ) -> Float[np.ndarray, "B T V"]:
        """float32 logits of one full forward; shorter rows are padded on the left.

        Position i's logits are about the token at position i: there is no shift.
        """
        rows = shared_prompts(prompts, tokenizer=self.tokenizer, program=self.program, call={"call": "logits"},
                              allow_special_tokens=allow_special_tokens)
        check_lengths(self.config, rows)
        return full_logits(self.program, self.params, rows)

    def resolve(self, sampling: Sampling, *, gaps: bool = False) -> Call:
        """Resolve a call's sampling for this model, see `djax.engine.options.resolve`."""
        return resolve(sampling, self.config, vocab_limit=self.vocab_limit, gaps=gaps)
