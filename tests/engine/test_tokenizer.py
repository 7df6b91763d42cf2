"""The tokenizer, the chat template, the streaming detokenizer and the bundled checkpoint's files."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import numpy as np
import pytest

from djax import assets
from djax.engine.tokenizer import Tokenizer, check_messages, has_tokenizer

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(assets.path())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the bundled tokenizer's directory that a test may change."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        shutil.copy(assets.path() / name, directory)
    return directory


def render_chat(messages: list[dict[str, str]]) -> str:
    """LLaDA-MoE-Instruct's prompt for a conversation, without Jinja."""
    system, turns = "", messages
    if messages[0]["role"] == "system":
        system, turns = messages[0]["content"] + "\n", messages[1:]
    names = {"user": "HUMAN", "assistant": "ASSISTANT"}
    parts = [f"<role>SYSTEM</role>{system}detailed thinking off<|role_end|>"]
    parts += [f"<role>{names[turn['role']]}</role>{turn['content']}<|role_end|>" for turn in turns]
    return "".join(parts) + "<role>ASSISTANT</role>"


TEXTS = (
    "", " ", "plain words", "  two  spaces\n\n\ttab \n", "wörld naïve ça", "日本語のテキスト",
    "🎉🧑‍🚀🏳️‍🌈", "a\u0000b\u007f",
    "e\u0301 combining", "\ufffd kept", "x" * 3000, "def f(x):\n    return x ** 2\n", "עברית العربية", "\r\n\u2028",
)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert all(0 <= number < tokenizer.size for number in ids)


def test_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|mask|>b<|role_end|>", allow_special_tokens=True)
    assert ids[1] == tokenizer.mask_id
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special=False) == "a<|mask|>b<|role_end|>"
    assert tokenizer.eos_id is not None
    assert tokenizer.decode([tokenizer.eos_id], skip_special=False) == "<|endoftext|>"


def test_size_marks_the_vocabulary_padding(tokenizer: Tokenizer) -> None:
    config = json.loads((assets.path() / "config.json").read_text())
    assert tokenizer.size == 700 < config["vocab_size"] == 704
    assert tokenizer.decode(range(tokenizer.size, config["vocab_size"]), skip_special=False) == ""
    assert tokenizer.decode([tokenizer.size - 1], skip_special=False) == "</think>"


