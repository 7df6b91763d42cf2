"""LLaDA2 against itself: blocks, windows, caches, padding, router, shapes. Its logits: test_llada2_transformers.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from djax.models import Kernels, ModelDenoiser, abstract_params, build, init_params, logical_axes
from djax.models.config import Llada2MoeConfig
from djax.models.layers.moe import GroupedSigmoid
from djax.models.layers.trunk import Transformer
from tests.support import golden_llada2 as golden

LENGTH, BLOCK = 24, 8
GRAPHDEF = nnx.split(build(golden.CONFIG))[0]
DENOISER = ModelDenoiser(GRAPHDEF)
MINI = Llada2MoeConfig(
    vocab_size=157184, hidden_size=2048, num_layers=20, num_dense_layers=1, dense_size=5120, num_heads=16,
    num_kv_heads=4, head_dim=128, rotary_dim=64, num_experts=256, experts_per_token=8, expert_size=512,
    num_shared_experts=1, num_groups=8, groups_per_token=4, routed_scaling_factor=2.5, rms_norm_eps=1e-6,
    rope_theta=600000.0, max_positions=32768, mask_id=156895, eos_id=156892, pad_id=156892)
FLASH = dataclasses.replace(
    MINI, hidden_size=4096, num_layers=32, dense_size=9216, num_heads=32, expert_size=1024)


@jax.jit
def apply(denoiser: ModelDenoiser, params: Any, tokens: Any, *, positions: Any, key_mask: Any, window_start: Any,
          write: Any, cache: Any) -> tuple[Any, Any]:
    hidden, cache = denoiser.apply(
        params, denoiser.embed(params, tokens), positions=denoiser.prepare_positions(params, positions),
        key_mask=key_mask, window_start=window_start, write=write, cache=cache)
    return denoiser.unembed(params, hidden), cache


def forward(params: Any, tokens: np.ndarray, *, start: int = 0, padding: int | np.ndarray = 0, write: Any = True,
            cache: Any = None, length: int = LENGTH, denoiser: ModelDenoiser = DENOISER) -> tuple[Any, Any]:
    """Logits of the window `tokens` at `start` of a canvas whose rows begin after `padding` positions."""
    batch, window = tokens.shape
    canvas = np.arange(window if cache is None else length)
    padding = np.broadcast_to(padding, (batch,))[:, None]
    positions = np.maximum(np.arange(start, start + window) - padding, 0)
    return apply(
        denoiser, params, jnp.asarray(tokens, jnp.int32), positions=jnp.asarray(positions, jnp.int32),
        key_mask=jnp.asarray(canvas >= padding), window_start=jnp.asarray(start, jnp.int32),
        write=jnp.broadcast_to(jnp.asarray(write), tokens.shape), cache=cache)


def empty(params: Any, batch: int = 2) -> Any:
    return DENOISER.init_cache(params, batch, LENGTH)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return golden.parameters()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 150, (2, LENGTH))


def relative(got: Any, expected: Any) -> float:
    """Largest error as a share of the largest logit."""
    return float(np.abs(np.asarray(got) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


def changed_at(params: Any, tokens: np.ndarray, position: int, **where: Any) -> np.ndarray:
    """Positions of row 0 whose logits change with the token at `position`; row 1 must not."""
    other = tokens.copy()
    other[0, position] = (other[0, position] + 1) % 150
    plain, changed = (np.asarray(forward(params, given, **where)[0]) for given in (tokens, other))
    np.testing.assert_array_equal(plain[1], changed[1])
    return np.nonzero(np.abs(plain[0] - changed[0]).max(-1) > 1e-4)[0]


# --- blocks ---


@pytest.mark.parametrize("cached", [pytest.param(False, id="no cache", marks=pytest.mark.slow),
                                    pytest.param(True, id="cache")])
@pytest.mark.parametrize("padding", [0, 8, 3])
def test_a_position_sees_its_own_block_and_all_before(
    params: Any, tokens: np.ndarray, padding: int, cached: bool
) -> None:
    """Blocks count from the row's first token: a change is seen from the beginning of its block on, and not before."""
    where = {"padding": padding, "cache": empty(params) if cached else None}
    for position in (padding, padding + 7, padding + 10, LENGTH - 1):
        first = padding + (position - padding) // BLOCK * BLOCK
        np.testing.assert_array_equal(changed_at(params, tokens, position, **where), np.arange(first, LENGTH))


