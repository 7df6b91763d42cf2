"""Batches: what is learned, what is padding, and that they follow from the update alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from djax import assets
from djax.engine.tokenizer import Tokenizer
from djax.train.data import FixedSource, Sample, TaskSource, batcher, encode_pair, read_jsonl

EOS = 9
PAIRS = [([1] * n, [2] * (n + 1)) for n in range(1, 6)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(assets.path())


def test_rows_are_prompt_answer_and_eos() -> None:
    make = batcher(FixedSource(PAIRS, seed=0), batch_size=5, row_length=40, eos_id=EOS, longest_tail=3, seed=0)
    batch = jax.tree.map(np.asarray, make(0))
    assert batch.tokens.shape == (5, 32)
    tails = set()
    for tokens, is_answer, valid in zip(batch.tokens, batch.is_answer, batch.valid, strict=True):
        row, prompt = tokens[valid], int((~is_answer & valid).sum())
        assert valid[: len(row)].all(), "padding is at the end"
        assert row[:prompt].tolist() == [1] * prompt
        assert row[prompt : 2 * prompt + 1].tolist() == [2] * (prompt + 1)
        tail = row[2 * prompt + 1 :].tolist()
        assert tail == [EOS] * len(tail)
        assert 1 <= len(tail) <= 3
        tails.add(len(tail))
        assert is_answer.sum() == len(row) - prompt
    assert sorted((~batch.is_answer & batch.valid).sum(1)) == [1, 2, 3, 4, 5], "a pass holds every example once"
    assert len(tails) > 1


def test_batches_follow_from_the_update() -> None:
    def fresh(seed: int = 0) -> object:
        return batcher(FixedSource(PAIRS, seed=seed), batch_size=4, row_length=40, eos_id=EOS, longest_tail=3, seed=0)

    first, again, other = fresh(), fresh(), fresh(1)
    for update in (7, 0, 3):
        np.testing.assert_array_equal(first(update).tokens, again(update).tokens)  # type: ignore[operator]
    assert any(not np.array_equal(first(u).tokens, other(u).tokens) for u in range(5))  # type: ignore[operator]
    source = FixedSource(PAIRS, seed=0)
    orders = {tuple(len(source.sample(5 * number + i).tokens) for i in range(5)) for number in range(6)}
    assert len(orders) > 1, "passes differ"


def test_a_group_holds_the_same_rows_sorted_by_length() -> None:
    pairs = [([1], [2] * n) for n in range(1, 61)]

    def make(group: int) -> object:
        return batcher(FixedSource(pairs, seed=0), batch_size=5, row_length=128, eos_id=EOS, longest_tail=64, seed=0,
                       group=group)

    def rows(group: int) -> list[list[tuple[int, ...]]]:
        batches = [make(group)(update) for update in range(12)]  # type: ignore[operator]
        return [[tuple(row[valid]) for row, valid in zip(*map(np.asarray, (b.tokens, b.valid)), strict=True)]
                for b in batches]

    plain, grouped = rows(1), rows(4)
    for start in (0, 4, 8):
        same = [sorted(itertools.chain(*batches[start : start + 4])) for batches in (plain, grouped)]
        assert same[0] == same[1]
        spans = sorted((min(map(len, batch)), max(map(len, batch))) for batch in grouped[start : start + 4])
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    order = [[len(batch[0]) for batch in grouped[start : start + 4]] for start in (0, 4, 8)]
    assert any(lengths != sorted(lengths) for lengths in order), "the batches of a group come in a random order"
    assert rows(4) == grouped


def test_short_tails_are_the_more_frequent_ones() -> None:
    make = batcher(FixedSource([([1], [2])], seed=0), batch_size=2000, row_length=128, eos_id=EOS, longest_tail=100,
                   seed=0)
    tails = np.asarray(make(0).valid).sum(1) - 2
    assert (tails.min(), tails.max()) == (1, 100)
    for limit in (3, 10, 50):  # P(tail <= n) = log(n + 1) / log(101)
        assert np.mean(tails <= limit) == pytest.approx(np.log(limit + 1) / np.log(101), abs=0.04)


def test_a_part_of_some_answers_is_given() -> None:
    source = FixedSource([([1] * 3, [2] * 9)], seed=0)

    def known(share: float) -> np.ndarray:
        batch = batcher(source, batch_size=4000, row_length=64, eos_id=EOS, longest_tail=3, seed=0, given=share)(0)
        learned = np.asarray(batch.is_answer)
        assert (np.asarray(batch.tokens)[:, :12] == [1] * 3 + [2] * 9).all()
        first = learned.argmax(1)
        after = np.arange(learned.shape[1]) >= first[:, None]
        np.testing.assert_array_equal(learned, np.asarray(batch.valid) & after)
        return first - 3

    assert (known(0.0) == 0).all()
    counts = np.bincount(known(0.5), minlength=10)
    assert counts.sum() == 4000
    np.testing.assert_allclose(counts[1:], 200, atol=60)  # half of the rows, evenly over 0 to 9 tokens
    with pytest.raises(ValueError, match=r"given: got 1\.5"):
        known(1.5)


def test_what_is_learned_may_have_gaps_and_no_end() -> None:
    class Gaps:
        def sample(self, index: int) -> Sample:
            return Sample([1, 2, 3, 4], [False, True, False, True], ends=False)

    batch = batcher(Gaps(), batch_size=50, row_length=4, eos_id=EOS, longest_tail=3, seed=0)(0)
    assert (np.asarray(batch.tokens) == [1, 2, 3, 4]).all()
    assert (np.asarray(batch.is_answer) == [False, True, False, True]).all()
    begun = batcher(Gaps(), batch_size=50, row_length=4, eos_id=EOS, longest_tail=3, seed=0, given=1.0)(0)
    assert {tuple(row) for row in np.asarray(begun.is_answer)[:, [1, 3]].tolist()} == {
        (True, True), (False, True), (False, False)}


def test_an_example_that_does_not_fit_is_named() -> None:
    make = batcher(FixedSource([([1] * 20, [2] * 20)], seed=0), batch_size=2, row_length=40, eos_id=EOS,
                   longest_tail=3, seed=0)
    with pytest.raises(ValueError, match=r"row_length: got 40; allowed what example 0 needs, 20 \+ 20 tokens"):
        make(0)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        batcher(FixedSource(PAIRS, seed=0), batch_size=0, row_length=4, eos_id=EOS, longest_tail=3, seed=0)


def test_tasks_in_turn(tokenizer: Tokenizer) -> None:
    source = TaskSource(("addition", "sort"), tokenizer, 3)
    samples = [source.sample(index) for index in range(4)]
    texts = [tokenizer.decode(np.asarray(sample.tokens)[sample.is_answer]) for sample in samples]
    assert all("+" in text for text in texts[::2])
    assert all(": " in text and "+" not in text for text in texts[1::2])
    with pytest.raises(ValueError, match="task: got 'cooking'"):
        TaskSource(("cooking",), tokenizer, 3)


def test_json_lines(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "x", "answer": "y"}) + "\n\n" + json.dumps({"messages": chat}) + "\n")
    assert read_jsonl(path, tokenizer) == [
        (tokenizer.encode("x"), tokenizer.encode("y")), encode_pair(chat[:1], "c", tokenizer)]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_lines_end_at_newlines_only(separator: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Also: a byte order mark, and Windows' line ends."""
    lines = [{"prompt": "p", "answer": f"a{separator}b"}, {"prompt": "q", "answer": "c"}]
    path = tmp_path / "data.jsonl"
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_jsonl(path, tokenizer) == [
        encode_pair("p", f"a{separator}b", tokenizer), encode_pair("q", "c", tokenizer)]


@pytest.mark.parametrize(("text", "message"), [
    ("", "got no examples"),
    ("nonsense", "line 1: got no JSON"),
    ("[" * 100_000, "line 1: got no JSON"),
    ("[1]", r"line 1: example: got \[1\]; allowed"),
    ('{"prompt": "a"}', "line 1: example: got {'prompt': 'a'}; allowed"),
    ('{"prompt": "a", "answer": 3}', "line 1: answer: got 3; allowed a text"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "line 1: messages: got no answer at the end"),
    ('{"messages": [{"role": "bot", "content": "a"}]}', r"line 1: messages\[0\].role: got 'bot'"),
])
def test_wrong_lines_are_named(text: str, message: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_jsonl(path, tokenizer)
    assert str(error.value).startswith(str(path))
