"""The text tasks: what is generated verifies and nothing else does, final answers are right by other means, and the
streams are the same from wherever they are started."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import operator
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from djax import tasks
from djax.engine.tokenizer import Tokenizer
from djax.tasks import MARKER, SPLITS, TASKS, Example, Split, Task, examples, held_out_set, split_of
from djax.tasks.records import CITIES, ITEMS, NAMES
from djax.train.bundled.tokenizer import write_tokenizer

COUNT = 300
HELD_OUT = (1036, 1057, 1069)
"""The n from 1001 to 1099 for which "Add 1234 and n." is held out: a change would let training prompts into tests."""

each_task = pytest.mark.parametrize("name", TASKS)


def drawn(name: str, count: int = COUNT, *, seed: int = 11) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [TASKS[name].example(TASKS[name].draw(rng)) for _ in range(count)]


def integers(text: str) -> list[int]:
    return [int(number) for number in re.findall("[0-9]+", text)]


# --- oracles: prompt -> final answer, by other means than the tasks' own ---

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def evaluate(expression: str) -> int:
    """By Python's own grammar."""
    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant)
        return node.value

    return value(ast.parse(expression, mode="eval").body)


def expression_of(prompt: str) -> str:
    return max(re.findall(r"[-0-9+*()]+", prompt), key=len)


def record_of(prompt: str) -> dict[str, Any]:
    """By the words around each value, whatever their order."""
    words = re.findall("[A-Za-z]+", prompt)
    [age] = [number for number in integers(prompt) if number >= 18]
    [item] = set(words) & set(ITEMS)
    [count], [price] = (integers(re.search(pattern, prompt)[0]) for pattern in (f"[0-9] {item}", "[0-9] euros"))
    [name], [city] = set(words) & set(NAMES), set(words) & set(CITIES)
    return {"name": name, "age": age, "city": city, "item": item, "count": count, "price": price,
            "total": sum([price] * count)}


ORACLES: dict[str, Callable[[str], object]] = {
    "addition": lambda prompt: sum(integers(prompt)),
    "sort": lambda prompt: sorted(integers(prompt)),
    "unique_sum": lambda prompt: sum(set(integers(prompt))),
    "expression": lambda prompt: evaluate(expression_of(prompt)),
    "record": record_of,
}
READ: dict[str, Callable[[str], object]] = {
    "addition": int, "sort": integers, "unique_sum": int, "expression": int, "record": json.loads}


@each_task
def test_final_answers_agree_with_the_oracle(name: str) -> None:
    for example in drawn(name):
        final = TASKS[name].final(example.answer)
        assert READ[name](final) == ORACLES[name](example.prompt), example
        assert example.answer.endswith(f"\n{MARKER}{final}")


def steps_of(example: Example) -> list[str]:
    return example.answer.split("\n")[:-1]


