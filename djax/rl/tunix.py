"""google-tunix (0.1.7) on djax: rollouts, the causal view, and GRPO on what the sampler did. Needs the extra `rl`.

    policy = djax.rl.policy.diffusion_policy(lm, completion_length=64)      # the module that Tunix trains
    engine = functools.partial(DiffusionRollout, lm=lm, recipe=recipe)      # ClusterConfig(rollout_engine=engine)
    cluster = RLCluster(actor=policy, tokenizer=adapter(lm), cluster_config=...)
    GRPOLearner(cluster, GRPOConfig(...), reward_fns)                       # unmodified: diffu-GRPO, prompts unmasked
    TraceGRPOLearner(cluster, TraceGRPOConfig(...), reward_fns)             # trace-exact GRPO

Tunix tells padding from tokens by `ids != pad_id`, which drops the EOS of every answer where both are one id: here
padding is `djax.rl.policy.PAD_ID`, which is no token. It scores left to right: see `djax.rl.policy.DiffusionPolicy`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from tunix.rl import common, function_registry
from tunix.rl import rl_cluster as cluster_lib
from tunix.rl import utils as tunix_utils
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from djax.contracts.keys import as_key
from djax.contracts.types import Forbidden, Params
from djax.engine.tokenizer import Tokenizer
from djax.errors import check_choice
from djax.models import build
from djax.recipes import Recipe
from djax.rl.advantages import group_advantages
from djax.rl.losses import trace_grpo_loss
from djax.rl.policy import PAD_ID, DiffusionPolicy, as_policy
from djax.rollouts.masked_states import trace_states
from djax.rollouts.rollout import rollout
from djax.rollouts.score import score
from djax.rollouts.types import PER_ROW, MaskedStates, Rollout

if TYPE_CHECKING:
    from djax.api import DiffusionLM

TRACE_LOSS = "diffusion_trace"
"""Name of `trace_policy_loss` in Tunix's registry."""

GROUP_ADVANTAGES = "diffusion_group"
"""Name of `djax.rl.advantages.group_advantages` in Tunix's registry."""


class TokenizerAdapter:
    """The few methods of a tokenizer that Tunix calls, with a padding id that is no token."""

    def __init__(self, tokenizer: Tokenizer, *, eos_id: int) -> None:
        self._tokenizer, self._eos_id = tokenizer, eos_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(ids)

    def bos_id(self) -> int:
        """There is none: padding."""
        return PAD_ID

    def eos_id(self) -> int:
        """Token that ends an answer."""
        return self._eos_id

    def pad_id(self) -> int:
        """`PAD_ID`."""
        return PAD_ID


def adapter(lm: DiffusionLM) -> TokenizerAdapter:
    """A model's tokenizer for `RLCluster(tokenizer=...)`.

    Raises:
        ValueError: the model has none.
    """
    return TokenizerAdapter(_tokenizer(lm), eos_id=lm.config.eos_id)


def _tokenizer(lm: DiffusionLM) -> Tokenizer:
    if lm.tokenizer is None:
        raise ValueError("lm: got a model without a tokenizer; allowed one that has it: Tunix's prompts are texts")
    return lm.tokenizer


