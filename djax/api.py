"""The API that a researcher meets first: `load`, and a `DiffusionLM` that takes text and gives text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from djax.contracts.ambient import without_mesh
from djax.contracts.canvas import Canvas
from djax.devices.sharding import Rules
from djax.engine.model import LoadedModel
from djax.engine.options import (
    Call,
    Sampling,
    SamplingKwargs,
    check_block_length,
    check_lengths,
    check_warmup,
    dtype_name,
)
from djax.engine.prompts import Prompt, shared_masked, shared_prompts
from djax.engine.results import Generation, Watch, to_generation
from djax.engine.running import Run
from djax.engine.streaming import Streamer, StreamStep, stream_run, with_streamer
from djax.engine.tokenizer import Tokenizer, has_tokenizer
from djax.errors import check_flag, check_methods
from djax.loop.state import Parts, stop_reasons
from djax.models import Kernels
from djax.models.layers.kernels import check_kernels
from djax.recipes import Recipe, default_for

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

    check_kernels(kernels)
    directory = convert.resolve_source(assets.resolve(source))
    config, params = convert.load_params(directory, dtype=dtype_name(dtype), mesh=mesh, rules=rules, progress=progress)
    tokenizer = Tokenizer.load(directory) if has_tokenizer(directory) else None
    if mask_id is None and config.mask_id is None and tokenizer is not None:
        mask_id = tokenizer.mask_id
    config = dataclasses.replace(
        config, mask_id=config.mask_id if mask_id is None else mask_id,
        eos_id=config.eos_id if eos_id is None else eos_id,
        other_eos_ids=config.other_eos_ids if eos_id is None else ())
    return DiffusionLM(config, params, tokenizer=tokenizer, mesh=mesh, rules=rules, kernels=kernels)


class DiffusionLM(LoadedModel):
    """A masked-diffusion language model ready to generate: configuration, weights, tokenizer, mesh."""

    @without_mesh()
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None,
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 256,
        key: int | Key[Array, ""] = 0,
        align: bool = False,
        row_ids: Sequence[int] | None = None,
        allow_special_tokens: bool = False,
        watch: Watch | None = None,
        **options: Unpack[SamplingKwargs],
    ) -> Generation:
        """Complete prompts in one jitted loop, which comes back to the host about twice a second.

        Ctrl-C raises KeyboardInterrupt there, in whichever thread this runs (while XLA compiles: when that is done);
        `watch` has seen what was reached. A sweep of thresholds, temperatures, keys or EOS ids compiles nothing new,
        nor do prompts whose lengths fall into the same bucket (`djax.contracts.canvas.bucket_size`); `compile_count`
        tells.

        Args:
            prompts: texts (taken as they are), conversations (through the chat template) or token ids. On a mesh of
                several processes all have them, or one has and the others give None; all call alike.
            sampling: how to decode, draw and stop.
            max_new_tokens: positions to generate per row; need not be a multiple of `block_length`. A model with
                blocks decodes its last block to the end, as its own code does, and what is too much is cut off.
            key: a seed, 0 to 2**63 - 1, or a `jax.random` key, which is turned into a threefry key
                (`djax.contracts.keys.as_key`) if it is none.
            align: put block boundaries on multiples of `block_length` from each row's start; always for a model with
                blocks.
            row_ids: identity of each row for the random key; rows keep their samples when a batch is cut.
            allow_special_tokens: let control tokens that are written in texts and messages (`<|role_end|>`, the mask)
                be control tokens; otherwise they are the text that they look like.
            watch: called with what has been reached after each stretch of the loop but the last; rows still at work
                have the stop reason "interrupted". What it raises ends the generation.
            options: instead of `sampling` its fields: recipe, block_length, temperature, top_k, top_p, min_p,
                guidance, mask_id, eos_id, stop_on_eos. `help(djax.Sampling)` says what they are.

        Raises:
            ValueError: names the argument, what came and what is allowed.
            TypeError: an unknown keyword.
        """
        call, canvas = self._prepare(
            "generate", prompts, Sampling.of("generate", sampling, options), max_new_tokens=max_new_tokens,
            align=align, key=key, row_ids=row_ids, allow_special_tokens=allow_special_tokens)
        return self.decode(
            canvas, call.parts, guidance=call.guidance, eos_ids=call.eos_ids, key=key, row_ids=row_ids,
            limit=max_new_tokens, watch=watch)

    @without_mesh()
    def infill(
        self,
        token_ids: Sequence[Sequence[int]] | Sequence[int] | None,
        mask: Sequence[Sequence[bool]] | Sequence[bool] | None,
        *,
        sampling: Sampling | None = None,
        key: int | Key[Array, ""] = 0,
        row_ids: Sequence[int] | None = None,
        watch: Watch | None = None,
        **options: Unpack[SamplingKwargs],
    ) -> Generation:
        """Fill the masked positions of token sequences; every other token comes back as it was.

        Blocks begin at each row's first masked position, those of a model with blocks at the boundary at or before it.
        Unless `stop_on_eos` says so no EOS stops a row or is generated: the tokens on both sides are given. `tokens`
        and `text` of the result are whole rows.

        Args:
            token_ids: one row or several, ragged; None as for `generate`, with a mask of None.
            mask: True where a token is to be filled in; the shape of `token_ids`.
            sampling: how to decode and draw.
            key: seed or `jax.random` key.
            row_ids: identity of each row for the random key.
            watch: see `generate`.
            options: fields of `djax.Sampling`, see `generate`.

        Raises:
            ValueError: names the argument, what came and what is allowed.
            TypeError: an unknown keyword.
        """
        _check_watch(watch)
        sampling = Sampling.of("infill", sampling, options)
        rows, masks = shared_masked(
            token_ids, mask, tokenizer=self.tokenizer, program=self.program,
            call={"call": "infill", **vars(sampling), "key": key, "row_ids": row_ids})
        call = self.resolve(sampling, gaps=True)
        canvas = call.canvas_with_gaps(rows, masks)
        tokenizer = self.tokenizer
        return self.decode(
            canvas, call.parts, guidance=call.guidance, eos_ids=call.eos_ids, key=key, row_ids=row_ids,
            watch=None if watch is None else lambda got: watch(got.whole_rows(tokenizer))).whole_rows(tokenizer)

    @without_mesh()
    def stream(
        self,
        prompts: Prompt | Sequence[Prompt] | None,
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 256,
        key: int | Key[Array, ""] = 0,
        align: bool = False,
        row_ids: Sequence[int] | None = None,
        allow_special_tokens: bool = False,
        drafts: bool = True,
        streamer: Streamer | None = None,
        **options: Unpack[SamplingKwargs],
    ) -> Iterator[StreamStep]:
        """Generate as `generate` does, by the same programs, and hand out each step while it happens.

        With `drafts` there is one `StreamStep` per denoising step, otherwise one per finished block (and one transfer
        to the host for each). The last step's tokens are those of `generate`. A Hugging Face `streamer` (batch of one)
        gets the prompt and then each finished block's tokens through `put`, drafts through `put_draft` if it has that,
        and `end`. Other arguments as in `generate`.

        Raises:
            ValueError: names the argument, what came and what is allowed; before the first step.
            TypeError: an unknown keyword.
        """
        check_flag("drafts", drafts)
        check_methods("streamer", streamer, "put", "end", advice="such as transformers.TextStreamer")
        call, canvas = self._prepare(
            f"stream, drafts={drafts}, streamer={streamer is not None}", prompts,
            Sampling.of("stream", sampling, options), max_new_tokens=max_new_tokens, align=align, key=key,
            row_ids=row_ids, allow_special_tokens=allow_special_tokens)
        if streamer is not None and canvas.batch != 1:
            raise ValueError(f"streamer: got {canvas.batch} prompts; a streamer takes one; stream without it")
        steps = stream_run(
            lambda: Run(self.program, self.params, canvas, call.parts, guidance=call.guidance, key=key,
                        row_ids=row_ids),
            canvas, eos_ids=call.eos_ids, tokenizer=self.tokenizer, limit=max_new_tokens, drafts=drafts)
        return steps if streamer is None else with_streamer(streamer, canvas, steps)

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
            guidance: as in `Sampling`.
            eos_ids: at which completions are trimmed; none keeps every open position.
            key: as in `generate`.
            row_ids: as in `generate`.
            limit: how many open positions of each row were asked for; None is all.
            watch: as in `generate`.

        Raises:
            ValueError: not one row id for each row, or a cache policy that is not for this model or canvas.
        """
        _check_watch(watch)
        run = Run(self.program, self.params, canvas, parts, guidance=guidance, key=key, row_ids=row_ids)
        generation = functools.partial(
            to_generation, canvas, eos_ids=eos_ids, tokenizer=self.tokenizer, limit=limit,
            reasons=stop_reasons(parts.stop_rule))
        return generation(run.finish(None if watch is None else lambda got: watch(generation(got))))

    @without_mesh()
    def warmup(
        self, shapes: Sequence[tuple[int, int, int]], *, sampling: Sampling | None = None,
        **options: Unpack[SamplingKwargs],
    ) -> int:
        """Compile ahead for (batch, prompt length, max_new_tokens) shapes; the number of programs compiled.

        Later calls of `generate` with lengths in the same buckets, the same structure of recipe and the
        same use of top_k, top_p, min_p, guidance and stop_on_eos then compile nothing.

        Other arguments as in `generate`; their numbers do not matter.

        Raises:
            ValueError: names the argument, what came and what is allowed.
            TypeError: an unknown keyword.
        """
        before = self.compile_count
        sampling = Sampling.of("warmup", sampling, options)
        for batch, prompt_length, max_new_tokens in check_warmup(self.config, shapes):
            call, canvas = self._prepare(
                "warmup", [[0] * prompt_length] * batch, sampling, max_new_tokens=max_new_tokens)
            # Nothing to decode: the program is compiled and its loop ends before the first step.
            idle = dataclasses.replace(canvas, is_masked=jax.device_put(np.zeros(canvas.tokens.shape, bool)))
            Run(self.program, self.params, idle, call.parts, guidance=call.guidance).advance()
        return self.compile_count - before

    def memory_estimate(
        self, batch: int, canvas_length: int, *, recipe: Recipe | None = None, block_length: int | None = None
    ) -> DeviceMemory:
        """Bytes that a generation on one GPU needs, from the shapes alone: nothing is compiled.

        What each device of a mesh or a TPU needs is `djax.plan.plan`'s to say.

        Raises:
            ValueError: names the argument, what came and what is allowed.
        """
        from djax.plan.memory import estimate_device_memory

        asked = Sampling(recipe=recipe, block_length=block_length)
        return estimate_device_memory(
            self.config, batch=batch, canvas_length=canvas_length,
            block_length=check_block_length(self.config, asked.block_length),
            recipe=default_for(self.config) if asked.recipe is None else asked.recipe,
            parameter_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(self.params)))

    def _prepare(
        self, name: str, prompts: Prompt | Sequence[Prompt] | None, sampling: Sampling, *, max_new_tokens: int,
        align: bool = False, key: int | Key[Array, ""] = 0, row_ids: Sequence[int] | None = None,
        allow_special_tokens: bool = False,
    ) -> tuple[Call, Canvas]:
        """Prepare a call that completes prompts: its parts and its canvas; all processes call alike."""
        rows = shared_prompts(
            prompts, tokenizer=self.tokenizer, program=self.program, allow_special_tokens=allow_special_tokens, call={
                "call": name, **vars(sampling), "max_new_tokens": max_new_tokens, "align": align, "key": key,
                "row_ids": row_ids})
        call = self.resolve(sampling)
        count = check_lengths(self.config, rows, max_new_tokens=max_new_tokens, least=1)
        return call, call.canvas(rows, max_new_tokens=count, align=align)


def _check_watch(watch: Watch | None) -> None:
    check_methods("watch", watch, "__call__", advice="it is called with a djax.Generation")
