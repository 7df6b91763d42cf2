"""The baseline of djax: transformers' own model in an eager loop with the same strategy and cache.

The network is `Qwen3MoeForCausalLM`, made bidirectional and without renormalised router weights: LLaDA-MoE by
other authors. The loop is what a careful PyTorch user would write: it decodes block by block, recomputes the
windows that the cache policy names, keeps keys and values in plain tensors that are written in place, takes
the head on the block's positions only, and uses the experts implementation of transformers and the number of
threads that are fastest for each window on this machine.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
BATCHED_LIMIT = 2**30
"""Bytes of expert weights that `batched_mm` may copy in one layer; beyond it is not tried."""


@dataclasses.dataclass(frozen=True)
class TwinRecipe:
    """Threshold decoding with hard tokens and one of djax's cache policies."""

    threshold: float
    window: tuple[int, int] | None
    """Positions before and after the block that a step recomputes; None for no cache."""
    warmup: int = 0
    """Steps of block 0 that are full forwards before the one that fills the cache."""


class Setting(NamedTuple):
    """Settings that change no result."""

    experts: str
    threads: int

    def __str__(self) -> str:
        return f"{self.experts}, {self.threads} threads"


@dataclasses.dataclass(frozen=True)
class Trace:
    """One generation, on the host."""

    tokens: Int[np.ndarray, "B T"]
    commit_step: Int[np.ndarray, "B T"]
    """The row's step that committed each position; -1 in the prompt."""


class WindowCache:
    """Keys and values of the whole canvas, one pair of tensors per layer, as transformers' layers ask for them.

    A full forward replaces them (nothing is copied); a window is written in place and all of it returned.
    """

    def __init__(self, layers: int) -> None:
        self._layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * layers
        self._window: slice | None = None
        self._length = 0

    def place(self, window: slice | None, length: int) -> None:
        """Say what the next forward recomputes: `window`, or with None all `length` positions."""
        self._window, self._length = window, length

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values [B, G, W, K]; returns those of the canvas."""
        held = self._layers[layer_idx]
        if self._window is None or held is None:
            self._layers[layer_idx] = key, value
            return key, value
        held[0][:, :, self._window] = key
        held[1][:, :, self._window] = value
        return held

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing is behind the canvas: positions are given."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """See `get_seq_length`."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys and their offset, for the attention mask (which stays None: nothing is masked)."""
        return self._length, 0


def twin_config(fields: dict[str, Any]) -> Qwen3MoeConfig:
    """The Qwen3-MoE configuration of the same network as a LLaDA-MoE `config.json`."""
    config = Qwen3MoeConfig(  # type: ignore[call-arg]  # transformers' own signature is made at run time
        vocab_size=fields["vocab_size"], hidden_size=fields["hidden_size"],
        num_hidden_layers=fields["num_hidden_layers"], num_attention_heads=fields["num_attention_heads"],
        num_key_value_heads=fields["num_key_value_heads"],
        head_dim=fields["hidden_size"] // fields["num_attention_heads"], num_experts=fields["num_experts"],
        num_experts_per_tok=fields["num_experts_per_tok"], moe_intermediate_size=fields["expert_intermediate_size"],
        rms_norm_eps=fields["rms_norm_eps"], rope_theta=float(fields["rope_theta"]), norm_topk_prob=False,
        max_position_embeddings=fields["max_position_embeddings"], decoder_sparse_step=1, mlp_only_layers=[],
        tie_word_embeddings=False, pad_token_id=None, attn_implementation="sdpa")
    config.is_causal = False
    return config


