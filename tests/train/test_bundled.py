"""The bundled checkpoints: what they are, that they can be rebuilt, and that they answer."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import djax
from djax import assets, recipes, tasks
from djax.engine.results import Generation
from djax.engine.tokenizer import Tokenizer
from djax.recipes import Recipe
from djax.train.bundled import recipe as build_recipe
from djax.train.bundled.__main__ import compress, sample, train_base
from djax.train.bundled.tokenizer import write_tokenizer
from djax.train.bundled.windows import Mixed, WindowSource
from djax.train.data import Sample, TaskSource
from djax.train.trajectory import concatenate

ROOT = Path(__file__).parents[2]
FILES = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
EXAMPLES = tasks.held_out_set(None, 40, seed=1)
"""Not the set that the quality benchmark reports on."""


@pytest.fixture(scope="module")
def models() -> dict[str, djax.DiffusionLM]:
    return {name: djax.load(assets.PREFIX + name, dtype="float32") for name in assets.NAMES}


@pytest.fixture(scope="module")
def answers(models: dict[str, djax.DiffusionLM]) -> Callable[[str, Recipe], tuple[Generation, float]]:
    def decode(name: str, recipe: Recipe) -> tuple[Generation, float]:
        """A generation for `EXAMPLES`, and the share of answers that are right."""
        got = models[name].generate(
            [[{"role": "user", "content": example.prompt}] for example in EXAMPLES], recipe=recipe,
            max_new_tokens=128, block_length=64)
        right = [tasks.TASKS[example.task].verify(example.prompt, text)
                 for example, text in zip(EXAMPLES, got.text or (), strict=True)]
        return got, float(np.mean(right))

    return decode


def test_files_but_the_weights_are_rebuilt(tmp_path: Path) -> None:
    build_recipe.write_config(tmp_path)
    write_tokenizer(tmp_path)
    for name in assets.NAMES:
        assert sorted(file.name for file in assets.path(name).iterdir() if file.suffix in (
            ".json", ".jinja", ".safetensors")) == FILES
        for file in tmp_path.iterdir():
            assert (assets.path(name) / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", assets.NAMES)
def test_the_layout_is_the_real_one(name: str) -> None:
    """Keys, shapes and dtypes as published for LLaDA-MoE, with the bundled config's sizes."""
    config = json.loads((assets.path(name) / "config.json").read_text())
    width, vocabulary, expert = config["hidden_size"], config["vocab_size"], config["expert_intermediate_size"]
    head = width // config["num_attention_heads"]
    expected = {"model.embed_tokens.weight": [vocabulary, width], "lm_head.weight": [vocabulary, width],
                "model.norm.weight": [width]}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        expected |= {f"{prefix}{norm}_layernorm.weight": [width] for norm in ("input", "post_attention")}
        expected |= {f"{prefix}self_attn.{letter}_proj.weight": [width, width] for letter in "qkvo"}
        expected |= {f"{prefix}self_attn.{letter}_norm.weight": [head] for letter in "qk"}
        expected[f"{prefix}mlp.gate.weight"] = [config["num_experts"], width]
        for index in range(config["num_experts"]):
            expected |= {f"{prefix}mlp.experts.{index}.{part}_proj.weight": [expert, width] for part in ("gate", "up")}
            expected[f"{prefix}mlp.experts.{index}.down_proj.weight"] = [width, expert]
    weights = assets.path(name) / "model.safetensors"
    with safe_open(weights, framework="np") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        assert {key: value.get_shape() for key, value in slices.items()} == expected
        assert {value.get_dtype() for value in slices.values()} == {"BF16"}
    assert weights.stat().st_size <= 8_000_000
    assert config["num_experts"] >= 8
    assert config["num_experts_per_tok"] == 2
    assert "auto_map" not in config


def test_the_tokenizer_agrees_with_the_config_and_splits_long_numbers() -> None:
    config = json.loads((assets.path() / "config.json").read_text())
    tokenizer = Tokenizer.load(assets.path())
    assert config["mask_token_id"] == tokenizer.mask_id
    assert config["eos_token_id"] == config["pad_token_id"] == tokenizer.eos_id
    for number in [*"0123456789", *(f"{number:02d}" for number in range(100))]:
        assert len(tokenizer.encode(number)) == 1
    assert tokenizer.encode("8071") == [tokenizer.encode(digit)[0] for digit in "8071"]
    assert tokenizer.encode(" 80 7") == [tokenizer.encode(part)[0] for part in (" ", "80", " ", "7")]
    text = "Größe 🎉\n\tx"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
