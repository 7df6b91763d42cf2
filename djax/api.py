"""The API that a researcher meets first: `load`, and a `DiffusionLM` that takes text and gives text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from djax import recipes
from djax.calls import CallOptions, make_parts, resolve_ids
from djax.canvas import Canvas
from djax.config import ModelConfig
from djax.denoise import advance, begin, denoise, unfinished
from djax.generation import Generation, StreamReader, StreamStep, to_generation
from djax.memory import MemoryEstimate, estimate_memory
from djax.models import Guided, Kernels, ModelDenoiser, build, kernels_on
from djax.prompts import Prompt, encode_prompts
from djax.recipes import Recipe
from djax.state import Parts
from djax.text import Tokenizer, has_tokenizer
from djax.types import Denoiser, Params


class Streamer(Protocol):
    """A Hugging Face streamer. `put_draft(tokens)` is called too where it exists."""

    def put(self, value: Any) -> None:
        """Take token ids: the prompt first, then what became final."""
        ...

    def end(self) -> None:
        """The stream is over."""
        ...


def load(
    source: str | Path | None = None,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Any = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    kernels: Kernels | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DiffusionLM:
    """Load a LLaDA-MoE checkpoint. Nothing in it is executed: no pickle, no remote code.

    Args:
        source: a Hugging Face directory (safetensors), a directory written by `djax convert`, or a hub id;
            None or "djax:base" is the small model bundled with djax, "djax:compressed" the same after
            trajectory compression.
        dtype: of weights and activations: "bfloat16", "float32" or "float16"; None keeps the checkpoint's.
        mesh: devices to shard over; None is the default device.
        rules: logical axis name to mesh axis, see `djax.sharding`; None is its default.
        mask_id: overrides the checkpoint's mask id.
        eos_id: overrides the checkpoint's EOS id.
        kernels: implementations to run on; None picks the best for the hardware (`djax.models.kernels_on`).
        progress: called with (bytes done, bytes in all).

    Raises:
        convert.CheckpointError: (a ValueError) there is no such checkpoint, or it is damaged, incomplete or
            unsupported; names the file and the key.
    """
    import convert
    from djax import assets

    directory = convert.resolve_source(assets.resolve(source))
    config, params = convert.load_params(directory, dtype=dtype, mesh=mesh, rules=rules, progress=progress)
    tokenizer = Tokenizer.load(directory) if has_tokenizer(directory) else None
    if mask_id is None and config.mask_id is None and tokenizer is not None:
        mask_id = tokenizer.mask_id
    config = dataclasses.replace(
        config, mask_id=config.mask_id if mask_id is None else mask_id,
        eos_id=config.eos_id if eos_id is None else eos_id)
    return DiffusionLM(config, params, tokenizer=tokenizer, mesh=mesh, kernels=kernels)


class DiffusionLM:
    """A masked-diffusion language model ready to generate: configuration, weights, tokenizer, mesh."""

    def __init__(
        self, config: ModelConfig, params: Params, *, tokenizer: Tokenizer | None = None, mesh: Mesh | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """Wrap loaded weights. `params` is the `nnx.State` (or pure dict) of `djax.models.build(config)`.

        `kernels` names the implementations to run on; None takes `djax.models.kernels_on(mesh)`.
        """
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.mesh = mesh
        chosen = kernels_on(mesh) if kernels is None else kernels
        self.denoiser = ModelDenoiser(nnx.split(build(config, kernels=chosen))[0])
        self._compiled = 0
        self._denoise = self._jit(_denoise)
        self._begin = self._jit(_begin)
        self._advance = self._jit(_advance)
        self._logits = self._jit(_logits)

    @property
    def compile_count(self) -> int:
        """Programs compiled by this object so far."""
        return self._compiled

    @property
    def vocab_limit(self) -> int:
        """Ids from here on are vocabulary padding and never generated."""
        return self.config.vocab_size if self.tokenizer is None else min(self.tokenizer.size, self.config.vocab_size)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        recipe: Recipe | None = None,
        max_new_tokens: int = 256,
        block_length: int = 64,
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
    ) -> Generation:
        """Complete prompts in one jitted program.

        A sweep of thresholds, temperatures, keys or EOS ids compiles nothing new, nor do prompts whose
        lengths fall into the same bucket (`djax.canvas.bucket_size`); `compile_count` tells.

        Args:
            prompts: texts (taken as they are), conversations (through the chat template) or token ids.
            recipe: which decoder, from `djax.recipes`; default `recipes.dinfer()`.
            max_new_tokens: positions to generate per row; need not be a multiple of `block_length`.
            block_length: positions decoded together.
            temperature: 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature).
            top_k: draw from the k most probable tokens only.
            top_p: draw from the smallest set of tokens with this mass only.
            min_p: draw from tokens at least this probable relative to the best only.
            guidance: scale of classifier-free guidance (two forwards per step); None is off.
            key: seed or `jax.random` key.
            mask_id: overrides the model's mask id.
            eos_id: overrides the model's EOS id; several end a sequence alike.
            stop_on_eos: end a row with the block that holds its first EOS; completions are trimmed there
                either way.
            align: put block boundaries on multiples of `block_length` from each row's start.
            row_ids: identity of each row for the random key; rows keep their samples when a batch is cut.

        Raises:
            ValueError: names the argument, what came and what is allowed.
        """
        options = CallOptions(
            recipe=recipe or recipes.dinfer(), block_length=block_length, temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, guidance=guidance, mask_id=mask_id, eos_id=eos_id, stop_on_eos=stop_on_eos)
        canvas, parts, eos_ids = self._prepare(prompts, options, max_new_tokens=max_new_tokens, align=align)
        return self._run(canvas, parts, options, eos_ids=eos_ids, key=key, row_ids=row_ids)

    def infill(
        self,
        token_ids: Sequence[Sequence[int]] | Sequence[int],
        mask: Sequence[Sequence[bool]] | Sequence[bool],
        *,
        recipe: Recipe | None = None,
        block_length: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance: float | None = None,
        key: int | Key[Array, ""] = 0,
        mask_id: int | None = None,
        row_ids: Sequence[int] | None = None,
    ) -> Generation:
        """Fill the masked positions of token sequences; every other token comes back as it was.

        Blocks begin at each row's first masked position. No EOS stops a row, and EOS ids are not
        generated: the tokens on both sides are given. `tokens` and `text` of the result are whole rows.

        Args:
            token_ids: one row or several, ragged.
            mask: True where a token is to be filled in; the shape of `token_ids`.
            recipe: as in `generate`, and so are the other arguments.
            block_length: positions decoded together.
            temperature: 0 is greedy.
            top_k: see `generate`.
            top_p: see `generate`.
            min_p: see `generate`.
            guidance: see `generate`.
            key: seed or `jax.random` key.
            mask_id: overrides the model's mask id.
            row_ids: identity of each row for the random key.

        Raises:
            ValueError: names the argument, what came and what is allowed.
        """
        options = CallOptions(
            recipe=recipe or recipes.dinfer(), block_length=block_length, temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, guidance=guidance, mask_id=mask_id, eos_id=None, stop_on_eos=False)
        mask_token, eos_ids = resolve_ids(options, self.config)
        rows = encode_prompts(token_ids, tokenizer=None, vocab_size=self.config.vocab_size)
        masks: Sequence[Any] = mask if len(mask) and isinstance(mask[0], Sequence | np.ndarray) else [mask]
        canvas = Canvas.from_tokens(
            rows, masks, block_length=block_length, mask_id=mask_token, pad_id=self.config.pad_id)
        parts = make_parts(options, mask_id=mask_token, eos_ids=eos_ids, vocab_limit=self.vocab_limit,
                           forbidden=eos_ids)
        got = self._run(canvas, parts, options, eos_ids=(), key=key, row_ids=row_ids)
        whole = [row[valid] for row, valid in zip(got.canvas, got.canvas_mask, strict=True)]
        text = None if self.tokenizer is None else [self.tokenizer.decode(row) for row in whole]
        return dataclasses.replace(got, tokens=whole, text=text)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        recipe: Recipe | None = None,
        max_new_tokens: int = 256,
        block_length: int = 64,
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
        drafts: bool = True,
        streamer: Streamer | None = None,
    ) -> Iterator[StreamStep]:
        """The same generation as `generate`, handed out while it happens.

        With `drafts` there is one `StreamStep` per denoising step, otherwise one per finished block (and
        one transfer to the host for each). The last step's tokens are those of `generate`. A Hugging Face
        `streamer` (batch of one) gets the prompt and then each finished block's tokens through `put`,
        drafts through `put_draft` if it has that, and `end`. Other arguments as in `generate`.

        Raises:
            ValueError: names the argument, what came and what is allowed; before the first step.
        """
        options = CallOptions(
            recipe=recipe or recipes.dinfer(), block_length=block_length, temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, guidance=guidance, mask_id=mask_id, eos_id=eos_id, stop_on_eos=stop_on_eos)
        canvas, parts, eos_ids = self._prepare(prompts, options, max_new_tokens=max_new_tokens, align=align)
        if streamer is not None and canvas.batch != 1:
            raise ValueError(f"streamer: got {canvas.batch} prompts; a streamer takes one; stream without it")
        steps = self._stream(canvas, parts, options, eos_ids=eos_ids, key=key, row_ids=row_ids, drafts=drafts)
        return steps if streamer is None else _feed(streamer, canvas, steps)

    def logits(self, prompts: Prompt | Sequence[Prompt]) -> Float[np.ndarray, "B T V"]:
        """float32 logits of one full bidirectional forward; shorter rows are padded on the left.

        Position i's logits are about the token at position i: there is no shift.
        """
        rows = encode_prompts(prompts, tokenizer=self.tokenizer, vocab_size=self.config.vocab_size)
        length = max(max(len(row) for row in rows), 1)
        tokens = np.full((len(rows), length), self.config.pad_id, np.int32)
        valid, positions = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, np.int32)
        for index, row in enumerate(rows):
            here = slice(length - len(row), length)
            tokens[index, here], valid[index, here], positions[index, here] = row, True, np.arange(len(row))
        return np.asarray(self._logits(self.denoiser, self.params, *self._place((tokens, valid, positions))))

    def warmup(
        self, shapes: Sequence[tuple[int, int, int]], *, recipe: Recipe | None = None, block_length: int = 64,
        top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        guidance: float | None = None,
    ) -> int:
        """Compile ahead for (batch, prompt length, max_new_tokens) shapes; the number of programs compiled.

        Later calls of `generate` with lengths in the same buckets, the same structure of recipe and the
        same use of top_k, top_p, min_p and guidance then compile nothing.
        """
        before = self.compile_count
        options = CallOptions(
            recipe=recipe or recipes.dinfer(), block_length=block_length, temperature=0.0, top_k=top_k, top_p=top_p,
            min_p=min_p, guidance=guidance, mask_id=None, eos_id=None, stop_on_eos=True)
        for batch, prompt_length, max_new_tokens in shapes:
            canvas, parts, _ = self._prepare([[0] * prompt_length] * batch, options, max_new_tokens=max_new_tokens,
                                             align=False)
            # Nothing to decode: the program is compiled and its loop ends before the first step.
            idle = dataclasses.replace(canvas, is_masked=jnp.zeros_like(canvas.is_masked))
            arguments = self._arguments(idle, parts, options, key=0, row_ids=None)
            jax.block_until_ready(self._denoise(*arguments))
        return self.compile_count - before

    def memory_estimate(
        self, batch: int, canvas_length: int, *, recipe: Recipe | None = None, block_length: int = 64
    ) -> MemoryEstimate:
        """Bytes that a generation needs, from the shapes alone: nothing is compiled."""
        return estimate_memory(
            self.config, batch=batch, canvas_length=canvas_length, block_length=block_length,
            recipe=recipe or recipes.dinfer(), parameter_bytes=_nbytes(self.params))

    def _prepare(
        self, prompts: Prompt | Sequence[Prompt], options: CallOptions, *, max_new_tokens: int, align: bool
    ) -> tuple[Canvas, Parts, tuple[int, ...]]:
        mask_id, eos_ids = resolve_ids(options, self.config)
        rows = encode_prompts(prompts, tokenizer=self.tokenizer, vocab_size=self.config.vocab_size)
        canvas = Canvas.from_prompts(
            rows, max_new_tokens=max_new_tokens, block_length=options.block_length, mask_id=mask_id,
            pad_id=self.config.pad_id, align=align)
        longest = max(len(row) for row in rows) + max_new_tokens
        if longest > self.config.max_positions:
            raise ValueError(
                f"max_new_tokens: got {max_new_tokens} after a prompt of {longest - max_new_tokens} tokens; allowed "
                f"{self.config.max_positions} positions in all; shorten the prompt or generate less")
        return canvas, make_parts(options, mask_id=mask_id, eos_ids=eos_ids, vocab_limit=self.vocab_limit), eos_ids

    def _run(
        self, canvas: Canvas, parts: Parts, options: CallOptions, *, eos_ids: Sequence[int],
        key: int | Key[Array, ""], row_ids: Sequence[int] | None,
    ) -> Generation:
        result = self._denoise(*self._arguments(canvas, parts, options, key=key, row_ids=row_ids))
        return to_generation(canvas, result, eos_ids=eos_ids, tokenizer=self.tokenizer)

    def _stream(
        self, canvas: Canvas, parts: Parts, options: CallOptions, *, eos_ids: Sequence[int],
        key: int | Key[Array, ""], row_ids: Sequence[int] | None, drafts: bool,
    ) -> Iterator[StreamStep]:
        reader = StreamReader(canvas, eos_ids=eos_ids, tokenizer=self.tokenizer)
        denoiser, params, canvas, key, parts, rows = self._arguments(canvas, parts, options, key=key, row_ids=row_ids)
        state, more = self._begin(denoiser, params, canvas, key, parts, rows)
        block = 0
        while more:
            block += 1
            steps, before_block = (1, canvas.num_blocks) if drafts else (np.iinfo(np.int32).max, block)
            state, more = self._advance(
                denoiser, params, canvas, state, parts, jnp.int32(steps), jnp.int32(before_block))
            yield reader.read(state, last=not bool(more))

    def _arguments(
        self, canvas: Canvas, parts: Parts, options: CallOptions, *, key: int | Key[Array, ""],
        row_ids: Sequence[int] | None,
    ) -> tuple[Denoiser, Params, Canvas, Key[Array, ""], Parts, Int[Array, "B"]]:
        """What the jitted functions take, placed on the mesh."""
        ids = np.arange(canvas.batch) if row_ids is None else np.asarray(row_ids)
        if ids.shape != (canvas.batch,):
            raise ValueError(f"row_ids: got {ids.size} ids; allowed one for each of the {canvas.batch} prompts")
        denoiser: Denoiser = self.denoiser
        if options.guidance is not None:
            denoiser = Guided(denoiser, scale=jnp.float32(options.guidance), mask_id=canvas.mask_id,
                              unconditional=canvas.valid & ~canvas.is_masked)
        random_key = jax.random.key(key) if isinstance(key, int | np.integer) else key
        placed = self._place((denoiser, canvas, random_key, parts, jnp.asarray(ids, jnp.int32)))
        denoiser, canvas, random_key, parts, rows = placed
        return denoiser, self.params, canvas, random_key, parts, rows

    def _place(self, tree: Any) -> Any:
        """Replicate a pytree over the mesh; without one leave it where it is."""
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def _jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`jax.jit` that counts its compilations: a trace happens exactly once for each."""

        def traced(*arguments: Any) -> Any:
            self._compiled += 1
            return function(*arguments)

        return jax.jit(traced)


