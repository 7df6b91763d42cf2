"""One call's options: checked, and turned into the loop's parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from djax.contracts.types import Filter, Propose, StopRule, Transform
from djax.errors import ArgumentError, check_integer, check_number, shown
from djax.loop.state import Parts
from djax.models.config import ModelConfig
from djax.parts.proposals import LARGEST_TEMPERATURE, Greedy, RefuseToken, Sample
from djax.parts.stopping import AnyOf, Never, OnEos
from djax.parts.transforms import Chain, ForbidTokens, MinP, TopK, TopP


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What `generate`, `stream` and `infill` take besides the prompt; see `DiffusionLM.generate`.

    Raises:
        ValueError: an option outside its range.
    """

    recipe: Parts
    block_length: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    guidance: float | None
    mask_id: int | None
    eos_id: int | Sequence[int] | None
    stop_on_eos: bool

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, Parts):
            raise ArgumentError("recipe", f"a {type(self.recipe).__name__}", allowed="djax.Parts",
                                advice="such as djax.recipes.dinfer()")
        for name in ("block_length", "temperature", "top_k", "top_p", "min_p", "guidance"):
            object.__setattr__(self, name, _scalar(name, getattr(self, name)))
        check_integer("block_length", self.block_length, 1)
        # above, noise times temperature could overflow; below float32's smallest normal number, 0 is meant
        check_number("temperature", self.temperature, 0.0, LARGEST_TEMPERATURE)
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 1)
        if self.top_p is not None:
            check_number("top_p", self.top_p, 0.0, 1.0, above=True)
        if self.min_p is not None:
            check_number("min_p", self.min_p, 0.0, 1.0)
        if self.guidance is not None:
            check_number("guidance", self.guidance, -1.0)


def resolve_ids(options: CallOptions, config: ModelConfig) -> tuple[int, tuple[int, ...]]:
    """The mask id and the EOS ids of a call.

    Raises:
        ValueError: no mask id is known, or an id is outside the vocabulary.
    """
    mask_id = config.mask_id if options.mask_id is None else options.mask_id
    if mask_id is None:
        raise ArgumentError("mask_id", "none, neither from the checkpoint nor from its tokenizer", allowed="a token id",
                            advice="give it")
    given: Any = (config.eos_id, *config.other_eos_ids) if options.eos_id is None else options.eos_id
    mask_id, given = jax.device_get((mask_id, given))
    if isinstance(given, str | bytes):
        raise ArgumentError("eos_id", shown(given), allowed="a token id, or several")
    eos_ids = tuple(map(_plain, given)) if np.ndim(given) else (_plain(given),)
    mask_id = _plain(mask_id)
    if not eos_ids:
        raise ArgumentError("eos_id", "an empty list", allowed="at least one id", advice="or stop_on_eos=False")
    for name, token in [("mask_id", mask_id), *(("eos_id", token) for token in eos_ids)]:
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < config.vocab_size:
            raise ArgumentError(name, shown(token), allowed=f"0 to {config.vocab_size - 1}, the model's vocabulary")
    if mask_id in eos_ids:
        raise ArgumentError("eos_id", f"{mask_id}, which is the mask id", allowed="another token",
                            advice="the mask is never generated, so nothing would stop there")
    return int(mask_id), tuple(int(token) for token in eos_ids)