def at_the_start(params: Any, tokens: np.ndarray, padding: tuple[int, int]) -> list[np.ndarray]:
    """Logits of each row's tokens behind its padding, moved to the canvas' beginning, padding behind them."""
    moved = np.stack([np.roll(row, -gap) for row, gap in zip(tokens, padding, strict=True)])
    place = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    logits, _ = apply(
        DENOISER, params, jnp.asarray(moved, jnp.int32), positions=place,
        key_mask=place < LENGTH - np.array(padding)[:, None], window_start=jnp.int32(0),
        write=jnp.ones(tokens.shape, bool), cache=None)
    return [np.asarray(row[:LENGTH - gap]) for row, gap in zip(logits, padding, strict=True)]


def test_rows_may_begin_anywhere_without_a_cache(params: Any, tokens: np.ndarray) -> None:
    padding = (5, 2)
    ragged, _ = forward(params, tokens, padding=np.array(padding))
    for row, expected in enumerate(at_the_start(params, tokens, padding)):
        assert relative(ragged[row, padding[row]:], expected) < 2e-6


@pytest.mark.parametrize("padding", [(11, 3), (LENGTH, 3), (7, LENGTH)])
def test_rows_on_one_grid_are_what_they_are_elsewhere_with_a_cache(
    params: Any, tokens: np.ndarray, padding: tuple[int, int]
) -> None:
    """A row may have no token at all, as rows do that fill up a batch."""
    got, _ = forward(params, tokens, padding=np.array(padding), cache=empty(params))
    assert np.isfinite(np.asarray(got)).all()
    for row, expected in enumerate(at_the_start(params, tokens, padding)):
        assert not len(expected) or relative(got[row, padding[row]:], expected) < 2e-6


@pytest.mark.slow
def test_a_mask_for_each_query_says_all(params: Any, tokens: np.ndarray) -> None:
    """Training gives its own: one that sees everything makes the model bidirectional, the blocks' gives it back."""
    model = nnx.merge(GRAPHDEF, params)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    blocks = np.arange(LENGTH) // BLOCK

    @nnx.jit
    def read(model: Transformer, mask: Any) -> Any:
        return model.hidden_and_router(jnp.asarray(tokens), positions=positions, key_mask=mask, remat=False)

    plain, router = read(model, jnp.ones((2, LENGTH), bool))
    given, _ = read(model, jnp.broadcast_to(blocks[:, None] >= blocks, (2, LENGTH, LENGTH)))
    assert relative(given, plain) < 1e-6
    assert relative(read(model, jnp.ones((2, LENGTH, LENGTH), bool))[0], plain) > 1e-2
    assert router.shape == (2, 2, LENGTH, 8)  # the dense layer has none
    logits, _ = forward(params, tokens)
    assert relative(model.unembed(plain), logits) < 1e-6


@pytest.mark.slow
def test_gradients_reach_every_weight_but_the_routers_bias(params: Any, tokens: np.ndarray) -> None:
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))

    def loss(params: Any, remat: bool) -> Any:
        model = nnx.merge(GRAPHDEF, params)
        hidden, router = model.hidden_and_router(
            jnp.asarray(tokens), positions=positions, key_mask=positions >= jnp.array([[0], [5]]), remat=remat)
        return model.log_probs(hidden, jnp.asarray(tokens), vocab_chunk=64).sum() + (router**2).sum()

    gradients = jax.jit(jax.grad(loss), static_argnums=1)(params, True)
    for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        assert np.isfinite(np.asarray(gradient)).all(), path
        assert (np.abs(np.asarray(gradient)).max() > 0) == ("expert_bias" not in jax.tree_util.keystr(path)), path