def test_addition_steps_are_the_columns() -> None:
    for example in drawn("addition"):
        first, second = integers(example.prompt)
        for place, step in enumerate(steps_of(example)):
            low, here = 10**place, 10**(place + 1)
            carry = (first % low + second % low) // low
            column = (first // low % 10, second // low % 10, carry)
            assert step == "{}+{}+{}={:02d}".format(*column, sum(column)), example
        assert max(first, second) < here, example


def test_sort_steps_are_the_sorted_prefixes() -> None:
    for example in drawn("sort"):
        numbers = integers(example.prompt)
        assert [integers(step) for step in steps_of(example)] == [
            [number, *sorted(numbers[:place])] for place, number in enumerate(numbers, 1)]


def test_unique_sum_steps_are_the_totals_of_the_prefixes() -> None:
    for example in drawn("unique_sum"):
        numbers = integers(example.prompt)
        assert [step.split() for step in steps_of(example)] == [
            [str(number), ("new", "seen")[number in numbers[:place]], f"{sum(set(numbers[:place + 1])):02d}"]
            for place, number in enumerate(numbers)]


def test_expression_steps_keep_the_value() -> None:
    for example in drawn("expression"):
        before = expression_of(example.prompt)
        value = evaluate(before)
        assert len(steps_of(example)) == len(re.findall("[-+*]", before))
        for step in steps_of(example):
            operation, result, after = re.fullmatch(r"(.+)=([0-9]+): (.+)", step).groups()
            assert evaluate(operation) == int(result) <= 50, example
            left, sign, right = re.fullmatch(r"\(?([0-9]+)([-+*])([0-9]+)\)?", operation).groups()
            assert (max if sign == "*" else min)(int(left), int(right)) <= 9, "a fact to know by heart"
            assert operation in before
            assert evaluate(after) == value, example
            before = after
        assert before == str(value)


# --- verify ---


@each_task
def test_generated_answers_verify(name: str) -> None:
    task = TASKS[name]
    for example in drawn(name):
        assert example.task == name
        for completion in (example.answer, f"\n  {example.answer} \n"):
            assert task.verify(example.prompt, completion)
            assert task.verify_final(example.prompt, completion)
        assert example == task.example(example.prompt)


@each_task
def test_every_wording_is_drawn(name: str) -> None:
    assert len({example.prompt.split()[0] for example in drawn(name, 60)}) in (2, 3)


@each_task
def test_corrupted_answers_do_not_verify(name: str) -> None:
    rng = np.random.default_rng(12)
    for example in drawn(name, 10):
        answer = example.answer
        for place, old in enumerate(answer):
            new = str(rng.choice([c for c in "0123456789+-*= \n:aeqN{\"" if c != old]))
            for corrupted in (answer[:place] + new + answer[place + 1:], answer[:place] + answer[place + 1:],
                              answer[:place] + "7" + answer[place:]):
                assert not TASKS[name].verify(example.prompt, corrupted), corrupted
        for more in ("0", ".", f"\n{MARKER}1", f"\n{answer}"):
            assert not TASKS[name].verify(example.prompt, answer + more)


@each_task
def test_another_prompts_answer_does_not_verify(name: str) -> None:
    for example, other in itertools.pairwise(drawn(name, 50)):
        assert not TASKS[name].verify(example.prompt, other.answer) or example.answer == other.answer


@each_task
def test_final_ignores_the_steps(name: str) -> None:
    task = TASKS[name]
    for example in drawn(name, 20):
        final = task.final(example.answer)
        for completion in (MARKER + final, f"junk\n{MARKER}0\n{MARKER}{final}  \n", f"so the {MARKER}{final}"):
            assert task.final(completion) == final
            assert task.verify_final(example.prompt, completion)
            assert not task.verify(example.prompt, completion)
        for completion in (final, f"{MARKER}{final}1", f"{example.answer}\n{MARKER}", f"{example.answer}\nmore"):
            assert not task.verify_final(example.prompt, completion), completion


@each_task
@pytest.mark.parametrize("junk", ["", " ", MARKER, MARKER.strip(), "answer", "\x00", "\ud800", "{" * 5000, "9" * 5000,
                                  "答え: ١٢", f"{MARKER}\n\n", "NaN", f'{MARKER}{{"name":'])
def test_junk_completions_are_wrong_and_raise_nothing(name: str, junk: str) -> None:
    prompt = drawn(name, 1)[0].prompt
    assert not TASKS[name].verify(prompt, junk)
    assert not TASKS[name].verify_final(prompt, junk)
    assert TASKS[name].final(junk) in (None, '{"name":')


@settings(max_examples=25, deadline=None, derandomize=True)
@given(junk=st.text(), name=st.sampled_from(sorted(TASKS)), place=st.integers(0, 40))
def test_any_insertion_is_wrong_and_raises_nothing(junk: str, name: str, place: int) -> None:
    example, task = drawn(name, 1)[0], TASKS[name]
    for completion in (junk, MARKER + junk, example.answer[:place] + junk + example.answer[place:]):
        task.final(completion)
        task.verify_final(example.prompt, completion)
        assert task.verify(example.prompt, completion) == (completion.strip() == example.answer)


@pytest.mark.parametrize(("name", "prompt"), [
    ("addition", "Add 123 and 3456."), ("addition", "Add 01234 and 3456."), ("addition", "Add 1234567 and 3456."),
    ("addition", "Add 1234 and 3456"), ("addition", "Add 1234 and 3456.\n"), ("addition", "Add ١٢٣٤ and 3456."),
    ("sort", "Sort these numbers: 1 2 3"), ("sort", "Sort these numbers: 1 2 3 100"),
    ("sort", "Sort these numbers: 1 2 3 04"), ("sort", "Sort these numbers: 1 2  3 4"),
    ("unique_sum", "Add each different number once: 1 1 2 2 3 4"), ("unique_sum", "Sort these numbers: 1 2 3 4"),
    ("unique_sum", "Add each different number once: 1 1 1 2 2 3 3"),
    ("unique_sum", "Add each different number once: 1 2 3 4 5 1 2"),
    ("expression", "Evaluate 1+2."), ("expression", "Evaluate 1-2+3+4+5."), ("expression", "Evaluate 2*5*4+5+1."),
    ("expression", "Evaluate 1+2+(3+4+5)."), ("expression", "Evaluate 1+2+3+4+5+6+7."),
    ("expression", "Evaluate 1+2+3+4+__import__."), ("expression", "Evaluate 7*8-9-9-9."),
    ("expression", "Evaluate 2*6+3*4+1."),
    ("record", "Write the record: Bo, 34, from Oslo buys 3 pens at 4 euros each."),
    ("record", "Write the record: Ada, 17, from Oslo buys 3 pens at 4 euros each."),
    *((name, prompt) for name in TASKS for prompt in ("", "Hello", "Add {first} and {second}.")),
])
def test_a_prompt_of_no_task_is_refused(name: str, prompt: str) -> None:
    for function in (TASKS[name].verify, TASKS[name].verify_final):
        with pytest.raises(ValueError, match="prompt: got ") as raised:
            function(prompt, "answer: 5")
        assert repr(name) in str(raised.value)
        assert repr(prompt) in str(raised.value)


def test_a_prompt_belongs_to_one_task() -> None:
    for name, other in itertools.permutations(TASKS, 2):
        for example in drawn(name, 20):
            with pytest.raises(ValueError, match=other):
                TASKS[other].example(example.prompt)


# --- splits and streams ---


def test_one_prompt_in_twenty_is_held_out() -> None:
    assert set(get_args(Split)) == set(SPLITS)
    for name in TASKS:
        prompts = {example.prompt for example in drawn(name, 2000)}
        # Half a percent is about the standard deviation; a repeated prompt or two lie in spaces of a million, and
        # some dozens in the hundred thousand that sorted lists of a few digits have.
        assert 0.03 < np.mean([split_of(prompt) == "held_out" for prompt in prompts]) < 0.07, name
        assert len(prompts) >= (1950 if name == "unique_sum" else 1995), name


def test_the_split_of_a_prompt_is_for_good() -> None:
    prompts = [f"Add 1234 and {number}." for number in range(1001, 1100)]
    held_out = [prompt for prompt in prompts if split_of(prompt) == "held_out"]
    assert held_out == [f"Add 1234 and {number}." for number in HELD_OUT]


@pytest.mark.parametrize("name", [*TASKS, None])
@pytest.mark.parametrize("split", SPLITS)
def test_an_item_depends_on_its_index_alone(name: str | None, split: Split) -> None:
    whole = list(itertools.islice(examples(name, split=split, seed=3), 40))
    for start in (0, 1, 17, 39):
        assert list(itertools.islice(examples(name, split=split, seed=3, start=start), 40 - start)) == whole[start:]
    assert {split_of(example.prompt) for example in whole} == {split}
    assert all(TASKS[example.task].verify(example.prompt, example.answer) for example in whole)
    assert whole != list(itertools.islice(examples(name, split=split, seed=4), 40))
    next(examples(name, split=split, seed=2**40, start=2**40))


def test_the_mix_takes_the_tasks_in_turn() -> None:
    mixed = list(itertools.islice(examples(None, split="train", seed=5), 23))
    assert [example.task for example in mixed] == [name for name, _ in zip(itertools.cycle(TASKS), mixed)]
    assert mixed[7] == next(examples(mixed[7].task, split="train", seed=5, start=7))


def test_tasks_and_seeds_draw_apart() -> None:
    streams = [list(itertools.islice(examples("addition", split="train", seed=seed), 50)) for seed in range(4)]
    assert len({example.prompt for stream in streams for example in stream}) == 200


@pytest.mark.parametrize("name", [*TASKS, None])
def test_held_out_sets_are_distinct_and_held_out(name: str | None) -> None:
    found = held_out_set(name, 60)
    assert len({example.prompt for example in found}) == len(found) == 60
    assert {split_of(example.prompt) for example in found} == {"held_out"}
    assert found[:20] == held_out_set(name, 20, seed=0)
    assert found != held_out_set(name, 60, seed=1)
    assert held_out_set(name, 0) == []


def test_too_few_held_out_prompts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"Add 1234 and {number}." for number in range(1001, 1100)]
    few = Task("few", lambda rng: str(rng.choice(prompts)), TASKS["addition"].solve)
    never = Task("never", lambda rng: prompts[0], TASKS["addition"].solve)
    monkeypatch.setattr(tasks, "TASKS", {"few": few, "never": never})
    assert {example.prompt for example in held_out_set("few", len(HELD_OUT))} == {
        f"Add 1234 and {number}." for number in HELD_OUT}
    with pytest.raises(ValueError, match=f"count: got 20; allowed {len(HELD_OUT)}, as many .*'few' .* ask for fewer"):
        held_out_set("few", 20)
    with pytest.raises(ValueError, match="split: got 'held_out', of which task 'never' drew none"):
        held_out_set("never", 1)


