"""The bundled model's tokenizer: a byte-level BPE, with LLaDA-MoE's special tokens and chat template.

Any UTF-8 text goes through it. Numbers of one or two digits are one token, so that they are copied and computed
with as a whole; longer ones are split into digits.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from djax import tasks

VOCAB_SIZE = 704
"""Rows of the embedding and of the head: padded past the tokenizer's length, as in the real model."""
TOKENIZER_SIZE = 700
SPECIAL_TOKENS = (
    "<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mask|>", "<|reserved_token_1|>",
    "<|reserved_token_2|>", "<role>", "</role>", "<|role_end|>", "<think>", "</think>",
)
EOS, MASK = "<|endoftext|>", "<|mask|>"

CHAT_TEMPLATE = (
    "{{- '<role>SYSTEM</role>' }}"
    "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\\n' }}{%- endif %}"
    "{{- 'detailed thinking off<|role_end|>' }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}"
    "{{- '<role>HUMAN</role>' + message['content'] + '<|role_end|>' }}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{- '<role>ASSISTANT</role>' + message['content'] + '<|role_end|>' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<role>ASSISTANT</role>' }}{%- endif %}"
)

_EXAMPLES = 2000
"""Training examples, the tasks in turn, that the merges are counted in."""
_HEADER = "SYSTEM detailed thinking off HUMAN ASSISTANT\n"
_SEED = 20251008


def token_id(token: str) -> int:
    """The id of a special token; they come last."""
    return TOKENIZER_SIZE - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(token)


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE of `TOKENIZER_SIZE` ids, trained on the tasks' own training texts.

    Raises:
        ValueError: the texts are too few for that many merges.
    """
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"(?<!\d)\d{1,2}(?!\d)|\d"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE - len(SPECIAL_TOKENS), min_frequency=2, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    examples = itertools.islice(tasks.examples(None, split="train", seed=_SEED), _EXAMPLES)
    texts = (_HEADER + example.prompt + "\n" + example.answer for example in examples)
    numbers = " ".join(f"{number:02d}" for number in range(100))
    result.train_from_iterator(itertools.chain(texts, [numbers] * _EXAMPLES), trainer)
    result.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    if result.get_vocab_size() != TOKENIZER_SIZE:
        raise ValueError(f"tokenizer: got {result.get_vocab_size()} ids; it must have {TOKENIZER_SIZE}")
    return result


def write_tokenizer(directory: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    (directory / "tokenizer.json").write_text(build_tokenizer().to_str(pretty=True) + "\n", encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def tokenizer_config() -> dict[str, object]:
    """tokenizer_config.json, without code and without a template of its own (chat_template.jinja has it)."""
    return {
        "add_bos_token": False, "add_eos_token": False, "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False, "cls_token": "[CLS]", "eos_token": EOS,
        "gmask_token": "[gMASK]", "mask_token": MASK, "model_max_length": 8192, "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