class TorchTwin:
    """The network and the loop. Rows have equal lengths and no padding."""

    def __init__(self, directory: Path, *, threads: int) -> None:
        """Load a float32 checkpoint with LLaDA-MoE's keys."""
        torch.set_num_threads(threads)
        fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config = twin_config(fields)
        self.mask_id: int = fields["mask_token_id"]
        self.model = Qwen3MoeForCausalLM.from_pretrained(directory, config=config, dtype=torch.float32).eval()
        for layer in self.model.model.layers:
            # sdpa asks the module, the mask asks the configuration
            layer.self_attn.is_causal = False
        self.threads = threads
        self.chosen: dict[tuple[int, int], Setting] = {}
        """The fastest setting for each (batch, positions)."""

    @torch.inference_mode()
    def calibrate(self, batch: int, positions: int, *, repeats: int = 3) -> dict[Setting, float]:
        """Find the fastest setting for a forward of this shape; seconds of each.

        One thread is tried too: on a shared machine threads that wait for each other can be far slower.
        """
        config = self.model.config
        copied = 12 * batch * positions * config.num_experts_per_tok * config.moe_intermediate_size * config.hidden_size
        tokens = torch.randint(self.mask_id + 1, config.vocab_size, (batch, positions))
        seconds: dict[Setting, float] = {}
        for repeat in range(repeats + 1):
            for threads in sorted({1, self.threads}):
                for experts in IMPLEMENTATIONS:
                    if experts == "batched_mm" and copied > BATCHED_LIMIT:
                        continue
                    setting = Setting(experts, threads)
                    self._use(setting)
                    started = time.perf_counter()
                    self.model.model(tokens, use_cache=False)
                    taken = time.perf_counter() - started
                    if repeat:  # the first is a warm-up
                        seconds[setting] = min(taken, seconds.get(setting, taken))
        self.chosen[batch, positions] = min(seconds, key=lambda setting: seconds[setting])
        return seconds

    def _use(self, setting: Setting) -> None:
        if setting.experts != self.model.config._experts_implementation:
            self.model.set_experts_implementation(setting.experts)
        if setting.threads != torch.get_num_threads():
            torch.set_num_threads(setting.threads)

    @torch.inference_mode()
    def generate(
        self, prompts: Int[np.ndarray, "B P"], recipe: TwinRecipe, *, max_new_tokens: int, block_length: int
    ) -> Trace:
        """Decode greedily; `max_new_tokens` is a multiple of `block_length`."""
        start, batch = prompts.shape[1], prompts.shape[0]
        tokens = torch.full((batch, start + max_new_tokens), self.mask_id)
        tokens[:, :start] = torch.from_numpy(prompts)
        masked = torch.zeros_like(tokens, dtype=torch.bool)
        masked[:, start:] = True
        commit_step = torch.full_like(tokens, -1)
        steps = torch.zeros(batch, dtype=torch.int64)
        cache = None if recipe.window is None else WindowCache(self.model.config.num_hidden_layers)
        for block in range(max_new_tokens // block_length):
            here = slice(start + block * block_length, start + (block + 1) * block_length)
            step = 0
            while bool((active := masked[:, here].any(-1)).any()):
                refresh = step == 0 or (block == 0 and step <= recipe.warmup)
                logits = self._logits(tokens, here, recipe, cache, refresh)
                commit, token = decide(logits, masked[:, here], recipe.threshold, self.mask_id)
                tokens[:, here] = torch.where(commit, token, tokens[:, here])
                commit_step[:, here] = torch.where(commit, steps[:, None], commit_step[:, here])
                masked[:, here] &= ~commit
                steps += active
                step += 1
        return Trace(tokens=tokens.numpy().astype(np.int32), commit_step=commit_step.numpy().astype(np.int32))

    def _logits(
        self, tokens: torch.Tensor, here: slice, recipe: TwinRecipe, cache: WindowCache | None, refresh: bool
    ) -> torch.Tensor:
        """The block's logits [B, L, V] from a full or a windowed forward."""
        length, window = tokens.shape[1], None
        if cache is not None and recipe.window is not None:
            if not refresh:
                before, after = recipe.window
                window = slice(max(here.start - before, 0), min(here.stop + after, length))
            cache.place(window, length)
        seen = slice(0, length) if window is None else window
        setting = self.chosen.get((tokens.shape[0], seen.stop - seen.start))
        if setting is not None:
            self._use(setting)
        positions = torch.arange(seen.start, seen.stop)[None]
        output = self.model.model(
            tokens[:, seen], position_ids=positions, past_key_values=cache, use_cache=False)
        hidden = output.last_hidden_state[:, here.start - seen.start : here.stop - seen.start]
        return self.model.lm_head(hidden)


def decide(
    logits: torch.Tensor, masked: torch.Tensor, threshold: float, mask_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Threshold decoding: positions [B, L] to commit and every position's best token.

    Committed is what is masked and has a confidence of at least min(threshold, best - 1e-5) of its row.
    """
    logits[..., mask_id] = -torch.inf
    best, token = logits.max(-1)
    confidence = (best - logits.logsumexp(-1)).exp().masked_fill(~masked, -torch.inf)
    limit = (confidence.amax(-1, keepdim=True) - 1e-5).clamp(max=threshold)
    return (confidence >= limit) & masked, token
