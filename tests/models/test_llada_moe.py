"""LLaDA-MoE against recorded logits and against itself: windows, caches, padding, shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from djax.contracts.cache import KVCache
from djax.models import Kernels, ModelDenoiser, abstract_params, build, init_params, kernels_on, logical_axes
from djax.models.config import LladaMoeConfig
from tests.support import golden

LENGTH = 16
GRAPHDEF = nnx.split(build(golden.CONFIG))[0]
DENOISER = ModelDenoiser(GRAPHDEF)
FULL_SIZE = LladaMoeConfig(
    vocab_size=157184, hidden_size=2048, num_layers=16, num_heads=16, num_kv_heads=16, head_dim=128,
    num_experts=64, experts_per_token=8, expert_size=1024, rms_norm_eps=1e-5, rope_theta=50000.0,
    max_positions=8192, mask_id=156895, eos_id=156892, pad_id=156892)


@jax.jit
def apply(denoiser: ModelDenoiser, params: Any, tokens: Any, *, positions: Any, key_mask: Any, window_start: Any,
          write: Any, cache: Any) -> tuple[Any, Any]:
    inputs = denoiser.embed(params, tokens)
    hidden, cache = denoiser.apply(
        params, inputs, positions=denoiser.prepare_positions(params, positions), key_mask=key_mask,
        window_start=window_start, write=write, cache=cache)
    return denoiser.unembed(params, hidden), cache


def forward(params: Any, tokens: np.ndarray, *, start: int = 0, padding: int | np.ndarray = 0,
            write: Any = True, cache: KVCache | None = None, length: int | None = None,
            denoiser: ModelDenoiser = DENOISER) -> tuple[Any, Any]:
    """Logits of the window `tokens` at `start` of a canvas whose rows begin after `padding` positions."""
    batch, window = tokens.shape
    canvas = np.arange(window if length is None else length)
    padding = np.broadcast_to(padding, (batch,))[:, None]
    positions = np.maximum(np.arange(start, start + window) - padding, 0)
    return apply(
        denoiser, params, jnp.asarray(tokens, jnp.int32), positions=jnp.asarray(positions, jnp.int32),
        key_mask=jnp.asarray(canvas >= padding), window_start=jnp.asarray(start, jnp.int32),
        write=jnp.broadcast_to(jnp.asarray(write), tokens.shape), cache=cache)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return golden.parameters()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 150, (2, LENGTH))


def relative(got: Any, expected: Any) -> float:
    """Largest error as a share of the largest logit."""
    return float(np.abs(np.asarray(got) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


def test_logits_are_the_recorded_ones(params: Any) -> None:
    """The three prompts as one batch, padded on the left; the recording ran them one by one."""
    prompts = golden.prompts()
    padding = np.array([LENGTH - len(prompt) for prompt in prompts])
    batch = np.array([(9,) * gap + prompt for gap, prompt in zip(padding, prompts, strict=True)])
    got, _ = forward(params, batch, padding=padding)
    assert got.dtype == jnp.float32
    for index, gap in enumerate(padding):
        assert relative(got[index, gap:], golden.logits()[f"prompt_{index}"][0]) < 5e-6


def test_the_state_and_its_pure_dict_are_both_parameters(params: Any, tokens: np.ndarray) -> None:
    state = nnx.split(nnx.merge(GRAPHDEF, params))[1]
    assert isinstance(state, nnx.State)
    np.testing.assert_array_equal(forward(state, tokens)[0], forward(params, tokens)[0])


def test_a_full_write_equals_no_cache(params: Any, tokens: np.ndarray) -> None:
    plain, none = forward(params, tokens)
    assert none is None
    cached, cache = forward(params, tokens, cache=DENOISER.init_cache(params, 2, LENGTH), length=LENGTH)
    assert relative(cached, plain) < 1e-6
    assert len(cache.layers) == 2
    assert cache.layers[0].key.shape == (2, LENGTH, 4, 16)


def test_a_window_equals_its_part_of_the_full_forward(params: Any, tokens: np.ndarray) -> None:
    full, cache = forward(params, tokens, cache=DENOISER.init_cache(params, 2, LENGTH), length=LENGTH)
    for start in (0, 5, LENGTH - 6):
        window = tokens[:, start:start + 6]
        got, after = forward(params, window, start=start, cache=cache, length=LENGTH)
        assert relative(got, full[:, start:start + 6]) < 2e-6
        assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), after, cache))) < 1e-4


def test_a_changed_window_is_written_and_only_there(params: Any, tokens: np.ndarray) -> None:
    _, cache = forward(params, tokens, cache=DENOISER.init_cache(params, 2, LENGTH), length=LENGTH)
    changed = (tokens[:, 5:11] + 1) % 150
    write = np.zeros((2, 6), bool)
    write[0, :4] = True
    _, after = forward(params, changed, start=5, write=write, cache=cache, length=LENGTH)
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        differs = np.asarray(old != new).any(axis=(2, 3))
        expected = np.zeros((2, LENGTH), bool)
        expected[0, 5:9] = True
        np.testing.assert_array_equal(differs, expected)


def test_without_write_the_cache_is_untouched_and_the_queries_see_it(params: Any, tokens: np.ndarray) -> None:
    _, cache = forward(params, tokens, cache=DENOISER.init_cache(params, 2, LENGTH), length=LENGTH)
    changed = (tokens[:, 5:11] + 1) % 150
    unwritten, after = forward(params, changed, start=5, write=False, cache=cache, length=LENGTH)
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)
    written, _ = forward(params, changed, start=5, write=True, cache=cache, length=LENGTH)
    assert relative(unwritten, written) > 1e-3


def test_padding_on_the_left_changes_nothing(params: Any, tokens: np.ndarray) -> None:
    alone, _ = forward(params, tokens[:, 6:])
    padded, _ = forward(params, tokens, padding=6)
    assert relative(padded[:, 6:], alone) < 2e-6
    other = tokens.copy()
    other[:, :6] = 7
    np.testing.assert_array_equal(forward(params, other, padding=6)[0][:, 6:], padded[:, 6:])
    ragged, _ = forward(params, tokens, padding=np.array([6, 0]))
    assert relative(ragged[0, 6:], padded[0, 6:]) < 1e-6
    assert relative(ragged[1], forward(params, tokens)[0][1]) < 1e-6


def test_positions_count_from_the_first_real_token(params: Any, tokens: np.ndarray) -> None:
    """A shift of all positions leaves rotary attention alone; a shift of some does not."""
    base = {"key_mask": jnp.ones((2, LENGTH), bool), "window_start": jnp.int32(0),
            "write": jnp.ones((2, LENGTH), bool), "cache": None}
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    plain, _ = apply(DENOISER, params, jnp.asarray(tokens, jnp.int32), positions=positions, **base)
    shifted, _ = apply(DENOISER, params, jnp.asarray(tokens, jnp.int32), positions=positions + 40, **base)
    assert relative(shifted, plain) < 2e-5
    bent = positions.at[:, 8:].add(40)
    bent, _ = apply(DENOISER, params, jnp.asarray(tokens, jnp.int32), positions=bent, **base)
    assert relative(bent, plain) > 1e-2


def test_attention_looks_both_ways(params: Any, tokens: np.ndarray) -> None:
    changed = tokens.copy()
    changed[:, -1] = (changed[:, -1] + 1) % 150
    assert relative(forward(params, changed)[0][:, 0], forward(params, tokens)[0][:, 0]) > 1e-3


@pytest.mark.slow
def test_a_row_without_any_key_is_finite_and_alone(params: Any, tokens: np.ndarray) -> None:
    plain, _ = forward(params, tokens)
    got, _ = forward(params, tokens, padding=np.array([0, LENGTH]))
    assert np.isfinite(np.asarray(got)).all()
    assert relative(got[0], plain[0]) < 1e-6

    def loss(params: Any) -> Any:
        return jnp.sum(forward(params, tokens, padding=np.array([0, LENGTH]))[0] ** 2)

    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    assert all(np.isfinite(np.asarray(g)).all() for g in gradients)
    assert all(np.abs(np.asarray(g)).max() > 0 for g in gradients)


def test_a_nan_stays_in_its_row(params: Any, tokens: np.ndarray) -> None:
    poisoned = params | {"embed": params["embed"].at[3].set(jnp.nan)}
    tokens = np.where(tokens == 3, 4, tokens)
    plain, _ = forward(poisoned, tokens)
    changed = tokens.copy()
    changed[0, 4] = 3
    got, _ = forward(poisoned, changed)
    assert np.isnan(np.asarray(got[0])).all()
    np.testing.assert_array_equal(got[1], plain[1])


@pytest.mark.slow
def test_grouped_heads_share_keys_and_values(tokens: np.ndarray) -> None:
    """Two key/value heads equal four of which each pair is the same."""
    grouped = dataclasses.replace(golden.CONFIG, num_kv_heads=2)
    graphdef, state = init_params(grouped, jax.random.key(1))
    narrow = nnx.to_pure_dict(state)
    wide = jax.tree.map(lambda a: a, narrow)
    for layer in wide["layers"].values():
        for name in ("key", "value"):
            layer["attention"][name] = jnp.repeat(layer["attention"][name], 2, axis=0)
    got, _ = forward(narrow, tokens, denoiser=ModelDenoiser(graphdef))
    assert relative(got, forward(wide, tokens)[0]) < 1e-6
    cache = ModelDenoiser(graphdef).init_cache(narrow, 1, 8)
    assert cache.layers[1].value.shape == (1, 8, 2, 16)


def test_the_cache_has_the_weights_dtype(params: Any) -> None:
    assert DENOISER.init_cache(params, 1, 4).layers[0].key.dtype == jnp.float32
    assert DENOISER.init_cache(golden.parameters("bfloat16"), 1, 4).layers[0].key.dtype == jnp.bfloat16


def test_a_canvas_of_another_length_is_refused(params: Any, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"key_mask: got 20 positions; .*window of 16"):
        forward(params, tokens, length=20)
    with pytest.raises(ValueError, match=r"key_mask: got 16 positions; .*cache's 20"):
        forward(params, tokens, cache=DENOISER.init_cache(params, 2, 20), length=16)


def test_the_expected_embedding_is_the_mean_under_the_softmax(params: Any) -> None:
    logits = np.random.default_rng(0).normal(size=(1, 3, 160)).astype(np.float32) * 4
    wide = np.exp(logits.astype(np.float64))
    expected = wide / wide.sum(-1, keepdims=True) @ np.asarray(params["embed"], np.float64)
    got = DENOISER.expected_embedding(params, jnp.asarray(logits))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    low = DENOISER.expected_embedding(golden.parameters("bfloat16"), jnp.asarray(logits))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(low, np.float32), expected, atol=2e-2)


LAYER = {
    "attention_norm": ((64,), ("embed",)),
    "attention/query": ((4, 16, 64), ("heads", "head_dim", "embed")),
    "attention/key": ((4, 16, 64), ("kv_heads", "head_dim", "embed")),
    "attention/value": ((4, 16, 64), ("kv_heads", "head_dim", "embed")),
    "attention/output": ((64, 4, 16), ("embed", "heads", "head_dim")),
    "attention/query_norm": ((16,), ("head_dim",)),
    "attention/key_norm": ((16,), ("head_dim",)),
    "moe_norm": ((64,), ("embed",)),
    "moe/router": ((8, 64), (None, "embed")),
    "moe/gate": ((8, 32, 64), ("experts", "ffn", "embed")),
    "moe/up": ((8, 32, 64), ("experts", "ffn", "embed")),
    "moe/down": ((8, 64, 32), ("experts", "embed", "ffn")),
}


def test_every_parameter_has_its_place_and_its_axes() -> None:
    expected = {f"layers/{i}/{name}": value for i in range(2) for name, value in LAYER.items()} | {
        "embed": ((160, 64), ("vocab", "embed")), "head": ((160, 64), ("vocab", "embed")),
        "norm": ((64,), ("embed",))}
    got = {"/".join(map(str, path)): (leaf.get_value().shape, leaf.axes)
           for path, leaf in nnx.to_flat_state(abstract_params(golden.CONFIG))}
    assert got == expected
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract_params(golden.CONFIG)))
    axes = logical_axes(golden.CONFIG)
    paired = jax.tree.map(
        lambda axes, leaf: len(axes) == len(leaf.shape), axes,
        nnx.to_pure_dict(abstract_params(golden.CONFIG)), is_leaf=lambda node: isinstance(node, tuple))
    assert all(jax.tree.leaves(paired))
    assert axes["layers"][1]["moe"]["down"] == ("experts", "embed", "ffn")


def test_the_full_size_model_is_built_without_memory() -> None:
    """7.357 billion parameters in bfloat16: 14.71 GB that this machine need not have."""
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_params(FULL_SIZE))]
    assert round(sum(sizes) / 2e9, 3) == 7.357
    assert len(sizes) == 3 + 16 * 12


def test_random_weights_follow_the_key() -> None:
    graphdef, state = init_params(golden.CONFIG, jax.random.key(5))
    assert graphdef == GRAPHDEF
    tree = nnx.to_pure_dict(state)
    assert abs(float(tree["layers"][0]["moe"]["gate"].std()) - 0.02) < 1e-3
    assert abs(float(tree["head"].mean())) < 1e-3
    np.testing.assert_array_equal(tree["layers"][1]["attention"]["key_norm"], np.ones(16))
    again = nnx.to_pure_dict(init_params(golden.CONFIG, jax.random.key(5))[1])
    jax.tree.map(np.testing.assert_array_equal, again, tree)
    other = nnx.to_pure_dict(init_params(golden.CONFIG, jax.random.key(6))[1])
    assert float(abs(other["head"] - tree["head"]).max()) > 0.01
    assert float(abs(tree["layers"][0]["moe"]["gate"] - tree["layers"][1]["moe"]["gate"]).max()) > 0.01


def test_an_unknown_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="config: got a dict; there are models for LladaMoeConfig"):
        build({})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["reference", "xla_dense"])
def test_the_experts_implementation_can_be_named(params: Any, name: str) -> None:
    denoiser = ModelDenoiser(nnx.split(build(golden.CONFIG, kernels=Kernels(moe=name)))[0])
    got, _ = forward(params, np.array([golden.prompts()[2]]), denoiser=denoiser)
    assert relative(got, golden.logits()["prompt_2"]) < 5e-6


def test_kernels_are_checked_where_they_are_named() -> None:
    with pytest.raises(ValueError, match=r"attention: got 'flash'; allowed reference, xla, .* or None"):
        Kernels(attention="flash")
    assert kernels_on(None) == Kernels()