@pytest.mark.parametrize(("options", "message"), [
    ({"task": "sorting"}, "task: got 'sorting'; allowed addition, sort, unique_sum, expression, record; choose one"),
    ({"split": "test"}, "split: got 'test'; allowed train, held_out; pick one of them"),
    ({"seed": -1}, "seed: got -1; allowed an integer from 0"),
    ({"start": -5}, "start: got -5; allowed an integer from 0"),
])
def test_wrong_arguments_are_refused_at_the_call(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        examples(**{"task": "sort", "split": "train", "seed": 0} | options)


def test_held_out_set_refuses_wrong_arguments() -> None:
    for wrong, message in ((("sorting", 1, 0), "task: got 'sorting'"), (("sort", -1, 0), "count: got -1"),
                           (("sort", 1, -1), "seed: got -1")):
        name, count, seed = wrong
        with pytest.raises(ValueError, match=message):
            held_out_set(name, count, seed=seed)


# --- sizes ---


def test_lengths_in_tokens(tmp_path: Path) -> None:
    """With the bundled model's tokenizer: answers long enough for parallel decoding to matter."""
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    sample = list(itertools.islice(examples(None, split="train", seed=6), 1000))
    for name in TASKS:
        of_task = [example for example in sample if example.task == name]
        answers, prompts = ([len(tokenizer.encode(text)) for text in texts] for texts in (
            [example.answer for example in of_task], [example.prompt for example in of_task]))
        assert 32 <= min(answers) <= max(answers) <= 160, name
        assert max(prompts) <= 60, name


def test_tasks_and_examples_are_frozen() -> None:
    example = drawn("sort", 1)[0]
    for thing, field in ((example, "answer"), (TASKS["sort"], "name")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, "")
    with pytest.raises(TypeError):
        TASKS["sort"] = TASKS["addition"]  # type: ignore[index]
    assert all(task.name == name for name, task in TASKS.items())


def test_importing_the_tasks_imports_no_jax() -> None:
    code = ("import sys, djax.tasks; "
            "print([m for m in ('jax', 'transformers', 'tokenizers', 'orbax') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == "[]"
