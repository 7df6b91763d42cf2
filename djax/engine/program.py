"""The loop as programs for devices: jitted, and where there is a mesh, the same program on every device of it.

On a mesh the whole loop runs inside one `jax.shard_map`: each device has its part of the weights, the cache and the
rows. The collectives are those of `djax.models.Parallel` and of `kernels_pallas.combine_readouts`; where rows are split
also `Canvas.any_row` and a gather of the results. Nothing is left to a partitioner, kernels see the arrays of one
device, and Auto and Explicit meshes give the same program. The mesh is held here; an
ambient one is never read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from djax.contracts.ambient import on_device, without_mesh
from djax.contracts.canvas import Canvas
from djax.contracts.part_shapes import AXES
from djax.contracts.types import Denoiser, Params
from djax.devices.distributed import spans_processes
from djax.devices.sharding import Rules, check_rules, mesh_axes, rules_for, shardings
from djax.engine.interrupts import Hold, Pace
from djax.loop.denoise import advance, begin, denoise, finish, unfinished
from djax.loop.state import DenoiseState, Parts, Progress, Result
from djax.models import Kernels, ModelDenoiser, Parallel, abstract_params, build, logical_axes, parallel_on
from djax.models.config import ModelConfig

Specs = Any
"""A tree of PartitionSpecs, or the beginning of one."""
_BY_ROWS = None
"""In the place of specs: every array has a row for each of the batch, and scalars are whole (`Program._row_specs`)."""
_BEGINNING = (_BY_ROWS, P(), P(), _BY_ROWS)
"""Canvas, key, parts, row ids."""


class Program:
    """A model's generation on the default device or on a mesh. Counts what it compiles."""

    @without_mesh()
    def __init__(
        self, config: ModelConfig, *, mesh: Mesh | None = None, rules: Rules | None = None,
        kernels: Kernels = Kernels(),
    ) -> None:
        """Nothing is compiled yet.

        Args:
            config: of the model.
            mesh: devices; None is the default one.
            rules: logical axis to mesh axes; None is `djax.sharding.rules_for`.
            kernels: implementations to run on.

        Raises:
            ValueError: as `djax.sharding.shardings` and `djax.models.parallel_on`.
        """
        if mesh is None and rules is not None:
            raise ValueError("rules: got some without a mesh; give mesh=, or leave rules out")
        self.config, self.mesh, self.kernels = config, mesh, kernels
        abstract, axes = abstract_params(config), logical_axes(config)
        if mesh is not None:
            rules = rules_for(axes, abstract, mesh) if rules is None else rules
            check_rules(mesh, rules)
        self.rules: Rules = {} if rules is None else rules
        self.param_shardings = shardings(axes, abstract, mesh=mesh, rules=rules)
        """Sharding of every parameter, a tree like the model's state."""
        self.parallel = Parallel()
        self.row_axes: tuple[str, ...] = ()
        """Mesh axes over which rows are split."""
        if mesh is not None:
            self.parallel = parallel_on(
                mesh, self.rules, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads)
            self.row_axes = tuple(axis for axis in mesh_axes("batch", mesh, self.rules) if mesh.shape[axis] > 1)
        self.local_params = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype), abstract,
            self.param_shardings)
        """Shapes of one device's part of every parameter."""
        self.denoiser = ModelDenoiser(nnx.split(build(config, kernels=kernels, parallel=self.parallel))[0])
        """The model as it runs on each device: not for use outside of this program where there is a mesh."""
        self.compile_count = 0
        self._hold = Hold()
        self._paces: dict[Hashable, Pace] = {}
        whole, state = P(), self._state_specs()
        self.denoise = self._jit(self._denoise, _BEGINNING, whole)
        """(denoiser, params, canvas, key, parts, row ids) to a `Result`, whole on every device: the loop to its end,
        where the host needs no control in between (plans, comparisons)."""
        # an unused argument would not say which device the state is bound to: `advance` would be compiled twice
        self.begin = self._jit(self._begin, _BEGINNING, (state, whole), keep_unused=True)
        """Make the state before the first step, and say whether anything is to be done."""
        self.advance = self._jit(
            self._advance, (_BY_ROWS, state, whole, whole, whole), (state, whole, whole), donate_argnums=3)
        """(denoiser, params, canvas, state, parts, steps, before_block) to the state, its `Progress`, and whether work
        is left. The state that it gets is gone: no cache is copied."""
        self.logits = self._jit(self._logits, (_BY_ROWS,) * 3, whole)
        """(denoiser, params, tokens, valid, positions) to float32 logits [B, T, V]."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call one of the programs; while it is compiled Ctrl-C waits (`djax.engine.interrupts.Hold`)."""
        with self._hold.armed():
            return function(*arguments)

    def pace(self, canvas: Canvas, parts: Parts) -> Pace:
        """Steps of a stretch for such a canvas and such parts, as the last generation left it."""
        key = (canvas.tokens.shape, canvas.block_length, canvas.first_block, jax.tree.structure(parts))
        return self._paces.setdefault(key, Pace(fixed=spans_processes(self.mesh)))

    @property
    def row_parts(self) -> int:
        """Into how many parts rows are split: a canvas has a multiple of it (`pad_rows`)."""
        return 1 if self.mesh is None else int(np.prod([self.mesh.shape[axis] for axis in self.row_axes], dtype=int))

    def pad_rows(self, canvas: Canvas) -> Canvas:
        """The canvas with rows that have nothing to decode, so that every device gets as many."""
        missing = -canvas.batch % self.row_parts
        if not missing:
            return canvas
        return jax.tree.map(
            lambda array: np.pad(jax.device_get(array), ((0, missing), (0, 0))) if array.ndim else array, canvas)

    def place(self, tree: Any) -> Any:
        """Arrays as the program takes them: scalars and vectors of parts on all devices."""
        return on_device(tree) if self.mesh is None else put(tree, NamedSharding(self.mesh, P()))

    def place_rows(self, tree: Any) -> Any:
        """Arrays whose first axis is the rows', and scalars, as the program takes them."""
        if self.mesh is None:
            return on_device(tree)
        mesh = self.mesh
        return jax.tree.map(lambda leaf, spec: put(leaf, NamedSharding(mesh, spec)), tree, self._row_specs(tree))

    def place_params(self, params: Params) -> Params:
        """Parameters where the program wants them; those that are there already are not copied.

        Without a mesh they stay on the device that they were put on, or go to the default one: who is bound to none
        would have the program compiled again when others come.
        """
        leaves = jax.tree.leaves(self.param_shardings)
        given, structure = jax.tree.flatten(params)
        if len(given) != len(leaves):
            raise ValueError(f"params: got {len(given)} arrays; the model has {len(leaves)}")
        return jax.tree.unflatten(structure, [
            leaf if self._is_placed(leaf, sharding) else put(leaf, sharding)
            for leaf, sharding in zip(given, leaves, strict=True)])

    def _is_placed(self, leaf: Any, sharding: Sharding) -> bool:
        return isinstance(leaf, jax.Array) and leaf.committed and (self.mesh is None or leaf.sharding == sharding)

    def abstract(
        self, denoiser: Denoiser, params: Params, canvas: Canvas, key: Key[Array, ""], parts: Parts,
        rows: Int[Array, " B"],
    ) -> tuple[Any, ...]:
        """The arguments of `denoise` as shapes with shardings, for `lower`: for devices that are not here."""
        if self.mesh is None:
            return denoiser, params, canvas, key, parts, rows
        mesh, arguments = self.mesh, (denoiser, params, canvas, key, parts, rows)

        def shaped(leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
            array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

        specs = self._in_specs(_BEGINNING, *arguments)
        return jax.tree.map(shaped, arguments, jax.tree.broadcast(specs, arguments))

    def _in_specs(self, kinds: Sequence[Specs], denoiser: Denoiser, params: Params, *rest: Any) -> tuple[Specs, ...]:
        """Splits of a program's arguments; `kinds` are those of the rest."""
        params_spec = jax.tree.unflatten(
            jax.tree.structure(params), [sharding.spec for sharding in jax.tree.leaves(self.param_shardings)])
        return self._row_specs(denoiser), params_spec, *(
            self._row_specs(tree) if kind is _BY_ROWS else kind for kind, tree in zip(kinds, rest, strict=True))

    def _row_specs(self, tree: Any) -> Specs:
        """Split of a tree whose arrays have a row for each of the batch; its scalars are whole."""
        return jax.tree.map(lambda leaf: P(self.row_axes or None) if jnp.ndim(leaf) else P(), tree)

    def _state_specs(self) -> Specs:
        """As the fields of `DenoiseState` say."""
        over = {"batch": self.row_axes or None, "heads": self.parallel.heads or None, None: None}
        specs: dict[str, Any] = {field.name: P(*(over[axis] for axis in field.metadata["axes"]))
                                 for field in dataclasses.fields(DenoiseState)}
        return DenoiseState(**specs)

    def _own(self, canvas: Canvas) -> Canvas:
        """One device's canvas."""
        return dataclasses.replace(canvas, row_axes=self.row_axes)

    def _whole(self, tree: Any) -> Any:
        """All devices' rows."""
        if not self.row_axes:
            return tree
        return jax.tree.map(
            lambda leaf: lax.all_gather(leaf, self.row_axes, axis=0, tiled=True) if leaf.ndim else leaf, tree)

    def _denoise(
        self, denoiser: Denoiser, params: Params, canvas: Canvas, key: Key[Array, ""], parts: Parts,
        rows: Int[Array, " B"],
    ) -> Result:
        axes = {axis: getattr(parts, axis) for axis in AXES}
        return self._whole(denoise(denoiser, params, self._own(canvas), key, row_ids=rows, **axes))

    def _begin(
        self, denoiser: Denoiser, params: Params, canvas: Canvas, key: Key[Array, ""], parts: Parts,
        rows: Int[Array, " B"],
    ) -> tuple[DenoiseState, Bool[Array, ""]]:
        canvas = self._own(canvas)
        state = begin(denoiser, params, canvas, key, parts=parts, row_ids=rows)
        # JAX hands an argument that comes out unchanged on as it is: the caller's canvas would be donated
        state = dataclasses.replace(state, tokens=jnp.copy(state.tokens), is_masked=jnp.copy(state.is_masked))
        return state, unfinished(canvas, state)

    def _advance(
        self, denoiser: Denoiser, params: Params, canvas: Canvas, state: DenoiseState, parts: Parts,
        steps: Int[Array, ""], before_block: Int[Array, ""],
    ) -> tuple[DenoiseState, Progress, Bool[Array, ""]]:
        canvas = self._own(canvas)
        state = advance(denoiser, params, canvas, state, parts=parts, steps=steps, before_block=before_block)
        shown = Progress(finish(canvas, state, parts=parts), state.done, state.block, state.iterations)
        return state, self._whole(jax.tree.map(jnp.copy, shown)), unfinished(canvas, state)

    def _logits(
        self, denoiser: Denoiser, params: Params, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"],
        positions: Int[Array, "B T"],
    ) -> Float[Array, "B T V"]:
        hidden, _ = denoiser.apply(
            params, denoiser.embed(params, tokens), positions=denoiser.prepare_positions(params, positions),
            key_mask=valid, window_start=jnp.int32(0), write=valid, cache=None)
        logits: Array = self._whole(denoiser.unembed(params, hidden))
        return logits

    def _jit(self, function: Callable[..., Any], kinds: Sequence[Specs], out_specs: Specs, **options: Any) -> Any:
        """`jax.jit` of a function of one device, over the mesh; `kinds` as in `_in_specs`.

        It counts its compilations: a trace happens exactly once for each.
        """
        def traced(*arguments: Any) -> Any:
            self.compile_count += 1
            self._hold.begin()
            if self.mesh is None:
                return function(*arguments)
            # Pallas kernels have no rule for what varies over which axis
            return jax.shard_map(function, mesh=self.mesh, in_specs=self._in_specs(kinds, *arguments),
                                 out_specs=out_specs, check_vma=False)(*arguments)

        return jax.jit(traced, **options)


def put(tree: Any, sharding: Sharding) -> Any:
    """Arrays under a sharding, whose devices may belong to several processes.

    Each of these gives the same values and places what its own devices hold.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def across(leaf: Any) -> Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            words = across(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
        values = np.asarray(jax.device_get(leaf))
        # not `make_array_from_callback`: a transfer guard takes its transfers for accidents
        shards = [jax.device_put(values[index], device)
                  for device, index in sharding.addressable_devices_indices_map(values.shape).items()]
        return jax.make_array_from_single_device_arrays(values.shape, sharding, shards)

    return jax.tree.map(across, tree)