class DiffusionRollout(base_rollout.BaseRollout):
    """djax as Tunix's rollout engine: `ClusterConfig(rollout_engine=functools.partial(DiffusionRollout, lm=lm))`.

    Tunix gives the same seed at every step: here each call of `generate` draws from a key of its own. It never reads an
    ambient mesh, so it runs in Tunix's worker thread, which has none. Where trainer and rollout share a mesh they share
    the weights, and Tunix then calls no `update_params`: the trainer's present weights are taken at every call.
    """

    def __init__(
        self,
        *,
        rollout_actor: DiffusionPolicy,
        tokenizer: Any,
        mesh: Mesh,
        rollout_config: base_rollout.RolloutConfig,
        lm: DiffusionLM,
        recipe: Recipe | None = None,
        block_length: int = 64,
        micro_batch: int | None = None,
    ) -> None:
        """The first four are Tunix's, the others yours.

        Args:
            rollout_actor: the policy, on the trainer's mesh.
            tokenizer: not read; the model has its own.
            mesh: of the rollouts.
            rollout_config: for training.
            lm: a model on the devices of `mesh`; it gets the actor's weights.
            recipe: how it decodes, as in `djax.rl.rollout`.
            block_length: positions decoded together.
            micro_batch: rows decoded at a time.

        Raises:
            ValueError: the actor is no `DiffusionPolicy` or has LoRA parameters, `lm` has no tokenizer or is on other
                devices than `mesh`, or the policy has another completion length than the rollouts.
        """
        if not isinstance(rollout_actor, DiffusionPolicy):
            raise ValueError(f"rollout_actor: got a {type(rollout_actor).__name__}; allowed a DiffusionPolicy "
                             "(djax.rl.policy.diffusion_policy)")
        if jax.tree.leaves(nnx.state(rollout_actor, nnx.LoRAParam)):
            raise ValueError("rollout_actor: got one with LoRA parameters; allowed one without: the rollout model has "
                             "no place for them; train all weights")
        devices = {device for leaf in jax.tree.leaves(lm.params) for device in leaf.devices()}
        if devices != set(mesh.devices.flat):
            raise ValueError(
                f"lm: got a model on {sorted(map(str, devices))}; the rollout mesh has "
                f"{sorted(map(str, mesh.devices.flat))}; load it with mesh= the cluster's Role.ROLLOUT mesh")
        self._tokenizer = _tokenizer(lm)
        self._lm, self._recipe, self._block_length, self._micro_batch = lm, recipe, block_length, micro_batch
        self._actor, self._config = rollout_actor, rollout_config
        self._check_length(rollout_config)
        self._shares = tunix_utils.get_pytree_mesh_info(nnx.state(rollout_actor)) == mesh
        self._calls, self._lock, self._recorded = 0, threading.Lock(), threading.local()
        self.update_params(nnx.state(rollout_actor, nnx.Param))  # Tunix syncs after the first step, not before it

    def generate(
        self, prompts: Sequence[str], rollout_config: base_rollout.RolloutConfig, **_: Any
    ) -> base_rollout.RolloutOutput:
        """One completion of every prompt (Tunix repeats them itself), at the temperature and filters of the config.

        Raises:
            ValueError: a prompt is longer than `max_prompt_length`, or an option is out of range.
        """
        config, tokenizer = rollout_config, self._tokenizer
        self._check_length(config)
        # Tunix hands over texts that went through a chat template already
        ids = [tokenizer.encode(str(prompt), allow_special_tokens=True) for prompt in prompts]
        padded = _left_padded(ids, config.max_prompt_length)
        self.refresh()
        with self._lock:
            call, self._calls = self._calls, self._calls + 1
        # a seed of Tunix's is nothing, a number, or a key of either kind
        key = jax.random.fold_in(as_key(0 if config.seed is None else config.seed, name="seed"), call)
        eos = list(config.eos_tokens) if config.eos_tokens else self._lm.config.eos_id
        got = rollout(
            self._lm, ids, key=key, recipe=self._recipe, max_new_tokens=config.max_tokens_to_generate,
            block_length=self._block_length, temperature=config.temperature,
            top_k=None if config.top_k in (None, -1) else config.top_k, top_p=config.top_p, eos_id=eos,
            micro_batch=self._micro_batch)
        if hasattr(self._recorded, "rollouts"):
            self._recorded.rollouts.append(got)
        completions = got.completions()
        counted = np.asarray(got.is_completion)
        ends = np.atleast_1d(eos)
        return base_rollout.RolloutOutput(
            text=[tokenizer.decode(row[~np.isin(row, ends)]) for row in completions], logits=cast(Any, None),
            tokens=completions, left_padded_prompt_tokens=padded,
            logprobs=[row[here] for row, here in zip(np.asarray(got.log_prob), counted, strict=True)])

    @contextlib.contextmanager
    def record(self) -> Iterator[list[Rollout]]:
        """Every rollout that this thread samples inside, in order: Tunix hands on only part of an engine's output."""
        self._recorded.rollouts = found = list[Rollout]()
        try:
            yield found
        finally:
            del self._recorded.rollouts

    def get_per_token_logps(
        self, prompt_tokens: Int[Array, "B P"], completion_tokens: Int[Array, "B C"]
    ) -> Float[Array, "B C"]:
        """Log-probs of the sampling policy as `DiffusionPolicy` estimates them, at the temperature of the rollouts."""
        graphdef, state = nnx.split(self.model())
        return common.compute_per_token_logps(
            graphdef, state, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, pad_id=self.pad_id(),
            eos_id=self.eos_id(), stop_gradient=True, return_logits=False, temperature=self._config.temperature)

    def update_params(self, params: Params, filter_types: tuple[Any, ...] | None = None) -> None:
        """New weights, resharded and cast to those of the rollout model; compiles nothing.

        Raises:
            ValueError: another tree or shape, whose leaf is named, or LoRA parameters. Nothing has changed then.
        """
        if filter_types and nnx.LoRAParam in filter_types:
            raise ValueError("filter_types: got LoRAParam; allowed Param: the rollout model has no place for LoRA "
                             "parameters; train all weights")
        self._lm.update_params(params.get("model", params))

    def refresh(self) -> None:
        """Take the trainer's present weights, if they are shared; else Tunix's sync has done it."""
        if self._shares:
            self.update_params(nnx.state(self._actor, nnx.Param))

    def pad_id(self) -> int:
        """`PAD_ID`: Tunix masks `ids != pad_id`."""
        return PAD_ID

    def eos_id(self) -> int:
        """Token that ends an answer."""
        return self._lm.config.eos_id

    def model(self) -> DiffusionPolicy:
        """The trainer's policy where weights are shared; else a module with the rollout's own.

        Tunix syncs weights only if they differ from the trainer's, leaf by leaf.
        """
        if self._shares:
            return self._actor
        graphdef, state = nnx.split(build(self._lm.config, kernels=self._actor.model.kernels))
        state = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(self._lm.params))
        return as_policy(self._lm, nnx.merge(graphdef, state), self._actor.completion_length)

    def _check_length(self, config: base_rollout.RolloutConfig) -> None:
        if config.max_tokens_to_generate != self._actor.completion_length:
            raise ValueError(f"max_tokens_to_generate: got {config.max_tokens_to_generate}; the policy was made with "
                             f"completion_length={self._actor.completion_length}; make them equal")


