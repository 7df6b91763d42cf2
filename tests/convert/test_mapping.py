from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.errors import MappingError, MissingKeyError, TensorDtypeError, TensorShapeError, UnexpectedKeyError
from convert.families import llada_moe
from convert.mapping import Rule, Table, fill
from tests.support import builders

TABLE = llada_moe.FAMILY.table
FILE, SOURCE = Path("part.safetensors"), Path("directory")


@dataclasses.dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]
    dtype: str = "F32"
    file: Path = FILE


STORED = builders.tensors()
EXPECTED = builders.parameters(STORED)
LEAVES = {name: value.shape for name, value in EXPECTED.items()}
EXPERT_WISE = {key: Tensor(value.shape) for key, value in STORED.items()}
FUSED = {key: Tensor(value.shape) for key, value in builders.fused(STORED).items()}


def filled_by(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Carry out a filling with plain NumPy."""
    mapped = fill(TABLE, {key: Tensor(value.shape) for key, value in stored.items()}, LEAVES, source=SOURCE)
    result = {}
    for name, pieces in mapped.items():
        leaf = np.full(LEAVES[name], np.nan, np.float32)
        for piece in pieces:
            target = leaf if piece.index is None else leaf[piece.index]
            assert np.isnan(target).all()
            target[...] = stored[piece.key].reshape(-1)[piece.start : piece.start + target.size].reshape(target.shape)
        result[name] = leaf
    return result


@pytest.mark.parametrize("layout", ["expert-wise", "fused"])
def test_every_parameter_is_what_the_layout_says(layout: str) -> None:
    filled = filled_by(STORED if layout == "expert-wise" else builders.fused(STORED))
    assert set(filled) == set(EXPECTED)
    for name, value in EXPECTED.items():
        np.testing.assert_array_equal(filled[name], value, err_msg=name)


@pytest.mark.parametrize("tensors", [EXPERT_WISE, FUSED], ids=["expert-wise", "fused"])
def test_every_element_is_used_once(tensors: dict[str, Tensor]) -> None:
    used = {key: np.zeros(int(np.prod(tensor.shape)), int) for key, tensor in tensors.items()}
    for name, pieces in fill(TABLE, tensors, LEAVES, source=SOURCE).items():
        for piece in pieces:
            size = int(np.prod(LEAVES[name] if piece.index is None else LEAVES[name][1:]))
            used[piece.key][piece.start : piece.start + size] += 1
    assert all((count == 1).all() for count in used.values())


@settings(max_examples=60, deadline=None)
@given(dropped=st.sets(st.sampled_from(sorted(EXPERT_WISE)), min_size=1, max_size=5))
def test_missing_keys_are_counted_and_named(dropped: set[str]) -> None:
    kept = {key: tensor for key, tensor in EXPERT_WISE.items() if key not in dropped}
    with pytest.raises(MissingKeyError) as caught:
        fill(TABLE, kept, LEAVES, source=SOURCE)
    assert caught.value.key in dropped
    assert caught.value.file == "directory"
    assert f"missing: {len(dropped)} keys" in str(caught.value)


@pytest.mark.parametrize("key", ["model.layers.1.mlp.w1", "model.layers.0.mlp.w2"])
def test_missing_fused_keys(key: str) -> None:
    with pytest.raises(MissingKeyError):
        fill(TABLE, {name: tensor for name, tensor in FUSED.items() if name != key}, LEAVES, source=SOURCE)


@pytest.mark.parametrize("key", [
    "extra", "model.layers.2.input_layernorm.weight", "model.layers.00.input_layernorm.weight",
    "model.layers.0.mlp.experts.4.up_proj.weight", "model.layers.0.mlp.experts.0.up_proj.bias",
    "model.layers.-1.input_layernorm.weight", "model.layers.9999999999.mlp.w1", "model_norm_weight", "",
    "model.embed_tokens.weight\n", "prefix.model.norm.weight"])
def test_extra_keys_are_named(key: str) -> None:
    with pytest.raises(UnexpectedKeyError) as caught:
        fill(TABLE, {**EXPERT_WISE, key: Tensor((1,), file=Path("other"))}, LEAVES, source=SOURCE)
    assert (caught.value.key, caught.value.file) == (key, "other")


def test_ignored_keys_are_not_extra() -> None:
    key = "model.layers.1.self_attn.rotary_emb.inv_freq"
    assert fill(TABLE, {**EXPERT_WISE, key: Tensor((2,), "I64")}, LEAVES, source=SOURCE) == fill(
        TABLE, EXPERT_WISE, LEAVES, source=SOURCE)


@settings(max_examples=60, deadline=None)
@given(key=st.sampled_from(sorted(EXPERT_WISE) + sorted(FUSED)), axis=st.integers(0, 2), by=st.sampled_from([-1, 1, 7]))
def test_a_wrong_shape_is_named(key: str, axis: int, by: int) -> None:
    tensors = EXPERT_WISE if key in EXPERT_WISE else FUSED
    shape = list(tensors[key].shape)
    shape[axis % len(shape)] += by
    with pytest.raises(TensorShapeError) as caught:
        fill(TABLE, {**tensors, key: Tensor(tuple(shape))}, LEAVES, source=SOURCE)
    assert (caught.value.key, caught.value.file) == (key, str(FILE))


@pytest.mark.parametrize("shape", [(builders.MODEL, builders.HEADS, builders.WIDTH), (256,), (8, 32)])
def test_the_right_number_of_elements_is_not_enough(shape: tuple[int, ...]) -> None:
    key = "model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(TensorShapeError):
        fill(TABLE, {**EXPERT_WISE, key: Tensor(shape)}, LEAVES, source=SOURCE)


@pytest.mark.parametrize("dtype", ["F64", "I8", "F8_E4M3", "BOOL", "U16"])
def test_a_wrong_dtype_is_named(dtype: str) -> None:
    key = "model.layers.1.mlp.gate.weight"
    with pytest.raises(TensorDtypeError, match=dtype) as caught:
        fill(TABLE, {**EXPERT_WISE, key: Tensor(EXPERT_WISE[key].shape, dtype)}, LEAVES, source=SOURCE)
    assert (caught.value.key, caught.value.file) == (key, str(FILE))


def test_both_layouts_at_once_fill_a_parameter_twice() -> None:
    with pytest.raises(MappingError, match="too"):
        fill(TABLE, {**EXPERT_WISE, **FUSED}, LEAVES, source=SOURCE)
    mixed = {key: tensor for key, tensor in EXPERT_WISE.items() if ".layers.1.mlp.experts." not in key}
    mixed |= {key: tensor for key, tensor in FUSED.items() if ".layers.1.mlp.w" in key}
    fill(TABLE, mixed, LEAVES, source=SOURCE)  # one layout per layer is exact, and so accepted


def test_a_table_that_leaves_elements_unused_is_caught() -> None:
    table = Table(rules=(Rule(key="w1", leaf="gate", part=(0, 2)),))
    with pytest.raises(MappingError, match="12 of its 24"):
        fill(table, {"w1": Tensor((2, 6, 2))}, {"gate": (2, 3, 2)}, source=SOURCE)


def test_a_count_beyond_all_reason_costs_no_memory() -> None:
    leaves = {**LEAVES, **{f"layers.{layer}.moe.up": (4096, 8, 16) for layer in range(2)}}
    with pytest.raises((MissingKeyError, TensorShapeError)) as caught:
        fill(TABLE, EXPERT_WISE, leaves, source=SOURCE)
    assert len(str(caught.value)) < 1000