# --- windows and caches ---


def test_a_window_of_two_blocks_equals_its_part_of_the_full_forward(params: Any, tokens: np.ndarray) -> None:
    plain, none = forward(params, tokens)
    assert none is None
    full, cache = forward(params, tokens, cache=empty(params))
    assert relative(full, plain) < 1e-6
    assert cache.layers[2].value.shape == (2, LENGTH, 2, 16)
    for start in (0, BLOCK):
        window = tokens[:, start:start + 2 * BLOCK]
        got, after = forward(params, window, start=start, cache=cache)
        assert relative(got, full[:, start:start + 2 * BLOCK]) < 2e-6
        assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), after, cache))) < 1e-4


def test_earlier_blocks_keys_do_not_depend_on_later_tokens(params: Any, tokens: np.ndarray) -> None:
    """What makes the cache exact: written once with final tokens, a block's keys stay right."""
    other = tokens.copy()
    other[:, BLOCK:] = 155
    _, early = forward(params, other, cache=empty(params))
    _, late = forward(params, tokens, cache=empty(params))
    for a, b in zip(jax.tree.leaves(early), jax.tree.leaves(late), strict=True):
        np.testing.assert_allclose(a[:, :BLOCK], b[:, :BLOCK], atol=1e-6)
        assert np.abs(np.asarray(a - b))[:, BLOCK:].max() > 1e-2


def test_only_what_is_to_be_written_is(params: Any, tokens: np.ndarray) -> None:
    _, cache = forward(params, tokens, cache=empty(params))
    write = np.zeros((2, BLOCK), bool)
    write[0, :4] = True
    changed = (tokens[:, BLOCK:2 * BLOCK] + 1) % 150
    _, after = forward(params, changed, start=BLOCK, write=write, cache=cache)
    expected = np.zeros((2, LENGTH), bool)
    expected[0, BLOCK:BLOCK + 4] = True
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(old != new).any(axis=(2, 3)), expected)


def test_a_nan_stays_in_its_row(params: Any, tokens: np.ndarray) -> None:
    poisoned = params | {"embed": params["embed"].at[3].set(jnp.nan)}
    tokens = np.where(tokens == 3, 4, tokens)
    plain, _ = forward(poisoned, tokens)
    changed = tokens.copy()
    changed[0, 12] = 3
    got, _ = forward(poisoned, changed)
    assert np.isnan(np.asarray(got[0, BLOCK:])).all()
    np.testing.assert_array_equal(got[1], plain[1])


def test_a_canvas_of_another_length_is_refused(params: Any, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"key_mask: got 20 positions; .*cache's 24"):
        forward(params, tokens, cache=empty(params), length=20)


@pytest.mark.slow
def test_dtypes(params: Any, tokens: np.ndarray) -> None:
    """The router's bias is float32 whatever the weights are, and so are logits."""
    config = dataclasses.replace(golden.CONFIG, dtype="bfloat16")
    denoiser, low = ModelDenoiser(nnx.split(build(config))[0]), golden.parameters("bfloat16")
    logits, _ = forward(low, tokens, denoiser=denoiser)
    assert logits.dtype == jnp.float32
    errors = np.abs(np.asarray(logits) - np.asarray(forward(params, tokens)[0])).max(-1)
    assert np.median(errors) < 1  # of logits near 30; where rounding changes an expert it is more
    assert denoiser.init_cache(low, 1, 4).layers[0].key.dtype == jnp.bfloat16
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(abstract_params(config))}
    assert dtypes == {"bfloat16", "float32"}


@pytest.mark.parametrize("name", ["reference", pytest.param("xla_dense", marks=pytest.mark.slow)])
def test_the_implementations_can_be_named(params: Any, tokens: np.ndarray, name: str) -> None:
    kernels = Kernels(moe=name, attention="reference", unembed="reference")
    denoiser = ModelDenoiser(nnx.split(build(golden.CONFIG, kernels=kernels))[0])
    got, _ = forward(params, tokens, cache=empty(params), denoiser=denoiser)
    assert relative(got, forward(params, tokens)[0]) < 5e-6