@dataclasses.dataclass(kw_only=True)
class TraceGRPOConfig(grpo_learner.GRPOConfig):
    """Tunix's GRPO configuration with what trace-exact GRPO adds."""

    policy_loss_fn: str = TRACE_LOSS
    advantage_estimator: str = GROUP_ADVANTAGES
    shrink: int = 1
    """Steps of the sampler taken together (TraceRL's shrinkage); above 1 scores are not those of the sampler."""
    num_states: int | None = None
    """Bound on the steps of a row, so that all batches have one shape; None is a size above the longest row's."""
    exact: bool = True
    """Refuse rollouts that cannot be replayed; False takes the order of their commits, and scores what sampled anew."""
    weigh: str = "token"
    """Unit of equal weight in a row: each "token", or each "step" of the sampler."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("weigh", self.weigh, ("token", "step"))


@dataclasses.dataclass(frozen=True)
class _Constants:
    """Facts that all rows of a rollout share: static, because Tunix cuts every array of an example by rows."""

    mask_id: int
    temperature: float
    forbidden_ids: tuple[int, ...]
    vocab_limit: int
    first_block: int
    block_length: int
    max_steps: int


@flax.struct.dataclass
class TraceExample(common.TrainExample):
    """Tunix's example, with rollouts and the states at which they are scored. The first axis of every array is rows."""

    rows: dict[str, Any] | None = None
    """Fields of a `Rollout`."""
    masks: Bool[Array, "B n T"] | None = None
    weights: Float[Array, "B n T"] | None = None
    constants: _Constants | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def of(
        cls, rollout: Rollout, states: MaskedStates, *, advantages: Float[np.ndarray, " B"], old: Array | None,
        reference: Array | None,
    ) -> TraceExample:
        """The example of some rollouts. `old` and `reference` are log-probs at the same states, [B, T]."""
        got = jax.device_get(rollout)
        constants = _Constants(
            mask_id=int(got.mask_id), temperature=float(got.temperature),
            forbidden_ids=tuple(np.asarray(got.forbidden.ids).tolist()), vocab_limit=int(got.forbidden.limit),
            first_block=got.first_block, block_length=got.block_length, max_steps=got.max_steps)
        tokens, first = got.tokens, got.first_block
        return cls(
            prompt_ids=jnp.asarray(np.where(got.valid, tokens, PAD_ID)[:, :first]),
            prompt_mask=jnp.asarray(got.valid[:, :first]), completion_ids=jnp.asarray(tokens[:, first:]),
            completion_mask=jnp.asarray(got.is_completion)[:, first:], advantages=jnp.asarray(advantages),
            ref_per_token_logps=reference, old_per_token_logps=old,
            rows={name: jnp.asarray(getattr(got, name)) for name in PER_ROW}, masks=states.masks,
            weights=states.weights, constants=constants)

    def unpack(self) -> tuple[Rollout, MaskedStates]:
        """The rollouts and their states again."""
        if self.rows is None or self.masks is None or self.weights is None or self.constants is None:
            raise ValueError("train_example: got one without rollouts; allowed those of TraceGRPOLearner")
        shared = self.constants
        return Rollout(
            **self.rows, mask_id=jnp.int32(shared.mask_id), temperature=jnp.float32(shared.temperature),
            forbidden=Forbidden(ids=jnp.asarray(shared.forbidden_ids, jnp.int32), limit=jnp.int32(shared.vocab_limit)),
            first_block=shared.first_block, block_length=shared.block_length, max_steps=shared.max_steps,
        ), MaskedStates(masks=self.masks, weights=self.weights)


