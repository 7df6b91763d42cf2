"""Rebuilds the tiny checkpoint bundled in `djax/assets/`, byte for byte.

    python -m benchmarks.make_assets [DIRECTORY]

Random weights, real layout: the keys, the config fields, the special tokens and the chat template are
LLaDA-MoE's, only smaller. The tokenizer is a byte-level BPE trained on the text below, so that any UTF-8
text goes through it. Nothing here reads the clock, the environment or a global random state.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from djax.train.bundled import recipe
from djax.train.bundled.tokenizer import CHAT_TEMPLATE, EOS, MASK, SPECIAL_TOKENS, tokenizer_config

SEED = 20251008
VOCAB_SIZE = 512
"""Rows of the embedding and of the head: padded past the tokenizer's length, as in the real model."""
TOKENIZER_SIZE = 480
HIDDEN, LAYERS, HEADS, HEAD_DIM, EXPERTS, EXPERTS_PER_TOKEN, EXPERT_SIZE = 64, 2, 4, 16, 8, 2, 32

CORPUS = """
Diffusion language models write a whole block of tokens at once. They start from masks and, step by step,
they replace the masks that they are most certain about. What is certain early guides what is decided later.
A model of this kind reads the prompt and the open positions together, in both directions, so that the end
of a sentence can be settled before the middle of it.
The engine keeps one canvas per sequence. Each position of the canvas holds a token, or it is masked and
waits. In each step the model gives a distribution over the vocabulary for every masked position, and a
strategy commits the positions where the confidence is above a threshold. The rest stay masked and are asked
again in the next step, with more context around them.
The system prompt, the human and the assistant take turns. Detailed thinking is off. SYSTEM HUMAN ASSISTANT
What is the sum of two and three? The sum of two and three is five. What is 12 plus 30? It is 42.
Write a function that returns the largest number in a list.
def largest(numbers):
    best = numbers[0]
    for number in numbers:
        if number > best:
            best = number
    return best
def add(first, second):
    return first + second
print(add(2, 3))
for step in range(10):
    tokens = model(canvas, step)
The quick brown fox jumps over the lazy dog. The five boxing wizards jump quickly.
Once there was a small river that ran between two hills, and by the river there was a house with a red door.
In the morning the people of the house went out to the field, and in the evening they came back and told
each other what they had seen. The mountain, the water, the stone and the tree were there before them.
One, two, three, four, five, six, seven, eight, nine, ten. 0 1 2 3 4 5 6 7 8 9 10 20 50 100 1000 2024
Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday are the days of the week.
Der Satz wird von beiden Seiten zugleich geschrieben. La phrase se termine avant son milieu. El agua, la
piedra y el árbol. Große Flüsse, schöne Straßen, ça va très bien, déjà vu, mañana por la mañana.
"""


def config() -> dict[str, object]:
    """config.json: LLaDA-MoE's fields, and the mask id, which the real file leaves to the architecture."""
    eos = TOKENIZER_SIZE - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(EOS)
    mask = TOKENIZER_SIZE - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(MASK)
    return recipe.config_fields() | {
        "dense_intermediate_size": 256, "eos_token_id": eos, "expert_intermediate_size": EXPERT_SIZE,
        "hidden_size": HIDDEN, "mask_token_id": mask, "moe_layer_freq": [1] * LAYERS, "num_attention_heads": HEADS,
        "num_experts": EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN, "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS, "pad_token_id": eos, "vocab_size": VOCAB_SIZE,
    }


def weights() -> dict[str, np.ndarray]:
    """Random bfloat16 tensors under LLaDA-MoE's expert-wise keys, drawn in the order written here.

    The scales are chosen for a lively demonstration: attention sharp enough for positions to differ, and
    a head wide enough for some confidences to pass the usual thresholds.
    """
    generator = np.random.Generator(np.random.PCG64(SEED))

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (scale * generator.standard_normal(shape)).astype(ml_dtypes.bfloat16)

    def norm(width: int, *, scale: float = 1.0) -> np.ndarray:
        return (scale * (1.0 + 0.1 * generator.standard_normal(width))).astype(ml_dtypes.bfloat16)

    attention = HEADS * HEAD_DIM
    tensors = {"model.embed_tokens.weight": normal(VOCAB_SIZE, HIDDEN, scale=1.0)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = norm(HIDDEN)
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[prefix + f"self_attn.{name}.weight"] = normal(attention, HIDDEN, scale=HIDDEN**-0.5)
        tensors[prefix + "self_attn.o_proj.weight"] = normal(HIDDEN, attention, scale=2 * attention**-0.5)
        for name in ("q_norm", "k_norm"):
            tensors[prefix + f"self_attn.{name}.weight"] = norm(HEAD_DIM, scale=2.0)
        tensors[prefix + "post_attention_layernorm.weight"] = norm(HIDDEN)
        tensors[prefix + "mlp.gate.weight"] = normal(EXPERTS, HIDDEN, scale=2 * HIDDEN**-0.5)
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj"):
                tensors[prefix + f"mlp.experts.{expert}.{name}.weight"] = normal(
                    EXPERT_SIZE, HIDDEN, scale=HIDDEN**-0.5)
            tensors[prefix + f"mlp.experts.{expert}.down_proj.weight"] = normal(
                HIDDEN, EXPERT_SIZE, scale=4 * EXPERT_SIZE**-0.5)
    tensors["model.norm.weight"] = norm(HIDDEN)
    tensors["lm_head.weight"] = normal(VOCAB_SIZE, HIDDEN, scale=6 * HIDDEN**-0.5)
    return tensors


def tokenizer() -> Tokenizer:
    """A byte-level BPE of `TOKENIZER_SIZE` ids, the special tokens last.

    Raises:
        ValueError: the corpus is too short for that many merges.
    """
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE - len(SPECIAL_TOKENS), min_frequency=2, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    result.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    result.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    if result.get_vocab_size() != TOKENIZER_SIZE:
        raise ValueError(f"tokenizer: got {result.get_vocab_size()} ids; it must have {TOKENIZER_SIZE}")
    return result


def build(directory: Path) -> None:
    """Write the checkpoint into `directory`, which is created if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in (("config.json", config()), ("tokenizer_config.json", tokenizer_config())):
        (directory / name).write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (directory / "tokenizer.json").write_text(
        tokenizer().to_str(pretty=True) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (directory / "model.safetensors").write_bytes(save(weights(), metadata={"format": "pt"}))


def main() -> None:
    default = Path(__file__).resolve().parent.parent / "djax" / "assets"
    parser = argparse.ArgumentParser(description="Rebuild the bundled tiny checkpoint.")
    parser.add_argument("directory", nargs="?", type=Path, default=default)
    build(parser.parse_args().directory)


if __name__ == "__main__":
    main()