# --- the router ---


def choose(logits: np.ndarray, bias: np.ndarray, *, k: int, groups: int, kept: int, scale: float) -> dict[int, float]:
    """Experts of one row and their weights, step by step in float64."""
    scores = [1 / (1 + np.exp(-float(value))) for value in logits]
    biased = [score + float(shift) for score, shift in zip(scores, bias, strict=True)]
    size = len(scores) // groups
    worth = [sum(sorted(biased[g * size:(g + 1) * size])[-2:]) for g in range(groups)]
    best_groups = sorted(range(groups), key=lambda g: -worth[g])[:kept]
    allowed = [e for e in range(len(scores)) if e // size in best_groups]
    chosen = sorted(allowed, key=lambda e: -biased[e])[:k]
    total = sum(scores[e] for e in chosen) if k > 1 else 1.0  # the published code leaves a single weight as it is
    return {e: scale * scores[e] / total for e in chosen}


@pytest.mark.parametrize(("experts", "k", "groups", "kept"), [
    (8, 2, 4, 2), (32, 8, 8, 4), (12, 3, 2, 1), (6, 6, 1, 1), (8, 1, 4, 2)])
def test_routing_is_that_of_a_plain_loop(experts: int, k: int, groups: int, kept: int) -> None:
    rng = np.random.default_rng(experts)
    logits = rng.normal(size=(50, experts)).astype(np.float32) * 2
    bias = rng.normal(size=experts).astype(np.float32)  # far larger than a trained one: half of the sums are negative
    ids, weights = jax.jit(
        GroupedSigmoid(experts_per_token=k, num_groups=groups, groups_per_token=kept, scale=2.5))(logits, bias)
    assert weights.dtype == jnp.float32
    biased = 0
    for row in range(50):
        expected = choose(logits[row], bias, k=k, groups=groups, kept=kept, scale=2.5)
        assert [int(e) for e in ids[row]] == list(expected)
        np.testing.assert_allclose(weights[row], list(expected.values()), rtol=1e-5)
        plain = choose(logits[row], 0 * bias, k=k, groups=groups, kept=kept, scale=2.5)
        biased += set(plain) != set(expected)
    assert biased > 10 or k == experts


def test_of_equal_experts_and_groups_the_first_are_taken() -> None:
    route = GroupedSigmoid(experts_per_token=3, num_groups=4, groups_per_token=2, scale=1.5)
    ids, weights = route(jnp.zeros((1, 8)), jnp.zeros(8))
    assert ids.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(weights, [[0.5, 0.5, 0.5]])


def test_a_row_of_nans_has_experts_and_no_weights() -> None:
    logits = jnp.zeros((2, 8)).at[0].set(jnp.nan)
    route = GroupedSigmoid(experts_per_token=2, num_groups=4, groups_per_token=2, scale=1.0)
    ids, weights = route(logits, jnp.zeros(8))
    assert ((ids >= 0) & (ids < 8)).all()
    assert np.isnan(np.asarray(weights[0])).all()
    np.testing.assert_allclose(weights[1], [0.5, 0.5])


# --- parameters and configurations ---


ATTENTION = {
    "attention_norm": ((64,), ("embed",)),
    "attention/query": ((4, 16, 64), ("heads", "head_dim", "embed")),
    "attention/key": ((2, 16, 64), ("kv_heads", "head_dim", "embed")),
    "attention/value": ((2, 16, 64), ("kv_heads", "head_dim", "embed")),
    "attention/output": ((64, 4, 16), ("embed", "heads", "head_dim")),
    "attention/query_norm": ((16,), ("head_dim",)),
    "attention/key_norm": ((16,), ("head_dim",)),
    "mlp_norm": ((64,), ("embed",)),
}
DENSE = {
    "mlp/gate": ((96, 64), ("ffn", "embed")), "mlp/up": ((96, 64), ("ffn", "embed")),
    "mlp/down": ((64, 96), ("embed", "ffn"))}
SPARSE = {
    "moe/router": ((8, 64), (None, "embed")),
    "moe/expert_bias": ((8,), (None,)),
    "moe/gate": ((8, 32, 64), ("experts", "ffn", "embed")),
    "moe/up": ((8, 32, 64), ("experts", "ffn", "embed")),
    "moe/down": ((8, 64, 32), ("experts", "embed", "ffn")),
    "moe/shared/gate": ((32, 64), ("ffn", "embed")),
    "moe/shared/up": ((32, 64), ("ffn", "embed")),
    "moe/shared/down": ((64, 32), ("embed", "ffn")),
}


def test_every_parameter_has_its_place_and_its_axes() -> None:
    expected = {"embed": ((160, 64), ("vocab", "embed")), "head": ((160, 64), ("vocab", "embed")),
                "norm": ((64,), ("embed",))}
    for index, second in enumerate((DENSE, SPARSE, SPARSE)):
        expected |= {f"layers/{index}/{name}": value for name, value in (ATTENTION | second).items()}
    got = {"/".join(map(str, path)): (leaf.get_value().shape, leaf.axes)
           for path, leaf in nnx.to_flat_state(abstract_params(golden.CONFIG))}
    assert got == expected
    assert logical_axes(golden.CONFIG)["layers"][1]["moe"]["shared"]["down"] == ("embed", "ffn")
    shapes = jax.tree.map(lambda leaf: leaf.shape, golden.parameters())
    assert jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(abstract_params(golden.CONFIG))) == shapes