class TraceGRPOLearner(grpo_learner.GRPOLearner):
    """GRPO on what the sampler did (TraceRL, arXiv 2509.06949), with Tunix's loop around it.

    Overrides how a batch is made: rollouts are kept whole (untrimmed canvas, commit steps), old log-probs are the
    sampler's own, and those of the reference are taken at the same masked states.
    """

    _full_batch_size: int | None = None  # prompts of a step; unknown outside of `train`

    def train(
        self, train_ds: Iterable[dict[str, Any]], eval_ds: Iterable[dict[str, Any]] | None = None,
        skip_jit: bool = False,
    ) -> None:
        """Tunix's loop over batches; the size of the first is that of all."""
        batches = iter(train_ds)
        first = next(batches)
        self._full_batch_size = len(first["prompts"])
        super().train(itertools.chain([first], batches), eval_ds, skip_jit)

    def _generate_and_compute_advantage(
        self, training_input: dict[str, Any], mode: cluster_lib.Mode = cluster_lib.Mode.TRAIN
    ) -> TraceExample:
        """Rollouts, rewards and advantages of the prompts, which Tunix has repeated already."""
        config, cluster = self.algo_config, self.rl_cluster
        prompts = list(training_input["prompts"])
        others = {name: values for name, values in training_input.items() if name != "prompts"}
        with cluster.rollout.record() as rollouts:
            output = cluster.generate(
                prompts=prompts, mode=mode, micro_batch_size=self._rollout_micro_batch_size * config.num_generations)
        joined = _joined(rollouts, first_block=cluster.get_rollout_config(mode).max_prompt_length)
        states = trace_states(joined, shrink=config.shrink, num_states=config.num_states, exact=config.exact)
        rewards = self._compute_rewards(prompts=prompts, completions=output.text, mode=mode, **others)
        advantages = np.asarray(function_registry.get_advantage_estimator(config.advantage_estimator)(
            rewards=rewards, num_generations=config.num_generations))
        self._report(prompts, output.text, joined, rewards, advantages, others, mode)
        reference = _scored(cluster.inference_worker.get_model("reference"), joined, states) if config.beta else None
        return TraceExample.of(
            joined, states, advantages=advantages, old=self._old(joined, states), reference=reference)

    def _old(self, rollouts: Rollout, states: MaskedStates) -> Float[Array, "B T"] | None:
        """Log-probs of the policy that sampled, at these states."""
        if rollouts.replayable and self.algo_config.shrink == 1:
            return jnp.asarray(rollouts.log_prob)
        mini = self.rl_cluster.cluster_config.training_config.mini_batch_size
        if self.algo_config.num_iterations == 1 and mini in (None, self._full_batch_size):
            return None  # one update a sync: what sampled is what is trained, and its ratio to itself is 1
        return _scored(self.rl_cluster.rollout.model(), rollouts, states)

    def _report(
        self, prompts: list[str], texts: list[str], rollouts: Rollout, rewards: Any, advantages: Any,
        others: dict[str, Any], mode: cluster_lib.Mode,
    ) -> None:
        finite = np.asarray(rewards, np.float32)
        finite = finite[np.isfinite(finite)] if np.isfinite(finite).any() else np.zeros(1, np.float32)
        lengths = np.asarray(rollouts.lengths)
        metrics: dict[str, Any] = {
            "rewards/score/mean": (finite.mean(), np.mean), "rewards/score/max": (finite.max(), np.max),
            "rewards/score/min": (finite.min(), np.min), "completions/mean_length": (lengths.mean(), np.mean),
            "completions/max_length": (lengths.max(), np.max), "completions/min_length": (lengths.min(), np.min),
            "completions/forwards": (np.asarray(rollouts.nfe).mean(), np.mean)}
        for function in self.metric_fns:
            metrics |= function(prompts=prompts, completions=texts, advantages=advantages, rewards=rewards, **others)
        self.rl_cluster.buffer_metrics(metrics, mode=mode)