def _denoise(denoiser: Denoiser, params: Params, canvas: Canvas, key: Array, parts: Parts, rows: Array) -> Any:
    axes = {field.name: getattr(parts, field.name) for field in dataclasses.fields(parts)}
    return denoise(denoiser, params, canvas, key, row_ids=rows, **axes)


def _begin(denoiser: Denoiser, params: Params, canvas: Canvas, key: Array, parts: Parts, rows: Array) -> Any:
    state = begin(denoiser, params, canvas, key, parts=parts, row_ids=rows)
    return state, unfinished(canvas, state)


def _advance(
    denoiser: Denoiser, params: Params, canvas: Canvas, state: Any, parts: Parts, steps: Array, before_block: Array
) -> Any:
    state = advance(denoiser, params, canvas, state, parts=parts, steps=steps, before_block=before_block)
    return state, unfinished(canvas, state)


def _logits(denoiser: Denoiser, params: Params, tokens: Array, valid: Array, positions: Array) -> Array:
    hidden, _ = denoiser.apply(
        params, denoiser.embed(params, tokens), positions=denoiser.place(params, positions), key_mask=valid,
        window_start=jnp.int32(0), write=valid, cache=None)
    return denoiser.unembed(params, hidden)


def _feed(streamer: Streamer, canvas: Canvas, steps: Iterator[StreamStep]) -> Iterator[StreamStep]:
    tokens, pinned = jax.device_get((canvas.tokens, canvas.valid & ~canvas.is_masked))
    streamer.put(tokens[0][pinned[0]])
    put_draft = getattr(streamer, "put_draft", None)
    for step in steps:
        if len(step.committed[0]):
            streamer.put(step.committed[0])
        if put_draft is not None:
            put_draft(step.draft[0])
        yield step
    streamer.end()


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
