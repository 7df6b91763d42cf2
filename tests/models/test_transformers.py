"""LLaDA-MoE against transformers' Qwen3-MoE, made bidirectional: the same network, written by others."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from djax.models import build
from djax.models.config import LladaMoeConfig
from djax.models.layers.basic import rotary_angles
from djax.models.layers.trunk import Transformer
from tests.support import golden

pytestmark = pytest.mark.usefixtures("oracle_libraries")
torch: Any = None
transformers: Any = None

LENGTH = 16
SMALL = dataclasses.replace(
    golden.CONFIG, num_heads=6, num_kv_heads=2, head_dim=8, num_experts=5, experts_per_token=3, num_layers=3,
    rope_theta=10000.0)


def make_oracle(config: LladaMoeConfig) -> Any:
    """A float64-capable, bidirectional Qwen3-MoE with random weights."""
    oracle_config = transformers.Qwen3MoeConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
        num_experts=config.num_experts, num_experts_per_tok=config.experts_per_token,
        moe_intermediate_size=config.expert_size, rms_norm_eps=config.rms_norm_eps, rope_theta=config.rope_theta,
        norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=False,
        attn_implementation="eager", experts_implementation="eager")
    oracle_config.is_causal = False
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(oracle_config).eval()


def golden_oracle() -> Any:
    """An oracle of its own with the golden checkpoint's weights."""
    oracle, state = make_oracle(golden.CONFIG), {}
    for name, value in golden.checkpoint().items():
        if ".experts." not in name:
            state[name] = torch.tensor(value)
    for index, layer in golden.parameters()["layers"].items():
        gate, up, down = (torch.tensor(np.asarray(layer["moe"][name])) for name in ("gate", "up", "down"))
        state[f"model.layers.{index}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[f"model.layers.{index}.mlp.experts.down_proj"] = down
    oracle.load_state_dict(state, strict=True)
    return oracle


def model_of(oracle: Any, config: LladaMoeConfig) -> Transformer:
    """Our model with the oracle's weights."""
    heads, groups, width, model = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
    state = {name: value.detach().float().numpy() for name, value in oracle.state_dict().items()}

    def layer(index: int) -> dict[str, Any]:
        prefix = f"model.layers.{index}."
        get = lambda name: state[f"{prefix}{name}.weight"]  # noqa: E731
        gate, up = np.split(state[f"{prefix}mlp.experts.gate_up_proj"], 2, axis=1)
        return {
            "attention_norm": get("input_layernorm"), "moe_norm": get("post_attention_layernorm"),
            "attention": {
                "query": get("self_attn.q_proj").reshape(heads, width, model),
                "key": get("self_attn.k_proj").reshape(groups, width, model),
                "value": get("self_attn.v_proj").reshape(groups, width, model),
                "output": get("self_attn.o_proj").reshape(model, heads, width),
                "query_norm": get("self_attn.q_norm"), "key_norm": get("self_attn.k_norm")},
            "moe": {"router": get("mlp.gate"), "gate": gate, "up": up,
                    "down": state[f"{prefix}mlp.experts.down_proj"]},
        }

    tree = {
        "embed": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"],
        "head": state["lm_head.weight"], "layers": {i: layer(i) for i in range(config.num_layers)}}
    graphdef = nnx.split(build(config))[0]
    return nnx.merge(graphdef, jax.tree.map(lambda array: jnp.asarray(array, config.dtype), tree))


def ask(oracle: Any, tokens: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The residual stream before each layer and after the last one, and the logits."""
    stream: list[np.ndarray] = []
    hooks = [layer.register_forward_pre_hook(
        lambda module, arguments: stream.append(arguments[0].double().numpy())) for layer in oracle.model.layers]
    hooks.append(oracle.model.norm.register_forward_pre_hook(
        lambda module, arguments: stream.append(arguments[0].double().numpy())))
    with torch.no_grad():
        logits = oracle(torch.tensor(tokens)).logits.double().numpy()
    for hook in hooks:
        hook.remove()
    return stream, logits


def context(tokens: np.ndarray) -> dict[str, Any]:
    """Where `tokens` stand on a canvas of LENGTH, padded on the right so that one program serves all."""
    shape = (tokens.shape[0], LENGTH)
    place = jnp.broadcast_to(jnp.arange(LENGTH), shape)
    return {"positions": place, "key_mask": place < tokens.shape[1], "window_start": jnp.int32(0),
            "write": jnp.ones(shape, bool)}


@nnx.jit
def _run_model(model: Transformer, tokens: Any, context: dict[str, Any]) -> Any:
    return model.unembed(model(model.embed_tokens(tokens), cache=None, **context)[0])


@nnx.jit
def _run_layer(layer: Any, x: Any, positions: Any, context: dict[str, Any]) -> Any:
    rotation = rotary_angles(positions, head_dim=layer.config.head_dim, theta=layer.config.rope_theta)
    x, _ = layer.mix(x, rotation=rotation, cache=None, **context)
    return layer.transform(x)[0]


def logits_of(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    padded = np.pad(tokens, ((0, 0), (0, LENGTH - tokens.shape[1])))
    logits = _run_model(model, jnp.asarray(padded), context(tokens))
    return np.asarray(logits, np.float64)[:, : tokens.shape[1]]


def layer_of(layer: Any, x: np.ndarray, dtype: str) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, LENGTH - x.shape[1]), (0, 0)))
    where = context(x[..., 0])
    got = _run_layer(layer, jnp.asarray(padded, dtype), where.pop("positions"), where)
    assert got.dtype == jnp.dtype(dtype)
    return np.asarray(got, np.float64)[:, : x.shape[1]]


def largest(got: Any, expected: np.ndarray) -> float:
    """Largest error as a share of the largest value."""
    return float(np.abs(np.asarray(got, np.float64) - expected).max() / np.abs(expected).max())


def spread(got: Any, expected: np.ndarray) -> float:
    """Root mean square error as a share of the root mean square."""
    return float(np.sqrt(((np.asarray(got, np.float64) - expected) ** 2).mean() / (expected**2).mean()))


@pytest.mark.parametrize("index", range(3))
def test_golden_checkpoint_layer_by_layer_and_whole(index: int) -> None:
    oracle, tokens = golden_oracle(), np.array([golden.prompts()[index]])
    stream, logits = ask(oracle, tokens)
    model = model_of(oracle, golden.CONFIG)
    for number, layer in enumerate(model.layers):
        assert largest(layer_of(layer, stream[number], "float32"), stream[number + 1]) < 5e-6, number
    assert largest(logits_of(model, tokens), logits) < 5e-6


@pytest.mark.slow
def test_random_checkpoint_with_grouped_heads() -> None:
    """Logits below 1, so that 5e-6 is absolute; sizes that no two axes share."""
    oracle = make_oracle(SMALL)
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, LENGTH))
    stream, logits = ask(oracle, tokens)
    model = model_of(oracle, SMALL)
    for number, layer in enumerate(model.layers):
        got = layer_of(layer, stream[number], "float32")
        assert np.abs(got - stream[number + 1]).max() < 5e-6
    assert np.abs(logits).max() > 0.1
    assert np.abs(logits_of(model, tokens) - logits).max() < 5e-6


def test_what_would_be_wrong_is_seen() -> None:
    """The oracle tells apart the mistakes that ports make: causal attention, a renormalised router."""
    tokens = np.array([golden.prompts()[2]])
    ours = logits_of(model_of(golden_oracle(), golden.CONFIG), tokens)
    causal, renormalised = golden_oracle(), golden_oracle()
    causal.config.is_causal = True
    for layer in renormalised.model.layers:
        layer.mlp.gate.norm_topk_prob = True
    for wrong in (causal, renormalised):
        assert largest(ours, ask(wrong, tokens)[1]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("index", range(3))
def test_bfloat16_is_as_near_as_bfloat16_gets(index: int) -> None:
    """Against the same rounded weights in float64; transformers' own bfloat16 is the yardstick.

    The golden weights give logits near 30, and rounding the residual stream alone costs about 1 %. A layer
    stays within 1e-2; the whole network errs no more than transformers does.
    """
    rounded, tokens = golden_oracle().bfloat16(), np.array([golden.prompts()[index]])
    exact = golden_oracle().bfloat16().double()
    stream, logits = ask(exact, tokens)
    model = model_of(rounded, dataclasses.replace(golden.CONFIG, dtype="bfloat16"))
    for number, layer in enumerate(model.layers):
        assert spread(layer_of(layer, stream[number], "bfloat16"), stream[number + 1]) < 1e-2, number
    ours, theirs = spread(logits_of(model, tokens), logits), spread(ask(rounded, tokens)[1], logits)
    assert ours < 1.1 * theirs
    assert ours < 1.5e-2


@pytest.mark.slow
def test_bfloat16_at_the_initial_scale() -> None:
    oracle = make_oracle(SMALL).bfloat16()
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, LENGTH))
    _, logits = ask(make_oracle(SMALL).bfloat16().double(), tokens)
    got = logits_of(model_of(oracle, dataclasses.replace(SMALL, dtype="bfloat16")), tokens)
    assert np.abs(got - logits).max() < 1e-2
