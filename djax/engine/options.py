"""One call's sampling: checked, and turned into the loop's parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np

from djax import recipes
from djax.contracts import answers
from djax.contracts.canvas import Canvas
from djax.contracts.types import Filter, Propose, StopRule
from djax.errors import ArgumentError, check_choice, check_flag, check_integer, check_number, shown
from djax.loop.state import Parts
from djax.models.config import DTYPES, ModelConfig
from djax.parts.proposals import LARGEST_TEMPERATURE, Greedy, RefuseToken, Sample
from djax.parts.stopping import AnyOf, Never, OnEos
from djax.parts.transforms import Chain, ForbidTokens, MinP, TopK, TopP


class SamplingKwargs(TypedDict, total=False):
    """The fields of `Sampling` as keywords of a call; one that is left out has the call's default."""

    recipe: Parts | None
    block_length: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    guidance: float | None
    mask_id: int | None
    eos_id: int | Sequence[int] | None
    stop_on_eos: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a call decodes, draws and stops: `lm.generate(prompts, sampling=Sampling(...))`, or its fields as keywords.

    `generate`, `stream`, `infill`, `warmup`, `djax.rl.rollout` and `rollout_infill` take it. None leaves a field to the
    call. A record is taken whole: its temperature is 0 in a rollout, too, unless it says another.

    Raises:
        ArgumentError: a field outside its range.
    """

    recipe: Parts | None = None
    """Which decoder, from `djax.recipes` or a `djax.Parts` of your own; None is `recipes.default_for(config)`:
    `dinfer()`, or `llada2()` for a model with blocks. In rollouts None is `djax.rollouts.rollout.EXACT`, threshold
    decoding at 0.9 without a cache."""
    block_length: int | None = None
    """Positions decoded together; None is the length of the model's own blocks, or 64."""
    temperature: float = 0.0
    """0 is greedy; otherwise tokens are drawn from softmax(logits / temperature). Rollouts that are given no record
    draw at 1."""
    top_k: int | None = None
    """Draw from the k most probable tokens only."""
    top_p: float | None = None
    """Draw from the smallest set of tokens with this mass only. In rollouts 1 is no filter."""
    min_p: float | None = None
    """Draw from tokens at least this probable relative to the best only. In rollouts 0 is no filter."""
    guidance: float | None = None
    """Scale of classifier-free guidance (two forwards per step); None is off."""
    mask_id: int | None = None
    """Overrides the model's mask id."""
    eos_id: int | Sequence[int] | None = None
    """Overrides the model's EOS id; several end a sequence alike."""
    stop_on_eos: bool | None = None
    """End a row with the block that holds its first EOS; completions are trimmed there either way. Where tokens are
    filled in between others (`infill`, `rollout_infill`) None is False: then no EOS is generated. Elsewhere it is
    True."""

    def __post_init__(self) -> None:
        if self.recipe is not None and not isinstance(self.recipe, Parts):
            raise ArgumentError("recipe", f"a {type(self.recipe).__name__}", allowed="djax.Parts",
                                advice="such as djax.recipes.dinfer()")
        for name in ("block_length", "temperature", "top_k", "top_p", "min_p", "guidance", "mask_id", "stop_on_eos"):
            object.__setattr__(self, name, _scalar(name, getattr(self, name)))
        check_integer("block_length", self.block_length, 1, optional=True)
        # above, noise times temperature could overflow; below float32's smallest normal number, 0 is meant
        check_number("temperature", self.temperature, 0.0, LARGEST_TEMPERATURE)
        check_integer("top_k", self.top_k, 1, optional=True)
        check_number("top_p", self.top_p, 0.0, 1.0, above=True, optional=True)
        check_number("min_p", self.min_p, 0.0, 1.0, optional=True)
        check_number("guidance", self.guidance, -1.0, optional=True)
        check_integer("mask_id", self.mask_id, optional=True)
        if self.eos_id is not None:
            object.__setattr__(self, "eos_id", _plain_ids("eos_id", self.eos_id))
        check_flag("stop_on_eos", self.stop_on_eos, optional=True)

    @classmethod
    def of(cls, call: str, record: Sampling | None, given: Mapping[str, Any], **defaults: Any) -> Sampling:
        """The record of a call, or one made of its keywords with the call's defaults for those that were left out.

        Raises:
            TypeError: an unknown keyword.
            ArgumentError: both, or a value outside its range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise TypeError(f"{call}() got an unexpected keyword argument {name!r}; besides its own it takes those "
                                f"of djax.Sampling: {', '.join(known)}")
        if record is None:
            return cls(**{**defaults, **given})
        if not isinstance(record, Sampling):
            raise ArgumentError("sampling", shown(record), allowed="a djax.Sampling")
        for name in given:
            raise ArgumentError("sampling", f"a record and {name}=, which it holds", allowed="one of them",
                                advice=f"dataclasses.replace(sampling, {name}=...) makes another record")
        return record


@dataclasses.dataclass(frozen=True)
class Call:
    """A `Sampling` resolved for a model."""

    config: ModelConfig
    parts: Parts
    """The loop's. Every number is an array, so that a sweep compiles nothing."""
    guidance: float | None
    block_length: int
    mask_id: int
    eos_ids: tuple[int, ...]
    """At which completions are trimmed; none where no EOS is generated."""

    def canvas(self, rows: Sequence[Sequence[int]], *, max_new_tokens: int, align: bool = False) -> Canvas:
        """Prompts with room behind them. A model with blocks keeps to their boundaries and decodes the last whole."""
        blocks = self.config.block_length is not None
        return Canvas.from_prompts(
            rows, max_new_tokens=max_new_tokens, block_length=self.block_length, mask_id=self.mask_id,
            pad_id=self.config.pad_id, align=check_flag("align", align, optional=True) or blocks, whole_blocks=blocks)

    def canvas_with_gaps(self, rows: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]]) -> Canvas:
        """Rows in which some positions are to be filled in."""
        return Canvas.from_tokens(
            rows, masks, block_length=self.block_length, mask_id=self.mask_id, pad_id=self.config.pad_id,
            align=self.config.block_length is not None)


