"""The build of the bundled model: its tokenizer, what it is trained on, and that a build goes on where it stopped."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import djax
from djax.text import Tokenizer
from djax.train import tasks
from djax.train.bundled import recipe as build_recipe
from djax.train.bundled.__main__ import compress, train_base
from djax.train.bundled.drills import DrillSource, Mixed, WindowSource
from djax.train.bundled.tokenizer import write_tokenizer
from djax.train.data import Sample, TaskSource

ROOT = Path(__file__).parents[2]
FILES = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files but the weights."""
    directory = tmp_path_factory.mktemp("text")
    build_recipe.write_config(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(text: Path) -> Tokenizer:
    return Tokenizer.load(text)


def test_the_tokenizer_agrees_with_the_config_and_splits_long_numbers(text: Path, tokenizer: Tokenizer) -> None:
    config = json.loads((text / "config.json").read_text())
    assert config["mask_token_id"] == tokenizer.mask_id
    assert config["eos_token_id"] == config["pad_token_id"] == tokenizer.eos_id
    for number in [*"0123456789", *(f"{number:02d}" for number in range(100))]:
        assert len(tokenizer.encode(number)) == 1
    assert tokenizer.encode("8071") == [tokenizer.encode(digit)[0] for digit in "8071"]
    assert tokenizer.encode(" 80 7") == [tokenizer.encode(part)[0] for part in (" ", "80", " ", "7")]
    sample = "Größe 🎉\n\tx"
    assert tokenizer.decode(tokenizer.encode(sample)) == sample


def test_a_name_that_is_not_bundled_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"source: got 'djax:large'; bundled are djax:base"):
        djax.load("djax:large")


def test_drills_are_right_and_learn_results_only(tokenizer: Tokenizer) -> None:
    mask_id = tokenizer.encode("<|mask|>")[0]
    source = DrillSource(tokenizer, mask_id, seed=5)
    assert source.sample(7) == DrillSource(tokenizer, mask_id, seed=5).sample(7)
    seen = cut = prompted = 0
    for index in range(90):
        tokens, is_answer, ends = source.sample(index)
        assert not ends
        if mask_id in tokens:
            masks = tokens.index(mask_id)
            assert set(tokens[masks:]) == {mask_id}
            assert not any(is_answer[masks:])
            cut += 1
            tokens, is_answer = tokens[:masks], is_answer[:masks]
        if tokens[0] == tokenizer.encode("<role>")[0]:
            behind = len(tokens) - tokens[::-1].index(tokenizer.encode("</role>")[0])
            assert not any(is_answer[:behind])
            prompted += 1
            tokens, is_answer = tokens[behind:], is_answer[behind:]
        assert len(tokens) <= 64
        parts = [(learned, tokenizer.decode([token for token, _ in group])) for learned, group in itertools.groupby(
            zip(tokens, is_answer, strict=True), key=lambda pair: pair[1])]
        for (given, before), (learned, result) in zip(parts[::2], parts[1::2], strict=False):
            assert (given, learned) == (False, True)
            if "new" in before:
                total, digit = re.search(r"seen ([0-9]{2})\n([1-9]) new $", before).groups()
                assert f"{int(total) + int(digit):02d}" == result
            else:
                operation = before.split("\n")[-1].removesuffix("=")
                left, *rest = re.findall(r"[-+*]|[0-9]+", operation)
                value = int(left)
                for sign, right in zip(rest[::2], rest[1::2], strict=True):
                    value = {"+": value + int(right), "-": value - int(right), "*": value * int(right)}[sign]
                assert int(result) == value
            seen += 1
    assert 30 < cut < 60
    assert 30 < prompted < 60
    assert seen > 300


def test_a_window_is_what_block_decoding_meets(tokenizer: Tokenizer) -> None:
    mask_id = tokenizer.encode("<|mask|>")[0]
    whole = TaskSource(tuple(tasks.TASKS), tokenizer, seed=2)
    source = WindowSource(whole, mask_id, seed=3)
    starts = set()
    for index in range(60):
        cut, full = source.sample(index), whole.sample(index)
        assert cut == source.sample(index)
        assert not cut.ends
        assert len(cut.tokens) == len(full.tokens)
        prompt, learned = full.is_answer.index(True), np.flatnonzero(cut.is_answer)
        start, end = learned[0], learned[-1] + 1
        assert prompt <= start
        assert learned.tolist() == list(range(start, end)), "one run"
        assert cut.tokens[:end] == full.tokens[:end]
        assert cut.tokens[end:] == [mask_id] * (len(full.tokens) - end)
        assert end - start <= 32
        assert end - start >= 8 or end == len(full.tokens)
        starts.add(start - prompt)
    assert len(starts) > 20


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
    written = train_base(tmp_path, stages=[dataclasses.replace(stage, steps=1) for stage in build_recipe.STAGES[:2]])
    assert sorted(file.name for file in written.iterdir()) == FILES
    assert djax.load(written).config.num_experts == 8
    original = build_recipe.compression_config

    def smaller(output: Path, *, steps: int) -> object:
        config = original(output, steps=steps)
        return dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=4))

    monkeypatch.setattr(build_recipe, "compression_config", smaller)

    def again() -> bytes:
        return (compress(tmp_path, prompts=6, steps=52, accept=lambda example, answer: True)
                / "model.safetensors").read_bytes()

    with pytest.raises(ValueError, match="trajectories: got none"):
        compress(tmp_path, prompts=2, steps=52)  # so short a training gets nothing right
    weights = again()
    assert weights != (written / "model.safetensors").read_bytes()
    before = (tmp_path / "trajectories.npz").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "compressed")
    assert again() == weights
    assert (tmp_path / "trajectories.npz").stat().st_mtime_ns == before


def test_a_build_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, "-m", "djax.train.bundled", str(tmp_path / "file")], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