@pytest.mark.parametrize(("config", "billions"), [
    pytest.param(MINI, 16.256, id="mini"), pytest.param(FLASH, 102.890, id="flash", marks=pytest.mark.slow)])
def test_the_full_size_models_are_built_without_memory(config: Llada2MoeConfig, billions: float) -> None:
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(config))]
    assert round(sum(sizes) / 1e9, 3) == billions
    assert len(sizes) == 3 + 8 * config.num_layers + 3 + 8 * (config.num_layers - 1)


def test_random_weights_follow_the_key() -> None:
    graphdef, state = init_params(golden.CONFIG, jax.random.key(5))
    assert graphdef == GRAPHDEF
    tree = nnx.to_pure_dict(state)
    assert abs(float(tree["layers"][1]["moe"]["gate"].std()) - 0.02) < 1e-3
    np.testing.assert_array_equal(tree["layers"][1]["moe"]["expert_bias"], np.zeros(8))
    other = nnx.to_pure_dict(init_params(golden.CONFIG, jax.random.key(6))[1])
    assert float(abs(other["head"] - tree["head"]).max()) > 0.01


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_groups": 3}, "num_groups: got 3; allowed a divisor of num_experts=8"),
    ({"num_groups": 8, "groups_per_token": 2}, "num_groups: got 8; .* at least 2"),
    ({"groups_per_token": 5}, "groups_per_token: got 5; allowed at most num_groups=4"),
    ({"experts_per_token": 5}, "experts_per_token: got 5; allowed at most 4, the experts of 2 groups"),
    ({"num_dense_layers": 3}, r"num_dense_layers: got 3; allowed a number in \[0, num_layers=3\)"),
    ({"num_dense_layers": -1}, "num_dense_layers: got -1"),
    ({"rotary_dim": 7}, "rotary_dim: got 7; .*half-split RoPE"),
    ({"rotary_dim": 18}, "rotary_dim: got 18; .* at most head_dim=16"),
    ({"num_kv_heads": 3}, "num_kv_heads: got 3; allowed a divisor of num_heads=4"),
    ({"block_length": 0}, "block_length: got 0; allowed an integer of at least 1"),
    ({"num_shared_experts": 0}, "num_shared_experts: got 0"),
    ({"mask_id": 160}, "mask_id: got 160"),
])
def test_wrong_configurations_are_one_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(golden.CONFIG, **changes)
