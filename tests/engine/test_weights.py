"""New weights: accepted whole or refused whole, nothing compiled again, running generations left alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from djax import recipes, rl
from djax.devices.sharding import named_leaves

SHAPE: dict[str, Any] = {
    "max_new_tokens": 8, "block_length": 8, "recipe": recipes.fast_dllm(threshold=0.6)}
PROMPTS = [[9, 17, 10, 6, 13], [7]]


@pytest.fixture
def lm(tiny_lm):
    """The shared object and its programs, with its weights put back."""
    before = tiny_lm.params
    yield tiny_lm
    tiny_lm.params = before


def changed(params: Any) -> Any:
    """Other weights of the same tree."""
    return jax.tree.map(lambda leaf: leaf * 1.1 + 0.01, params)


def values(params: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}


def equal(left: Any, right: Any) -> bool:
    one, other = values(left), values(right)
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("kind", ["state", "dict", "numpy", "wide"])
def test_what_a_trainer_may_hand_over(lm, kind: str) -> None:
    new = changed(lm.params)
    given: Any = {"state": new, "dict": nnx.to_pure_dict(new),
                  "numpy": jax.tree.map(np.asarray, nnx.to_pure_dict(new)),
                  "wide": jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(new))}[kind]
    got = rl.accept(lm.params, given)
    assert jax.tree.structure(got) == jax.tree.structure(lm.params)
    assert equal(got, new)
    for old, leaf in zip(jax.tree.leaves(lm.params), jax.tree.leaves(got), strict=True):
        assert (leaf.dtype, leaf.sharding, leaf.shape) == (old.dtype, old.sharding, old.shape)


def test_float32_masters_are_rounded_to_the_models_dtype() -> None:
    low = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.zeros(2, jnp.int32)}
    got = rl.accept(low, {"a": np.asarray([1.001, 2.0, 3.0], np.float32), "b": np.asarray([4, 5], np.int32)})
    assert got["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(got["a"], np.asarray([1.0, 2.0, 3.0]))
    assert rl.accept(got, low)["b"].tolist() == [0, 0]


def test_nothing_is_compiled_and_the_new_weights_speak(lm) -> None:
    old = lm.generate(PROMPTS, **SHAPE)
    new = changed(lm.params)
    before, lm.params = lm.params, new
    expected = lm.generate(PROMPTS, **SHAPE)
    lm.params = before
    assert (expected.canvas != old.canvas).any()
    count, compiled = lm.compile_count, []
    lm.update_params(nnx.to_pure_dict(new))

    def listen(event: str, duration: float, **_: Any) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        got = lm.generate(PROMPTS, **SHAPE)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    np.testing.assert_array_equal(got.canvas, expected.canvas)
    assert lm.compile_count == count
    assert not compiled, compiled


def test_running_streams_keep_their_weights(lm) -> None:
    expected = lm.generate(PROMPTS, **SHAPE)
    steps = lm.stream(PROMPTS, **SHAPE)
    seen = [next(steps)]
    lm.update_params(changed(lm.params))
    seen += list(steps)
    assert len(seen) > 1
    np.testing.assert_array_equal(seen[-1].tokens, expected.canvas)
    assert (lm.generate(PROMPTS, **SHAPE).canvas != expected.canvas).any()


def test_arrays_in_place_are_shared_unless_copied(lm) -> None:
    new = changed(lm.params)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(new)]
    shared, copied = rl.accept(lm.params, new), rl.accept(lm.params, new, copy=True)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(shared)] == pointers
    assert not {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(copied)} & set(pointers)


def test_numpy_arrays_are_never_shared() -> None:
    """At an address that CPU devices could use in place: what the trainer writes next must not reach the model."""
    room = np.zeros(1024 + 16, np.float32)
    start = -room.ctypes.data % 64 // 4
    mine = room[start : start + 1024]
    mine[:] = 1.0
    for current in (jnp.zeros(1024), jax.device_put(jnp.zeros(1024), jax.devices()[0])):
        got = rl.accept({"a": current}, {"a": mine})["a"]
        mine[:] = 2.0
        np.testing.assert_array_equal(got, np.ones(1024))
        mine[:] = 1.0


class Adapted(nnx.Module):
    """A layer with an adapter, as Tunix's LoRA leaves it."""

    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.ones((2, 3)))
        self.lora_a = nnx.LoRAParam(jnp.zeros((2, 1)))
        self.lora_b = nnx.LoRAParam(jnp.zeros((1, 3)))


def test_filter_types_replace_only_theirs() -> None:
    current = nnx.state(Adapted())
    module = Adapted()
    for _, variable in nnx.to_flat_state(nnx.state(module)):
        variable[...] = variable[...] + 5.0
    whole = nnx.state(module)
    adapters = nnx.state(module, nnx.LoRAParam)
    for given in (adapters, whole, nnx.to_pure_dict(adapters)):
        got = values(rl.accept(current, given, filter_types=(nnx.LoRAParam,)))
        assert (got["lora_a"] == 5.0).all()
        assert (got["lora_b"] == 5.0).all()
        assert (got["weight"] == 1.0).all()
    with pytest.raises(ValueError, match="params: 1 missing, the first is weight"):
        rl.accept(current, adapters)
    with pytest.raises(ValueError, match="params: 1 missing, the first is lora_b"):
        rl.accept(current, {"lora_a": adapters["lora_a"][...]}, filter_types=(nnx.LoRAParam,))
    with pytest.raises(ValueError, match="filter_types: got BatchStat; the model has no parameter of these types"):
        rl.accept(current, whole, filter_types=(nnx.BatchStat,))
    with pytest.raises(ValueError, match="filter_types: the model's weights are a pure dict"):
        rl.accept(nnx.to_pure_dict(current), whole, filter_types=(nnx.LoRAParam,))


def replace(params: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    return {key: replace(inner, name, value) if isinstance(inner, dict) else value if key == name else inner
            for key, inner in params.items()}


def test_what_does_not_fit_is_named_and_nothing_happens(lm) -> None:
    good = nnx.to_pure_dict(lm.params)
    deleted = jnp.zeros_like(good["norm"])
    deleted.delete()
    wrong = [
        ({key: value for key, value in good.items() if key != "norm"}, "params: 1 missing, the first is norm"),
        (good | {"bias": np.zeros(3)}, "params: 1 unknown, the first is bias"),
        ({"weights": good["norm"]}, "missing, the first is embed; 1 unknown, the first is weights"),
        (good | {"norm": np.zeros(3, np.float32)}, r"params: norm: got the shape \(3,\); the model's is"),
        (replace(good, "router", np.zeros(good["layers"][0]["moe"]["router"].shape, np.int32)),
         r"params: layers\.0\.moe\.router: got int32; the model's is float32"),
        (good | {"norm": deleted}, "params: norm: its array has been deleted"),
        (good | {"norm": 1.0}, "params: norm: got a float; allowed a jax or NumPy array"),
        ([1, 2], "params: got a list; allowed an nnx.State"),
    ]
    before = values(lm.params)
    for params, message in wrong:
        with pytest.raises(ValueError, match=message):
            rl.accept(lm.params, params)
    after = values(lm.params)
    assert all((before[name] == after[name]).all() for name in before)
    integers = {"count": jnp.zeros(2, jnp.int32)}
    with pytest.raises(ValueError, match="params: count: got float32; the model's is int32"):
        rl.accept(integers, {"count": np.zeros(2, np.float32)})