def test_size_counts_past_a_hole_in_the_ids(checkpoint: Path) -> None:
    """Ids above a hole are real tokens: the length of the vocabulary would call the last one padding."""
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    content["added_tokens"][-1]["id"] += 5
    content["model"]["vocab"].pop("</think>", None)
    (checkpoint / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(checkpoint)
    highest = max(tokenizer.encode("</think>", allow_special_tokens=True))
    assert tokenizer.size == highest + 1
    assert tokenizer.decode([highest], skip_special=False) == "</think>"


@pytest.mark.parametrize(("messages", "expected"), [
    ([USER], "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>hi<|role_end|>"
             "<role>ASSISTANT</role>"),
    ([{"role": "system", "content": "Be brief."}, USER],
     "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|><role>HUMAN</role>hi<|role_end|>"
     "<role>ASSISTANT</role>"),
    ([USER, {"role": "assistant", "content": "yes"}, {"role": "user", "content": " b\n"}],
     "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>hi<|role_end|>"
     "<role>ASSISTANT</role>yes<|role_end|><role>HUMAN</role> b\n<|role_end|><role>ASSISTANT</role>"),
])
def test_chat_template(tokenizer: Tokenizer, messages: list[dict[str, str]], expected: str) -> None:
    assert render_chat(messages) == expected
    assert tokenizer.chat_text(messages) == expected
    ids = tokenizer.apply_chat(messages)
    assert tokenizer.decode(ids, skip_special=False) == expected
    role = tokenizer.encode("<role>", allow_special_tokens=True)
    assert ids[:1] == role, "the template's marks are single special tokens"


def test_the_template_equals_one_in_python() -> None:
    """Two renderings of one format, written apart: Jinja from the bundled file, and plain Python."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    template = environment.from_string((assets.path() / "chat_template.jinja").read_text())
    generator = random.Random(7)
    for _ in range(50):
        turns = [{"role": generator.choice(("user", "assistant")), "content": generator.choice(TEXTS)}
                 for _ in range(generator.randint(1, 4))]
        system = [{"role": "system", "content": "\n s "}] * generator.randint(0, 1)
        rendered = template.render(messages=system + turns, add_generation_prompt=True)
        assert rendered == render_chat(system + turns)


def test_a_checkpoint_without_a_template_gets_llada_moes(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    assert Tokenizer.load(checkpoint).chat_text([USER]) == render_chat([USER])


def test_a_checkpoints_own_template_is_used(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}[{{ m['role'] }}]{% endfor %}>")
    assert Tokenizer.load(checkpoint).chat_text([USER]) == "[user]>"


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('no users here') }}",
    "{% if %}",
])
def test_a_hostile_or_broken_template_is_one_error(checkpoint: Path, template: str) -> None:
    (checkpoint / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.load(checkpoint)
    with pytest.raises(ValueError, match="chat template failed") as caught:
        tokenizer.chat_text([USER])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("messages", "named"), [
    ([], "messages"),
    ("hi", "messages"),
    ({"role": "user", "content": "hi"}, "messages"),
    (["hi"], r"messages\[0\]"),
    ([{"content": "hi"}], r"messages\[0\]\.role"),
    ([{"role": "user"}], r"messages\[0\]\.content"),
    ([{"role": "user", "content": None}], r"messages\[0\]\.content"),
    ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], r"messages\[0\]\.content"),
    ([{"role": "human", "content": "hi"}], r"messages\[0\]\.role.*'human'.*system, user, assistant"),
    ([{"role": 1, "content": "hi"}], r"messages\[0\]\.role"),
    ([USER, {"role": "system", "content": "x"}], r"messages\[1\]\.role"),
])
def test_wrong_messages(messages: object, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}") as caught:
        check_messages(messages)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_the_code_of_a_checkpoint_never_runs(checkpoint: Path, tmp_path: Path) -> None:
    """auto_map in both configs, a module beside them and a custom class name: none of it is imported."""
    canary = tmp_path / "canary"
    (checkpoint / "tokenization_evil.py").write_text(
        f"open({str(canary)!r}, 'w').write('ran')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class EvilTokenizer(PreTrainedTokenizerFast):\n    pass\n")
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    settings.update(tokenizer_class="EvilTokenizer",
                    auto_map={"AutoTokenizer": ["tokenization_evil.EvilTokenizer"] * 2})
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "tokenization_evil.EvilConfig",
                          "AutoTokenizer": "tokenization_evil.EvilTokenizer"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    code = (f"import sys; from djax.engine.tokenizer import Tokenizer; t = Tokenizer.load({str(checkpoint)!r})\n"
            "assert t.decode(t.encode('still works')) == 'still works'\n"
            "assert not [m for m in sys.modules if 'evil' in m]")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert not canary.exists()


def test_import_is_lazy_and_quiet() -> None:
    code = ("import sys, djax.engine.tokenizer, djax.assets\nassert 'transformers' not in sys.modules\n"
            "djax.engine.tokenizer.Tokenizer.load(djax.assets.path())\nassert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_missing_tokenizer(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    assert has_tokenizer(assets.path())
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("content", "named"), [
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs"),
    ("{not json", "cannot be read"),
    ("{}", "cannot be read"),
    ("", "cannot be read"),
])
def test_unreadable_tokenizer(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=named) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_wrong_values(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="ids: got -3"):
        tokenizer.decode([1, -3])
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match="text: got 3"):
        tokenizer.encode(3)  # type: ignore[arg-type]


MULTIBYTE = "aé🎉 日本語\n🧑‍🚀 end e\u0301 \ufffd x\ufffd"


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 1000])
def test_stream_never_splits_a_character(tokenizer: Tokenizer, pieces: int) -> None:
    ids = tokenizer.encode(MULTIBYTE)
    stream = tokenizer.stream()
    text = ""
    for start in range(0, len(ids), pieces):
        text += stream.push(ids[start:start + pieces])
        assert MULTIBYTE.startswith(text)
        assert tokenizer.decode(ids[:start + pieces]).rstrip("\ufffd") == text
    assert text + stream.finish() == MULTIBYTE
    assert stream.finish() == ""


def test_stream_of_random_tokens_joins_to_their_text(tokenizer: Tokenizer) -> None:
    """Invalid UTF-8, special tokens and vocabulary padding included: what is out never changes."""
    generator = np.random.default_rng(11)
    for _ in range(30):
        ids = generator.integers(0, 512, size=60).tolist()
        stream, text, at = tokenizer.stream(), "", 0
        while at < len(ids):
            step = int(generator.integers(0, 6))
            text += stream.push(ids[at:at + step])
            at += step
            assert tokenizer.decode(ids).startswith(text)
        assert text + stream.finish() == tokenizer.decode(ids)


def test_stream_holds_back_an_incomplete_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🎉")
    assert len(ids) > 1
    stream = tokenizer.stream()
    assert stream.push(ids[:-1]) == ""
    assert stream.finish() == "\ufffd"
