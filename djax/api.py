"""The API that a researcher meets first: `load`, and a `DiffusionLM` that takes text and gives text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from djax import recipes
from djax.contracts.ambient import without_mesh
from djax.contracts.canvas import Canvas
from djax.contracts.keys import as_key
from djax.contracts.types import Denoiser, Params
from djax.devices.distributed import with_peers
from djax.devices.sharding import Rules
from djax.engine.options import CallOptions, check_block_length, check_lengths, make_parts, resolve_ids
from djax.engine.program import Program
from djax.engine.prompts import Prompt, shared_masked, shared_prompts
from djax.engine.results import Generation, Streamer, StreamReader, StreamStep, Watch, feed
from djax.engine.running import Run
from djax.engine.tokenizer import Tokenizer, has_tokenizer
from djax.engine.weights import accept, check_alive
from djax.errors import ArgumentError, check_choice, check_integer, shown
from djax.loop.state import Parts
from djax.models import Guided, Kernels, ModelDenoiser, build, kernels_on
from djax.models.config import DTYPES, ModelConfig
from djax.recipes import Recipe

if TYPE_CHECKING:
    from djax.plan.memory import DeviceMemory


@without_mesh()
def load(
    source: str | Path | None = None,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    kernels: Kernels | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DiffusionLM:
    """Load a checkpoint of LLaDA-MoE or LLaDA2. Nothing in it is executed: no pickle, no remote code.

    Args:
        source: a Hugging Face directory (safetensors), a directory written by `djax convert`, or a hub id;
            None or "djax:base" is the small model bundled with djax, "djax:compressed" the same after
            trajectory compression.
        dtype: of weights and activations: "bfloat16", "float32" or "float16", or such a dtype; None keeps the
            checkpoint's.
        mesh: devices to shard over, from `djax.sharding.make_mesh` or your own, Auto or Explicit; None is the default
            device. Each process of several reads its own devices' parts only.
        rules: logical axis name to mesh axis, see `djax.sharding`; None is its default for this model.
        mask_id: overrides the checkpoint's mask id.
        eos_id: overrides the checkpoint's EOS id.
        kernels: implementations to run on; None picks the best for the hardware.
        progress: called with (bytes done, bytes in all).

    Raises:
        convert.CheckpointError: (a ValueError) there is no such checkpoint, or it is damaged, incomplete or
            unsupported; names the file and the key.
        ValueError: the mesh or the rules do not fit the model; names the parameter and the numbers.
    """
    import convert
    from djax import assets

    directory = convert.resolve_source(assets.resolve(source))
    config, params = convert.load_params(directory, dtype=_dtype_name(dtype), mesh=mesh, rules=rules, progress=progress)
    tokenizer = Tokenizer.load(directory) if has_tokenizer(directory) else None
    if mask_id is None and config.mask_id is None and tokenizer is not None:
        mask_id = tokenizer.mask_id
    config = dataclasses.replace(
        config, mask_id=config.mask_id if mask_id is None else mask_id,
        eos_id=config.eos_id if eos_id is None else eos_id,
        other_eos_ids=config.other_eos_ids if eos_id is None else ())
    return DiffusionLM(config, params, tokenizer=tokenizer, mesh=mesh, rules=rules, kernels=kernels)


class DiffusionLM:
    """A masked-diffusion language model ready to generate: configuration, weights, tokenizer, mesh."""

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
        self.program = Program(config, mesh=mesh, rules=rules, kernels=Kernels() if kernels is None else kernels)
        self.params = self.program.place_params(params)

    def __repr__(self) -> str:
        config, leaves = self.config, jax.tree.leaves(self.params)
        size = sum(leaf.size for leaf in leaves)
        where = "one device" if self.mesh is None else f"mesh {dict(self.mesh.shape)}"
        words = "no tokenizer" if self.tokenizer is None else f"{self.tokenizer.size} tokens"
        return (f"DiffusionLM({config.architecture}, {size:,} parameters, {config.dtype}, {config.num_layers} layers "
                f"of {config.hidden_size}, {words}, {where})")

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
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None,
        *,
        recipe: Recipe | None = None,
        max_new_tokens: int = 256,
        block_length: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance: float | None = None,
        key: int | Key[Array, ""] = 0,
        mask_id: int | None = None,
        eos_id: int | Sequence[int] | None = None,
        stop_on_eos: bool = True,
        align: bool = False,
        row_ids: Sequence[int] | None = None,
        allow_special_tokens: bool = False,
        watch: Watch | None = None,
    ) -> Generation:
        """Complete prompts in one jitted loop, which comes back to the host about twice a second.

        Ctrl-C raises KeyboardInterrupt there, in whichever thread this runs (while XLA compiles: when that is done);
        `watch` has seen what was reached. A sweep of thresholds, temperatures, keys or EOS ids compiles nothing new,
        nor do prompts whose lengths fall into the same bucket (`djax.contracts.canvas.bucket_size`); `compile_count`
        tells.

        Args:
            prompts: texts (taken as they are), conversations (through the chat template) or token ids. On a mesh of
                several processes all have them, or one has and the others give None; all call alike.
            recipe: which decoder, from `djax.recipes`; default `recipes.default_for(config)`:
                `dinfer()`, or `llada2()` for a model with blocks.
            max_new_tokens: positions to generate per row; need not be a multiple of `block_length`. A model with
                blocks decodes its last block to the end, as its own code does, and what is too much is cut off.
            block_length: positions decoded together; None is the length of the model's own blocks, or 64.
            temperature: 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature).
            top_k: draw from the k most probable tokens only.
            top_p: draw from the smallest set of tokens with this mass only.
            min_p: draw from tokens at least this probable relative to the best only.
            guidance: scale of classifier-free guidance (two forwards per step); None is off.
            key: a seed, 0 to 2**63 - 1, or a `jax.random` key, which is turned into a threefry key
                (`djax.contracts.keys.as_key`) if it is none.
            mask_id: overrides the model's mask id.
            eos_id: overrides the model's EOS id; several end a sequence alike.
            stop_on_eos: end a row with the block that holds its first EOS; completions are trimmed there
                either way.
            align: put block boundaries on multiples of `block_length` from each row's start; always for a model with
                blocks.
            row_ids: identity of each row for the random key; rows keep their samples when a batch is cut.
            allow_special_tokens: let control tokens that are written in texts and messages (`<|role_end|>`, the mask)
                be control tokens; otherwise they are the text that they look like.
            watch: called with what has been reached after each stretch of the loop but the last; rows still at work
                have the stop reason "interrupted". What it raises ends the generation.

        Raises:
            ValueError: names the argument, what came and what is allowed.
        """
        options = CallOptions(
            **self._defaults(recipe, block_length), temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, guidance=guidance, mask_id=mask_id, eos_id=eos_id, stop_on_eos=stop_on_eos)
        canvas, parts, eos_ids = self._prepare(
            prompts, options, max_new_tokens=max_new_tokens, align=align, key=key, row_ids=row_ids,
            allow_special_tokens=allow_special_tokens)
        return self.decode(
            canvas, parts, guidance=guidance, eos_ids=eos_ids, key=key, row_ids=row_ids, limit=max_new_tokens,
            watch=watch)

    @without_mesh()
    def infill(
        self,
        token_ids: Sequence[Sequence[int]] | Sequence[int] | None,
        mask: Sequence[Sequence[bool]] | Sequence[bool] | None,
        *,
        recipe: Recipe | None = None,
        block_length: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance: float | None = None,
        key: int | Key[Array, ""] = 0,
        mask_id: int | None = None,
        row_ids: Sequence[int] | None = None,
        watch: Watch | None = None,
    ) -> Generation:
        """Fill the masked positions of token sequences; every other token comes back as it was.

        Blocks begin at each row's first masked position, those of a model with
        blocks at the boundary at or before it. No EOS stops a row, and EOS ids are not
        generated: the tokens on both sides are given. `tokens` and `text` of the result are whole rows.

        Args:
            token_ids: one row or several, ragged; None as for `generate`, with a mask of None.
            mask: True where a token is to be filled in; the shape of `token_ids`.
            recipe: as in `generate`, and so are the other arguments.
            block_length: positions decoded together; None is the length of the model's own blocks, or 64.
            temperature: 0 is greedy.
            top_k: see `generate`.
            top_p: see `generate`.
            min_p: see `generate`.
            guidance: see `generate`.
            key: seed or `jax.random` key.
            mask_id: overrides the model's mask id.
            row_ids: identity of each row for the random key.
            watch: see `generate`.

        Raises:
            ValueError: names the argument, what came and what is allowed.
        """
        options = CallOptions(
            **self._defaults(recipe, block_length, gaps=True), temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, guidance=guidance, mask_id=mask_id, eos_id=None, stop_on_eos=False)
        rows, masks = shared_masked(
            token_ids, mask, vocab_size=self.config.vocab_size, mesh=self.mesh,
            call={"call": "infill", **vars(options), "key": key, "row_ids": row_ids, **self._alike()})
        mask_token, eos_ids = resolve_ids(options, self.config)
        recipes.check_blocks(options.recipe, self.config, block_length=options.block_length, gaps=True)
        canvas = Canvas.from_tokens(
            rows, masks, block_length=options.block_length, mask_id=mask_token, pad_id=self.config.pad_id,
            align=self.config.block_length is not None)
        parts = make_parts(options, mask_id=mask_token, eos_ids=eos_ids, vocab_limit=self.vocab_limit,
                           forbidden=eos_ids)
        tokenizer = self.tokenizer
        return self.decode(
            canvas, parts, guidance=guidance, key=key, row_ids=row_ids,
            watch=None if watch is None else lambda got: watch(got.whole_rows(tokenizer))).whole_rows(tokenizer)

    @without_mesh()
    def stream(
        self,
        prompts: Prompt | Sequence[Prompt] | None,
        *,
        recipe: Recipe | None = None,
        max_new_tokens: int = 256,
        block_length: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance: float | None = None,
        key: int | Key[Array, ""] = 0,
        mask_id: int | None = None,
        eos_id: int | Sequence[int] | None = None,
        stop_on_eos: bool = True,
        align: bool = False,
        row_ids: Sequence[int] | None = None,
        allow_special_tokens: bool = False,
        drafts: bool = True,
        streamer: Streamer | None = None,
    ) -> Iterator[StreamStep]:
        """The same generation as `generate`, and the same programs, handed out while it happens.

        With `drafts` there is one `StreamStep` per denoising step, otherwise one per finished block (and
        one transfer to the host for each). The last step's tokens are those of `generate`. A Hugging Face
        `streamer` (batch of one) gets the prompt and then each finished block's tokens through `put`,
        drafts through `put_draft` if it has that, and `end`. Other arguments as in `generate`.

        Raises:
            ValueError: names the argument, what came and what is allowed; before the first step.
        """
        options = CallOptions(
            **self._defaults(recipe, block_length), temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, guidance=guidance, mask_id=mask_id, eos_id=eos_id, stop_on_eos=stop_on_eos)
        canvas, parts, eos_ids = self._prepare(
            prompts, options, max_new_tokens=max_new_tokens, align=align, key=key, row_ids=row_ids,
            allow_special_tokens=allow_special_tokens,
            call=f"stream, drafts={drafts}, streamer={streamer is not None}")
        if streamer is not None and canvas.batch != 1:
            raise ValueError(f"streamer: got {canvas.batch} prompts; a streamer takes one; stream without it")
        steps = self._stream(
            canvas, parts, guidance=guidance, eos_ids=eos_ids, key=key, row_ids=row_ids, drafts=drafts,
            limit=max_new_tokens)
        return steps if streamer is None else feed(streamer, canvas, steps)

    @without_mesh()
    def decode(
        self, canvas: Canvas, parts: Parts, *, guidance: float | None = None, eos_ids: Sequence[int] = (),
        key: int | Key[Array, ""] = 0, row_ids: Sequence[int] | None = None, limit: int | None = None,
        watch: Watch | None = None,
    ) -> Generation:
        """Decode a canvas of your own with parts of your own, in one jitted loop: what `generate` ends in.

        Args:
            canvas: the same on every process of the mesh.
            parts: likewise.
            guidance: as in `generate`.
            eos_ids: at which completions are trimmed; none keeps every open position.
            key: as in `generate`.
            row_ids: as in `generate`.
            watch: as in `generate`.

        Raises:
            ValueError: not one row id for each row, or a cache policy that is not for this model or canvas.
        """
        recipes.check_blocks(parts, self.config, block_length=canvas.block_length)
        run = Run(self.program, *self._arguments(canvas, parts, guidance=guidance, key=key, row_ids=row_ids))
        return run.generation(canvas, eos_ids=eos_ids, tokenizer=self.tokenizer, watch=watch, limit=limit)

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
        rows = self._rows(prompts, {"call": "logits"}, allow_special_tokens=allow_special_tokens)
        check_lengths(self.config, rows)
        length = max(max(len(row) for row in rows), 1)
        tokens = np.full((len(rows), length), self.config.pad_id, np.int32)
        valid, positions = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, np.int32)
        for index, row in enumerate(rows):
            here = slice(length - len(row), length)
            tokens[index, here], valid[index, here], positions[index, here] = row, True, np.arange(len(row))
        missing = -len(rows) % self.program.row_parts
        arrays = [np.pad(array, ((0, missing), (0, 0))) for array in (tokens, valid, positions)]
        program = self.program
        with with_peers(self.mesh):
            got = program.run(
                program.logits, program.denoiser, check_alive(self.params), *program.place_rows(tuple(arrays)))
            return np.asarray(jax.device_get(got))[: len(rows)]

    @without_mesh()
    def warmup(
        self, shapes: Sequence[tuple[int, int, int]], *, recipe: Recipe | None = None, block_length: int | None = None,
        top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        guidance: float | None = None,
    ) -> int:
        """Compile ahead for (batch, prompt length, max_new_tokens) shapes; the number of programs compiled.

        Later calls of `generate` with lengths in the same buckets, the same structure of recipe and the
        same use of top_k, top_p, min_p and guidance then compile nothing.
        """
        before = self.compile_count
        options = CallOptions(
            **self._defaults(recipe, block_length), temperature=0.0, top_k=top_k, top_p=top_p,
            min_p=min_p, guidance=guidance, mask_id=None, eos_id=None, stop_on_eos=True)
        for batch, prompt_length, max_new_tokens in shapes:
            check_integer("shapes", batch, 1, advice="each is (batch, prompt length, max_new_tokens)")
            check_integer("shapes", prompt_length, 0, self.config.max_positions)
            check_integer("shapes", max_new_tokens, 1, self.config.max_positions - prompt_length)
            canvas, parts, _ = self._prepare([[0] * prompt_length] * batch, options, max_new_tokens=max_new_tokens,
                                             align=False)
            # Nothing to decode: the program is compiled and its loop ends before the first step.
            idle = dataclasses.replace(canvas, is_masked=jax.device_put(np.zeros(canvas.tokens.shape, bool)))
            Run(self.program, *self._arguments(idle, parts, guidance=guidance, key=0, row_ids=None)).advance()
        return self.compile_count - before

    def memory_estimate(
        self, batch: int, canvas_length: int, *, recipe: Recipe | None = None, block_length: int | None = None
    ) -> DeviceMemory:
        """Bytes that a generation on one GPU needs, from the shapes alone: nothing is compiled.

        What each device of a mesh or a TPU needs is `djax.plan.plan`'s to say.
        """
        from djax.plan.memory import estimate_device_memory

        return estimate_device_memory(self.config, batch=batch, canvas_length=canvas_length, parameter_bytes=sum(
            leaf.nbytes for leaf in jax.tree.leaves(self.params)), **self._defaults(recipe, block_length))

    def _defaults(self, recipe: Recipe | None, block_length: int | None, *, gaps: bool = False) -> dict[str, Any]:
        """Recipe and block length of a call, where it says nothing those of the model."""
        return {"recipe": recipes.default_for(self.config, gaps=gaps) if recipe is None else recipe,
                "block_length": check_block_length(self.config, block_length)}

    def _rows(
        self, prompts: Prompt | Sequence[Prompt] | None, call: Mapping[str, Any], *, allow_special_tokens: bool,
    ) -> list[list[int]]:
        """Token ids of the prompts, whichever of the mesh's processes has them; `call` is the same on all."""
        return shared_prompts(
            prompts, tokenizer=self.tokenizer, vocab_size=self.config.vocab_size, mesh=self.mesh,
            call={**call, "allow_special_tokens": allow_special_tokens, **self._alike()},
            allow_special_tokens=allow_special_tokens)

    def _alike(self) -> dict[str, Any]:
        """What all processes of a mesh must have alike besides the call."""
        return {"mesh": repr(self.mesh), "rules": dict(self.program.rules), "config": repr(self.config),
                "kernels": repr(self.kernels), "tokenizer": self.vocab_limit}

    def _prepare(
        self, prompts: Prompt | Sequence[Prompt] | None, options: CallOptions, *, max_new_tokens: int, align: bool,
        key: int | Key[Array, ""] = 0, row_ids: Sequence[int] | None = None, call: str = "generate",
        allow_special_tokens: bool = False,
    ) -> tuple[Canvas, Parts, tuple[int, ...]]:
        rows = self._rows(prompts, {
            "call": call, **vars(options), "max_new_tokens": max_new_tokens, "align": align, "key": key,
            "row_ids": row_ids}, allow_special_tokens=allow_special_tokens)
        mask_id, eos_ids = resolve_ids(options, self.config)
        recipes.check_blocks(options.recipe, self.config, block_length=options.block_length)
        max_new_tokens = check_lengths(self.config, rows, max_new_tokens=max_new_tokens, least=1)
        canvas = Canvas.from_prompts(
            rows, max_new_tokens=max_new_tokens, block_length=options.block_length, mask_id=mask_id,
            pad_id=self.config.pad_id, align=align or self.config.block_length is not None,
            whole_blocks=self.config.block_length is not None)
        return canvas, make_parts(options, mask_id=mask_id, eos_ids=eos_ids, vocab_limit=self.vocab_limit), eos_ids

    def _stream(
        self, canvas: Canvas, parts: Parts, *, guidance: float | None, eos_ids: Sequence[int],
        key: int | Key[Array, ""], row_ids: Sequence[int] | None, drafts: bool, limit: int,
    ) -> Iterator[StreamStep]:
        # no context around a yield: it would be the caller's between two steps
        with without_mesh():
            reader = StreamReader(canvas, eos_ids=eos_ids, tokenizer=self.tokenizer, limit=limit)
            run = Run(self.program, *self._arguments(canvas, parts, guidance=guidance, key=key, row_ids=row_ids))
        block = 0
        while run.left:
            block += 1
            shown = run.advance(steps=1) if drafts else run.advance(before_block=block)
            with with_peers(self.mesh), without_mesh():
                step = reader.read(shown, last=not run.left)
            yield step

    def _arguments(
        self, canvas: Canvas, parts: Parts, *, guidance: float | None, key: int | Key[Array, ""],
        row_ids: Sequence[int] | None,
    ) -> tuple[Denoiser, Params, Canvas, Key[Array, ""], Parts, Int[Array, " B"]]:
        """What the jitted functions take, placed on the mesh."""
        ids = np.arange(canvas.batch) if row_ids is None else np.asarray(row_ids)
        if ids.shape != (canvas.batch,):
            raise ValueError(f"row_ids: got {ids.size} ids; allowed one for each of the {canvas.batch} prompts")
        if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**31:
            raise ValueError(f"row_ids: got {row_ids!r}; allowed integers from 0 to {2**31 - 1}")
        program = self.program
        padded = program.pad_rows(canvas)
        row_numbers = np.concatenate([ids, np.zeros(padded.batch - canvas.batch, ids.dtype)]).astype(np.int32)
        denoiser: Denoiser = program.denoiser
        if guidance is not None:
            denoiser = Guided(denoiser, scale=jax.device_put(np.float32(guidance)), mask_id=padded.mask_id,
                              unconditional=padded.valid & ~padded.is_masked)
        random_key = as_key(key)
        denoiser, padded, row_numbers = program.place_rows((denoiser, padded, row_numbers))
        random_key, parts = program.place((random_key, parts))
        return denoiser, check_alive(self.params), padded, random_key, parts, row_numbers


def _dtype_name(dtype: Any) -> str | None:
    """The name of a dtype of NumPy's or JAX's, or given by name."""
    if dtype is None:
        return None
    if not isinstance(dtype, str):
        try:
            dtype = np.dtype(dtype).name
        except TypeError:
            raise ArgumentError("dtype", shown(dtype), allowed=", ".join(DTYPES)) from None
    return str(check_choice("dtype", dtype, DTYPES))