def resolve(sampling: Sampling, config: ModelConfig, *, vocab_limit: int, gaps: bool = False) -> Call:
    """Resolve a `Sampling` for a model: the parts and ids that one call decodes with.

    The mask id (unless the recipe refuses it instead) and the vocabulary's padding are dropped before anything else
    sees the logits; so are EOS ids where they do not stop a row that has tokens behind its gaps.

    Args:
        sampling: of the call.
        config: of the model.
        vocab_limit: ids from here on are padding.
        gaps: tokens are filled in between others.

    Raises:
        ArgumentError: a block length or cache policy that is not for this model, an id that is unknown or outside the
            vocabulary, or a setting of the draw where the recipe has a proposal of its own.
    """
    block_length = check_block_length(config, sampling.block_length)
    recipe = recipes.default_for(config, gaps=gaps) if sampling.recipe is None else sampling.recipe
    answers.check_model(recipe.cache_policy, architecture=config.architecture, model_block_length=config.block_length,
                        block_length=block_length, gaps=gaps)
    mask_id, eos_ids = resolve_ids(sampling, config)
    stop = not gaps if sampling.stop_on_eos is None else sampling.stop_on_eos
    without_eos = gaps and not stop
    banned = ([] if recipe.mask_token == "refuse" else [mask_id]) + [*(eos_ids if without_eos else ())]
    rules = ([] if recipe.stop_rule == Never() else [recipe.stop_rule]) + (
        [OnEos(np.asarray(eos_ids, np.int32))] if stop else [])
    stop_rule: StopRule = Never() if not rules else rules[0] if len(rules) == 1 else AnyOf(tuple(rules))
    parts = Parts(
        strategy=recipe.strategy, cache_policy=recipe.cache_policy, smoothing=recipe.smoothing, stop_rule=stop_rule,
        transform=Chain((ForbidTokens(np.asarray(banned, np.int32), vocab_limit), recipe.transform)),
        propose=_proposal(sampling, recipe, mask_id))
    return Call(config=config, parts=jax.tree.map(_as_array, parts), guidance=sampling.guidance,
                block_length=block_length, mask_id=mask_id, eos_ids=() if without_eos else eos_ids)


def resolve_ids(sampling: Sampling, config: ModelConfig) -> tuple[int, tuple[int, ...]]:
    """The mask id and the EOS ids of a call.

    Raises:
        ArgumentError: no mask id is known, or an id is outside the vocabulary.
    """
    mask_id = _scalar("mask_id", config.mask_id if sampling.mask_id is None else sampling.mask_id)
    if mask_id is None:
        raise ArgumentError("mask_id", "none, neither from the checkpoint nor from its tokenizer", allowed="a token id",
                            advice="give it")
    given: Any = (config.eos_id, *config.other_eos_ids) if sampling.eos_id is None else sampling.eos_id
    eos_ids = tuple(_scalar("eos_id", token) for token in (given if isinstance(given, tuple) else (given,)))
    for name, token in [("mask_id", mask_id), *(("eos_id", token) for token in eos_ids)]:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < config.vocab_size:
            raise ArgumentError(name, shown(token), allowed=f"0 to {config.vocab_size - 1}, the model's vocabulary")
    if mask_id in eos_ids:
        raise ArgumentError("eos_id", f"{mask_id}, which is the mask id", allowed="another token",
                            advice="the mask is never generated, so nothing would stop there")
    return mask_id, eos_ids