def make_parts(
    options: CallOptions, *, mask_id: int, eos_ids: Sequence[int], vocab_limit: int, forbidden: Sequence[int] = ()
) -> Parts:
    """The loop's parts for one call.

    The mask id (unless the recipe refuses it instead), `forbidden` and the vocabulary's padding are dropped
    before anything else sees the logits. Every number becomes an array, so that a sweep compiles nothing.

    Raises:
        ArgumentError: a setting of the draw where the recipe has a proposal of its own.
    """
    recipe = options.recipe
    banned = [*forbidden] if recipe.mask_token == "refuse" else [mask_id, *forbidden]
    chain: list[Transform] = [ForbidTokens(np.asarray(banned, np.int32), vocab_limit), recipe.transform]
    temperature = float(options.temperature)
    filters: list[Filter] = [] if options.top_k is None else [TopK(int(options.top_k))]
    filters += [] if options.top_p is None else [TopP(float(options.top_p), temperature)]
    filters += [] if options.min_p is None else [MinP(float(options.min_p), temperature)]
    propose: Propose = Sample(temperature, filters=tuple(filters))
    if recipe.propose != Greedy():
        propose = _own_proposal(options)
    if recipe.mask_token == "refuse":
        propose = RefuseToken(propose, mask_id)
    rules = ([] if recipe.stop_rule == Never() else [recipe.stop_rule]) + (
        [OnEos(np.asarray(eos_ids, np.int32))] if options.stop_on_eos else [])
    stop_rule: StopRule = Never() if not rules else rules[0] if len(rules) == 1 else AnyOf(tuple(rules))
    parts = Parts(strategy=recipe.strategy, cache_policy=recipe.cache_policy, transform=Chain(tuple(chain)),
                  propose=propose, smoothing=recipe.smoothing, stop_rule=stop_rule)
    return jax.tree.map(_as_array, parts)


def _own_proposal(options: CallOptions) -> Propose:
    """The recipe's proposal, which settings of the call would not reach."""
    recipe = options.recipe
    for name, unused in (("temperature", 0.0), ("top_k", None), ("top_p", None), ("min_p", None)):
        if getattr(options, name) != unused:
            raise ArgumentError(
                name, f"{getattr(options, name)!r} with a recipe that draws by {type(recipe.propose).__name__}",
                allowed=f"{unused!r} there", advice="give the number to that part, or leave the recipe's propose out")
    return recipe.propose


def _as_array(leaf: Any) -> Any:
    """Python numbers would be weakly typed: a sweep that mixes them with arrays would compile twice."""
    if isinstance(leaf, bool | int | np.integer):
        return np.int32(leaf)
    return np.float32(leaf) if isinstance(leaf, float | np.floating) else leaf


def _plain(token: Any) -> Any:
    """A scalar of NumPy's as Python's own; anything else as it is."""
    return token.item() if isinstance(token, np.ndarray | np.generic) and not token.ndim else token


def _scalar(name: str, value: Any) -> Any:
    """A number of any library as Python's own; anything else as it is."""
    host = jax.device_get(value) if isinstance(value, jax.Array) else value
    if not isinstance(host, np.ndarray | np.generic):
        return host
    if host.ndim:
        raise ArgumentError(name, shown(value), allowed="one number")
    return host.item()


def check_lengths(
    config: ModelConfig, rows: Sequence[Sequence[int]], *, max_new_tokens: Any = 0, samples: int = 1, least: int = 0,
    name: str = "prompts",
) -> int:
    """The number of new tokens as an int, if the model has the positions for them.

    From the numbers alone, before anything of that size is allocated.

    Args:
        config: of the model.
        rows: token ids, ragged.
        max_new_tokens: positions to generate behind each row.
        samples: of each row.
        least: smallest number of new tokens allowed.
        name: of the argument that the rows came in.

    Raises:
        ArgumentError: names `max_new_tokens`, `num_samples` or the rows.
    """
    longest = max((len(row) for row in rows), default=0)
    count = _scalar("max_new_tokens", max_new_tokens)
    check_integer("max_new_tokens", count, least)
    if longest + count > config.max_positions:
        raise ArgumentError(
            "max_new_tokens" if count else name, f"{count} after a prompt of {longest} tokens" if count
            else f"a row of {longest} tokens", allowed=f"{config.max_positions} positions in all",
            advice="shorten the prompt or generate less" if count else "shorten it")
    if samples * max(len(rows), 1) * max(longest + count, 1) >= 2**31:
        raise ArgumentError("num_samples", f"{samples} of {len(rows)} {name}",
                            allowed="fewer than 2**31 tokens in all", advice="sample in several calls")
    return count


def check_block_length(config: ModelConfig, block_length: Any) -> int:
    """The call's block length: None is the model's own, or 64.

    Raises:
        ArgumentError: no integer from 1 to the model's positions.
    """
    if block_length is None:
        return config.block_length or 64
    length = _scalar("block_length", block_length)
    return int(check_integer("block_length", length, 1, config.max_positions))
