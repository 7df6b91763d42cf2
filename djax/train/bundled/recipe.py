"""The bundled model and its training: a LLaDA-MoE of 2 million parameters, all tasks, two CPU cores."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from djax import tasks
from djax.engine.tokenizer import Tokenizer
from djax.recipes import Recipe, fast_dllm
from djax.train.bundled.tokenizer import EOS, MASK, VOCAB_SIZE, token_id
from djax.train.bundled.windows import Mixed, WindowSource
from djax.train.config import DataSection, Objective, OptimizerSection, Schedule, TrainConfig, TrainingSection
from djax.train.loss import Batch
from djax.train.run import make_batches, make_source

SEED = 20251125
HIDDEN, LAYERS, HEADS, EXPERTS, EXPERTS_PER_TOKEN, EXPERT_SIZE = 128, 4, 4, 8, 2, 128


def config_fields() -> dict[str, Any]:
    """config.json: LLaDA-MoE's fields, and the mask id, which the real file leaves to the architecture."""
    return {
        "architectures": ["LLaDAMoEModelLM"], "attention_bias": False, "attention_dropout": 0.0,
        "clip_qkv": None, "dense_intermediate_size": 2 * EXPERT_SIZE, "eos_token_id": token_id(EOS),
        "expert_intermediate_size": EXPERT_SIZE, "hidden_act": "silu", "hidden_size": HIDDEN,
        "initializer_range": 0.02, "mask_token_id": token_id(MASK), "max_position_embeddings": 8192,
        "model_type": "llada", "moe_layer_freq": [1] * LAYERS, "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax", "norm_topk_prob": None, "num_attention_heads": HEADS,
        "num_experts": EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN, "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS, "output_router_logits": False, "pad_token_id": token_id(EOS),
        "partial_rotary_factor": 1, "qk_layernorm": True, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 50000, "routed_scaling_factor": 1, "router_aux_loss_coef": 0.01,
        "router_num_group": None, "router_topk_group": None, "shared_expert_intermediate_size": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": False, "vocab_size": VOCAB_SIZE,
    }


_MUON = {"consistent_rms": 0.2, "adam_b2": 0.98}


def write_config(directory: Path) -> None:
    """config.json."""
    (directory / "config.json").write_text(
        json.dumps(config_fields(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training: its updates, and what differs from the others."""

    steps: int
    learning_rate: float
    schedule: Schedule
    longest_tail: int
    objective: Objective
    given: float = 0.0
    windows: bool = False
    """Whether every other example is cut to a window."""
    tasks: tuple[str, ...] = tuple(tasks.TASKS)
    """Taken in turn; one that is named twice is learned twice as often."""


_HARDER = (*tasks.TASKS, "expression", "sort", "expression")
"""These two take longest to learn."""

_PARALLEL = (*tasks.TASKS, "expression", "addition", "sort")
"""The tasks that lose most when many tokens are guessed at once."""

STAGES = (
    # By blocks every token of every answer is learned in each pass: what has to be copied and computed is found in
    # some hundred updates, which takes the masked objective, where few masks can be told, many thousands.
    Stage(steps=1000, learning_rate=3e-3, schedule="constant", longest_tail=8, objective="block"),
    Stage(steps=500, learning_rate=1e-3, schedule="constant", longest_tail=8, objective="block"),
    Stage(steps=2500, learning_rate=1e-3, schedule="constant", longest_tail=8, objective="block", tasks=_HARDER),
    # Then as the model is used: all of the canvas in sight, with tails as long as generation has them.
    Stage(steps=2500, learning_rate=1e-3, schedule="constant", longest_tail=224, objective="masked", given=0.5,
          windows=True, tasks=_PARALLEL),
    Stage(steps=1500, learning_rate=1e-3, schedule="linear", longest_tail=224, objective="masked", given=0.5,
          windows=True, tasks=_PARALLEL),
)
"""The training from nothing; each goes on with the weights of the one before."""


def stage_batches(stage: Stage, config: TrainConfig, tokenizer: Tokenizer, *, eos_id: int) -> Callable[[int], Batch]:
    """The batches of a stage's run."""
    source = make_source(config, tokenizer)
    if stage.windows:
        source = Mixed(source, WindowSource(source, token_id(MASK), eos_id, config.training.seed), period=2)
    return make_batches(config, source, eos_id=eos_id)


def stage_config(stage: Stage, number: int, output: Path) -> TrainConfig:
    """The run of a stage, the first of which is number 1."""
    return TrainConfig(
        data=DataSection(tasks=stage.tasks, row_length=160 + stage.longest_tail, longest_tail=stage.longest_tail,
                         group=16, given=stage.given),
        optimizer=OptimizerSection(
            name="muon", learning_rate=stage.learning_rate, schedule=stage.schedule,
            warmup_steps=100 if number == 1 else 0, weight_decay=0.01, options=dict(_MUON)),
        training=TrainingSection(
            output=str(output / str(number)), steps=stage.steps, batch_size=64, objective=stage.objective,
            seed=SEED + number - 1, log_every=50, save_every=250, compute_dtype="float32"))


ANSWER_LENGTH, BLOCK_LENGTH = 128, 64
"""Open positions and block of the trajectories: those that the model is measured with."""
TRAJECTORIES = 8000
"""Prompts decoded for compression; those answered right are kept."""


def sampling_recipe() -> Recipe:
    """The decoder of the trajectories: without a cache, so that each step saw the state that is trained on."""
    return fast_dllm(threshold=0.9, cache="none")


def compression_config(output: Path, *, steps: int = 300) -> TrainConfig:
    """The fine-tuning on trajectories. The data section is not read: the batches are trajectories."""
    return TrainConfig(
        data=DataSection(tasks=tuple(tasks.TASKS)),
        optimizer=OptimizerSection(
            name="muon", learning_rate=3e-4, schedule="linear", warmup_steps=50,
            weight_decay=0.01, options=dict(_MUON)),
        training=TrainingSection(
            output=str(output), steps=steps, batch_size=64, seed=SEED - 1, log_every=50, save_every=400,
            compute_dtype="float32"))