@function_registry.register_policy_loss_fn(TRACE_LOSS)
def trace_policy_loss(
    model: DiffusionPolicy, train_example: TraceExample, algo_config: TraceGRPOConfig, pad_id: int, eos_id: int,
    **_: Any,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`trace_grpo_loss` as Tunix calls a policy loss; `kl` and `pg_clipfrac` are what its trainer logs, always."""
    rollouts, states = train_example.unpack()
    graphdef, params = nnx.split(model.model)
    high = getattr(algo_config, "epsilon_high", None)
    loss, report = trace_grpo_loss(
        score(graphdef, params, rollouts, states), jnp.asarray(train_example.advantages, jnp.float32),
        mask=rollouts.is_completion, commit_step=rollouts.commit_step if algo_config.weigh == "step" else None,
        shrink=algo_config.shrink, old=train_example.old_per_token_logps, reference=train_example.ref_per_token_logps,
        beta=algo_config.beta, clip_low=algo_config.epsilon,
        clip_high=algo_config.epsilon if high is None else high)
    return loss, {"kl": report.kl, "pg_clipfrac": report.clip_fraction, "is_ratio/mean": report.ratio,
                  "pg_loss": -report.objective}


@function_registry.register_advantage_estimator(GROUP_ADVANTAGES)
def grouped_advantages(rewards: Float[np.ndarray, " B"], num_generations: int) -> Float[np.ndarray, " B"]:
    """`group_advantages` as Tunix calls an estimator: rewards that are not finite say nothing, and spoil nothing."""
    return np.asarray(group_advantages(jnp.asarray(rewards, jnp.float32), num_generations))


_score_jit = jax.jit(score)


def _scored(policy: DiffusionPolicy, rollouts: Rollout, states: MaskedStates) -> Float[Array, "B T"]:
    """Log-probs at given states, wherever the policy is."""
    graphdef, params = nnx.split(policy.model)
    return jnp.asarray(jax.device_get(_score_jit(graphdef, params, rollouts, states)))


def _left_padded(prompts: Sequence[Sequence[int]], width: int) -> Int[np.ndarray, "B P"]:
    """Prompts as Tunix wants them: all of one width, `PAD_ID` before them."""
    longest = max(map(len, prompts))
    if longest > width:
        raise ValueError(f"max_prompt_length: got {width}; a prompt has {longest} tokens; raise it or shorten that")
    return np.asarray([[PAD_ID] * (width - len(prompt)) + list(prompt) for prompt in prompts], np.int32)


def _joined(rollouts: Sequence[Rollout], *, first_block: int) -> Rollout:
    """Rollouts as one, with prompts in the first `first_block` columns, so that all batches have one shape."""
    moved = [_widened(part, first_block) for part in rollouts]
    rows: dict[str, Any] = {
        name: np.concatenate([np.asarray(getattr(part, name)) for part in moved]) for name in PER_ROW}
    # each part counted its own from 0, and rows that share an identity would be masked alike
    rows["row_ids"] = np.arange(len(rows["row_ids"]), dtype=np.int32)
    return dataclasses.replace(moved[0], **rows)


def _widened(part: Rollout, first_block: int) -> Rollout:
    """A rollout with more or less padding before its prompts; nobody attends to it."""
    fill = {"commit_step": -1}
    more = first_block - part.first_block
    if more < 0 and np.asarray(part.valid)[:, :-more].any():
        raise ValueError(f"max_prompt_length: got {first_block}; a prompt is longer; raise it or shorten the prompt")
    rows: dict[str, Any] = {}
    for name in PER_ROW:
        values = np.asarray(getattr(part, name))
        if values.ndim == 2:
            values = np.pad(values, ((0, 0), (max(more, 0), 0)), constant_values=fill.get(name, 0))[:, max(-more, 0):]
        rows[name] = values
    return dataclasses.replace(part, **rows, first_block=first_block)