def _proposal(sampling: Sampling, recipe: Parts, mask_id: int) -> Propose:
    """The draw by temperature and filters, or the recipe's own, which they would not reach."""
    propose = recipe.propose
    if propose == Greedy():
        heat, top_k, top_p, min_p = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        filters: list[Filter] = [] if top_k is None else [TopK(top_k)]
        filters += [] if top_p is None else [TopP(float(top_p), float(heat))]
        filters += [] if min_p is None else [MinP(float(min_p), float(heat))]
        propose = Sample(float(heat), filters=tuple(filters))
    else:
        for name, unused in (("temperature", 0.0), ("top_k", None), ("top_p", None), ("min_p", None)):
            if getattr(sampling, name) != unused:
                raise ArgumentError(
                    name, f"{getattr(sampling, name)!r} with a recipe that draws by {type(propose).__name__}",
                    allowed=f"{unused!r} there",
                    advice="give the number to that part, or leave the recipe's propose out")
    return RefuseToken(propose, mask_id) if recipe.mask_token == "refuse" else propose


def _as_array(leaf: Any) -> Any:
    """Python numbers would be weakly typed: a sweep that mixes them with arrays would compile twice."""
    if isinstance(leaf, bool | int | np.integer):
        return np.int32(leaf)
    return np.float32(leaf) if isinstance(leaf, float | np.floating) else leaf


def _plain_ids(name: str, value: Any) -> int | tuple[int, ...]:
    """One token id or several, of any library, as Python's own."""
    host = jax.device_get(value)
    host = host.tolist() if isinstance(host, np.ndarray | np.generic) else host
    if isinstance(host, str | bytes) or not isinstance(host, Sequence):
        return int(check_integer(name, host, advice="or give several"))
    if not host:
        raise ArgumentError(name, "an empty list", allowed="at least one id", advice="or stop_on_eos=False")
    return tuple(int(check_integer(name, _scalar(name, token))) for token in host)


def _scalar(name: str, value: Any) -> Any:
    """A number of any library as Python's own; anything else as it is."""
    host = jax.device_get(value) if isinstance(value, jax.Array) else value
    if isinstance(host, list | tuple) or (isinstance(host, np.ndarray) and host.ndim):
        raise ArgumentError(name, shown(value), allowed="one number")
    return host.item() if isinstance(host, np.ndarray | np.generic) else host


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


def check_warmup(config: ModelConfig, shapes: Any) -> list[tuple[int, int, int]]:
    """The (batch, prompt length, max_new_tokens) of each call that is to come.

    Raises:
        ArgumentError: something else, or lengths beyond the model's positions.
    """
    advice = "each is (batch, prompt length, max_new_tokens)"
    try:
        triples = [(_scalar("shapes", batch), _scalar("shapes", length), _scalar("shapes", count))
                   for batch, length, count in shapes]
    except (TypeError, ValueError):
        raise ArgumentError("shapes", shown(shapes), allowed="a list of three integers each", advice=advice) from None
    for batch, length, count in triples:
        check_integer("shapes", batch, 1, advice=advice)
        check_integer("shapes", length, 0, config.max_positions, advice=advice)
        check_integer("shapes", count, 1, config.max_positions - length, advice=advice)
    return triples


def check_block_length(config: ModelConfig, block_length: Any) -> int:
    """The call's block length: None is the model's own, or 64.

    Raises:
        ArgumentError: no integer from 1 to the model's positions.
    """
    if block_length is None:
        return config.block_length or 64
    length = _scalar("block_length", block_length)
    return int(check_integer("block_length", length, 1, config.max_positions))


def dtype_name(dtype: Any) -> str | None:
    """The name of a dtype of NumPy's or JAX's, or given by name."""
    if dtype is None:
        return None
    if not isinstance(dtype, str):
        try:
            dtype = np.dtype(dtype).name
        except TypeError:
            raise ArgumentError("dtype", shown(dtype), allowed=", ".join(DTYPES)) from None
    return str(check_choice("dtype", dtype, DTYPES))
