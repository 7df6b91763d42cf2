"""LLaDA2 against transformers' GLM-4-MoE under a block-causal mask: the same network, written by others."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from djax.models import build
from djax.models.config import Llada2MoeConfig
from djax.models.layers.trunk import Transformer
from tests.support import golden_llada2 as golden

pytestmark = pytest.mark.usefixtures("oracle_libraries")
torch: Any = None
transformers: Any = None

LENGTH = 20
"""Two whole blocks and a half of the goldens'."""
SMALL = dataclasses.replace(
    golden.CONFIG, num_layers=4, num_dense_layers=2, dense_size=40, num_heads=6, num_kv_heads=3, head_dim=12,
    rotary_dim=8, num_experts=18, experts_per_token=4, expert_size=24, num_shared_experts=2, num_groups=6,
    groups_per_token=3, routed_scaling_factor=1.5, rope_theta=10000.0, block_length=6)


def make_oracle(config: Llada2MoeConfig) -> Any:
    """GLM-4-MoE with random weights, and a router's bias that changes its choices."""
    oracle_config = transformers.Glm4MoeConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.dense_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta,
                         "partial_rotary_factor": config.rotary_dim / config.head_dim},
        moe_intermediate_size=config.expert_size, num_experts_per_tok=config.experts_per_token,
        n_shared_experts=config.num_shared_experts, n_routed_experts=config.num_experts,
        routed_scaling_factor=config.routed_scaling_factor, n_group=config.num_groups,
        topk_group=config.groups_per_token, first_k_dense_replace=config.num_dense_layers,
        # GLM-4 divides by the sum whatever k is; LLaDA2's code only where there are several
        norm_topk_prob=config.experts_per_token > 1,
        rms_norm_eps=config.rms_norm_eps, use_qk_norm=True, tie_word_embeddings=False, attention_bias=False,
        attn_implementation="eager", experts_implementation="eager", num_mtp_layers=0)
    torch.manual_seed(0)
    oracle = transformers.Glm4MoeForCausalLM(oracle_config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in oracle.model.layers[config.num_dense_layers:]:
            gate = layer.mlp.gate
            gate.weight.normal_(0.0, 0.3, generator=generator)
            gate.e_score_correction_bias.normal_(0.0, 0.3, generator=generator)
        for name, weight in oracle.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return oracle


RENAMED = {
    "attention.dense": "self_attn.o_proj", "attention.query_layernorm": "self_attn.q_norm",
    "attention.key_layernorm": "self_attn.k_norm", "word_embeddings": "embed_tokens",
    "gate.expert_bias": "gate.e_score_correction_bias"}


def golden_oracle() -> Any:
    """An oracle with the golden checkpoint's weights, renamed key by key."""
    oracle, state = make_oracle(golden.CONFIG), {}
    for key, value in golden.checkpoint().items():
        tensor = torch.tensor(value)
        if "query_key_value" in key:
            for name, part in zip("qkv", tensor.split([64, 32, 32]), strict=True):
                state[key.replace("attention.query_key_value", f"self_attn.{name}_proj")] = part
        elif ".experts." not in key:
            for ours, theirs in RENAMED.items():
                key = key.replace(ours, theirs)
            state[key] = tensor
    for index in (1, 2):
        experts = golden.parameters()["layers"][index]["moe"]
        gate, up, down = (torch.tensor(np.asarray(experts[name])) for name in ("gate", "up", "down"))
        prefix = f"model.layers.{index}.mlp.experts."
        state |= {prefix + "gate_up_proj": torch.cat([gate, up], dim=1), prefix + "down_proj": down}
    oracle.load_state_dict(state, strict=True)
    return oracle


def model_of(oracle: Any, config: Llada2MoeConfig) -> Transformer:
    """Our model with the oracle's weights."""
    heads, groups, width, model = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
    state = {name: value.detach().float().numpy() for name, value in oracle.state_dict().items()}

    def layer(index: int) -> dict[str, Any]:
        prefix = f"model.layers.{index}."
        get = lambda name: state[f"{prefix}{name}.weight"]  # noqa: E731
        swiglu = lambda name: {part: get(f"{name}.{part}_proj") for part in ("gate", "up", "down")}  # noqa: E731
        made = {
            "attention_norm": get("input_layernorm"), "mlp_norm": get("post_attention_layernorm"),
            "attention": {
                "query": get("self_attn.q_proj").reshape(heads, width, model),
                "key": get("self_attn.k_proj").reshape(groups, width, model),
                "value": get("self_attn.v_proj").reshape(groups, width, model),
                "output": get("self_attn.o_proj").reshape(model, heads, width),
                "query_norm": get("self_attn.q_norm"), "key_norm": get("self_attn.k_norm")},
        }
        if index < config.num_dense_layers:
            return made | {"mlp": swiglu("mlp")}
        gate, up = np.split(state[f"{prefix}mlp.experts.gate_up_proj"], 2, axis=1)
        return made | {"moe": {
            "router": get("mlp.gate"), "expert_bias": state[f"{prefix}mlp.gate.e_score_correction_bias"],
            "gate": gate, "up": up, "down": state[f"{prefix}mlp.experts.down_proj"],
            "shared": swiglu("mlp.shared_experts")}}

    tree = {
        "embed": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"],
        "head": state["lm_head.weight"], "layers": {i: layer(i) for i in range(config.num_layers)}}
    cast = lambda path, array: jnp.asarray(  # noqa: E731
        array, "float32" if "expert_bias" in jax.tree_util.keystr(path) else config.dtype)
    return nnx.merge(nnx.split(build(config))[0], jax.tree_util.tree_map_with_path(cast, tree))


def ask(oracle: Any, tokens: np.ndarray, block_length: int) -> np.ndarray:
    """Logits under a block-causal mask that the oracle adds to its scores."""
    block = torch.arange(tokens.shape[1]) // block_length
    mask = torch.where(block[:, None] >= block, 0.0, -1e30).to(oracle.dtype)
    mask = mask.expand(tokens.shape[0], 1, -1, -1)
    with torch.no_grad():
        return oracle(torch.tensor(tokens), attention_mask=mask).logits.double().numpy()


@nnx.jit
def _run(model: Transformer, tokens: Any) -> Any:
    where = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    seen = jnp.ones(tokens.shape, bool)
    hidden, _ = model(model.embed_tokens(tokens), positions=where, key_mask=seen, window_start=jnp.int32(0),
                      write=seen, cache=None)
    return model.unembed(hidden)


def logits_of(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(_run(model, jnp.asarray(tokens)), np.float64)


def largest(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest error as a share of the largest value."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def spread(got: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square error as a share of the root mean square."""
    return float(np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean()))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 150, (2, LENGTH))


def test_the_golden_checkpoint(tokens: np.ndarray) -> None:
    oracle = golden_oracle()
    assert largest(logits_of(model_of(oracle, golden.CONFIG), tokens), ask(oracle, tokens, 8)) < 5e-6


@pytest.mark.slow
def test_random_weights_with_sizes_that_no_two_axes_share(tokens: np.ndarray) -> None:
    """Two dense layers, two shared experts, 6 groups of 3, a bias that decides, logits below 1."""
    oracle = make_oracle(SMALL)
    expected = ask(oracle, tokens, SMALL.block_length)
    assert np.abs(expected).max() > 0.1
    got = logits_of(model_of(oracle, SMALL), tokens)
    assert np.abs(got - expected).max() < 5e-6
    without = make_oracle(SMALL)
    for layer in without.model.layers[SMALL.num_dense_layers:]:
        layer.mlp.gate.e_score_correction_bias.zero_()
    assert np.abs(got - ask(without, tokens, SMALL.block_length)).max() > 1e-3


def test_one_expert_a_token_keeps_its_own_weight(tokens: np.ndarray) -> None:
    config = dataclasses.replace(SMALL, experts_per_token=1)
    oracle = make_oracle(config)
    got = logits_of(model_of(oracle, config), tokens)
    assert np.abs(got - ask(oracle, tokens, config.block_length)).max() < 5e-6
    for layer in oracle.model.layers[config.num_dense_layers:]:
        layer.mlp.gate.norm_topk_prob = True
    assert np.abs(got - ask(oracle, tokens, config.block_length)).max() > 1e-3


@pytest.mark.slow
def test_what_would_be_wrong_is_seen(tokens: np.ndarray) -> None:
    """The oracle tells apart the mistakes that ports make."""
    ours = logits_of(model_of(golden_oracle(), golden.CONFIG), tokens)
    for block_length in (LENGTH, 1, 4):  # bidirectional, causal, blocks of another length
        assert largest(ours, ask(golden_oracle(), tokens, block_length)) > 1e-2
    plain, scale, all_groups = golden_oracle(), golden_oracle(), golden_oracle()
    for number in (1, 2):
        plain.model.layers[number].mlp.gate.norm_topk_prob = False
        scale.model.layers[number].mlp.gate.routed_scaling_factor = 1.0
        all_groups.model.layers[number].mlp.gate.topk_group = 4
    for wrong in (plain, scale, all_groups):
        assert largest(ours, ask(wrong, tokens, 8)) > 1e-2


@pytest.mark.slow
def test_bfloat16_is_as_near_as_bfloat16_gets(tokens: np.ndarray) -> None:
    """Against the same rounded weights in float64; transformers' own bfloat16 is the yardstick."""
    rounded, exact = make_oracle(SMALL).bfloat16(), make_oracle(SMALL).bfloat16().double()
    expected = ask(exact, tokens, SMALL.block_length)
    got = logits_of(model_of(rounded, dataclasses.replace(SMALL, dtype="bfloat16")), tokens)
    ours, theirs = spread(got, expected), spread(ask(rounded, tokens, SMALL.block_length), expected)
    assert ours < 1.2 * theirs
    assert ours < 0.05