@pytest.mark.parametrize("name", assets.NAMES)
def test_held_out_questions_are_answered(
    name: str, answers: Callable[[str, Recipe], tuple[Generation, float]]
) -> None:
    """The benchmark has the figures; this would notice a model that does not work or that a change broke."""
    assert answers(name, recipes.dinfer(cache=False))[1] >= 0.8


@pytest.mark.slow
def test_the_command_answers_a_held_out_question_without_network() -> None:
    example = next(example for example in EXAMPLES if example.task == "addition")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-m", "djax.cli", "generate", example.prompt], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=True)
    assert tasks.TASKS[example.task].verify(example.prompt, done.stdout), done.stdout


def test_a_name_that_is_not_bundled_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"source: got 'djax:large'; allowed djax:base"):
        djax.load("djax:large")


@pytest.mark.slow
def test_only_right_answers_become_trajectories(models: dict[str, djax.DiffusionLM]) -> None:
    found = concatenate(list(sample(models["base"], 10, seed=3)))
    assert 5 <= len(found) <= 10
    tokenizer = Tokenizer.load(assets.path())
    for tokens, is_answer, valid, steps in zip(*vars(found).values(), strict=True):
        text = tokenizer.decode(tokens[is_answer & (steps >= 0)])
        asked = tokenizer.decode(tokens[valid & ~is_answer], skip_special=False)
        prompt = asked.partition("<role>HUMAN</role>")[2].partition("<|role_end|>")[0]
        assert any(task.solve(prompt) == text for task in tasks.TASKS.values()), prompt
        assert tasks.split_of(prompt) == "train"


def test_a_window_is_what_block_decoding_meets() -> None:
    tokenizer = Tokenizer.load(assets.path())
    mask_id, eos_id = tokenizer.mask_id, tokenizer.eos_id
    assert eos_id is not None
    whole = TaskSource(tuple(tasks.TASKS), tokenizer, seed=2)
    source = WindowSource(whole, mask_id, eos_id, seed=3)
    starts, behinds = set(), set()
    for index in range(60):
        cut, full = source.sample(index), whole.sample(index)
        assert cut == source.sample(index)
        assert not cut.ends
        ended = [*full.tokens, *[eos_id] * 16]
        prompt, learned = full.is_answer.index(True), np.flatnonzero(cut.is_answer)
        start, end = learned[0], learned[-1] + 1
        assert prompt <= start
        assert learned.tolist() == list(range(start, end)), "one run"
        assert cut.tokens[:end] == ended[:end]
        assert set(cut.tokens[end:]) <= {mask_id}
        assert end - start <= 32
        assert end - start >= 8 or end > len(full.tokens)
        starts.add(start - prompt)
        behinds.add(len(cut.tokens) - end)
    assert len(starts) > 20
    assert min(behinds) < 10 < 86 < max(behinds)


def test_a_mix_keeps_both_orders() -> None:
    class Numbers:
        def __init__(self, sign: int) -> None:
            self.sign = sign

        def sample(self, index: int) -> Sample:
            return Sample([self.sign * index], [True])

    mix = Mixed(Numbers(1), Numbers(-1), period=3)
    assert [mix.sample(index).tokens[0] for index in range(9)] == [0, 1, 0, 2, 3, -1, 4, 5, -2]


@pytest.mark.slow
def test_the_build_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compression, of_stage = build_recipe.compression_config, build_recipe.stage_config

    def smaller(config: Any) -> Any:
        return dataclasses.replace(
            config, training=dataclasses.replace(config.training, batch_size=4),
            optimizer=dataclasses.replace(config.optimizer, warmup_steps=min(config.optimizer.warmup_steps, 1)))

    monkeypatch.setattr(build_recipe, "stage_config", lambda *given: smaller(of_stage(*given)))
    monkeypatch.setattr(build_recipe, "compression_config", lambda output, steps: smaller(
        compression(output, steps=steps)))
    written = train_base(tmp_path, stages=[dataclasses.replace(stage, steps=1) for stage in build_recipe.STAGES[1:]])
    assert sorted(file.name for file in written.iterdir()) == FILES
    assert djax.load(written).config.num_experts == 8

    def again() -> bytes:
        return (compress(tmp_path, prompts=6, steps=3, accept=lambda example, answer: True)
                / "model.safetensors").read_bytes()

    with pytest.raises(ValueError, match="trajectories: got none"):
        compress(tmp_path, prompts=6, steps=3)  # so short a training gets nothing right
    weights = again()
    assert weights != (written / "model.safetensors").read_bytes()
    before = (tmp_path / "trajectories.npz").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "compressed")
    assert again() == weights
    assert (tmp_path / "trajectories.npz").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_build_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, "-m", "djax.train.bundled", str(tmp_path / "file")], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
