"""LLaDA2's config.json and keys: fused query_key_value, a dense layer, a float32 bias, shared experts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import convert
from convert.errors import (
    CheckpointError,
    ConfigError,
    MappingError,
    MissingKeyError,
    TensorShapeError,
    UnexpectedKeyError,
)
from convert.families import llada2_moe
from convert.hf_config import hf_fields, model_config
from convert.mapping import Rule, Table, fill
from djax.devices.sharding import named_leaves
from djax.models.config import LLADA2_MOE_MASK_ID, Llada2MoeConfig
from tests.convert.test_mapping import Tensor
from tests.support import golden_llada2 as golden
from tests.support.builders import tree_equal

TABLE = llada2_moe.FAMILY.table
FIELDS: dict[str, Any] = json.loads((golden.GOLDENS / "config.json").read_text())
PUBLISHED = {
    **FIELDS, "vocab_size": 157184, "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "rotary_dim": 64, "intermediate_size": 5120, "num_experts": 256,
    "num_experts_per_tok": 8, "moe_intermediate_size": 512, "n_group": 8, "topk_group": 4, "pad_token_id": 156892,
    "dtype": "bfloat16"}
TENSORS = {key: Tensor(value.shape) for key, value in golden.checkpoint().items()}
LEAVES = {name: tuple(leaf.shape) for name, leaf in named_leaves(golden.parameters()).items()}
QKV = "model.layers.1.attention.query_key_value.weight"


# --- config.json ---


def test_the_published_configuration() -> None:
    assert model_config(PUBLISHED) == Llada2MoeConfig(
        vocab_size=157184, hidden_size=2048, num_layers=20, num_dense_layers=1, dense_size=5120, num_heads=16,
        num_kv_heads=4, head_dim=128, rotary_dim=64, num_experts=256, experts_per_token=8, expert_size=512,
        num_shared_experts=1, num_groups=8, groups_per_token=4, routed_scaling_factor=2.5, rms_norm_eps=1e-6,
        rope_theta=600000.0, max_positions=32768, mask_id=LLADA2_MOE_MASK_ID, eos_id=156892, pad_id=156892,
        block_length=32, dtype="bfloat16")


def test_what_may_be_absent() -> None:
    config = model_config({**FIELDS, "block_length": 8, "mask_token_id": 155})
    assert config == golden.CONFIG
    fewer = {key: value for key, value in FIELDS.items() if key not in (
        "rotary_dim", "dtype", "use_bias", "score_function", "norm_topk_prob", "head_dim", "sliding_window")}
    config = model_config({**fewer, "eos_token_id": 3})
    assert (config.rotary_dim, config.dtype) == (8, "bfloat16")
    assert (config.eos_id, config.pad_id, config.mask_id) == (3, 152, None)
    del fewer["partial_rotary_factor"]
    assert model_config(fewer).rotary_dim == 16


@pytest.mark.parametrize(("field", "value"), [
    ("use_qkv_bias", True), ("use_bias", True), ("norm_topk_prob", False), ("score_function", "softmax"),
    ("rope_scaling", {"type": "yarn"}), ("use_sliding_window", True), ("tie_word_embeddings", True),
    ("moe_router_enable_expert_bias", False), ("router_dtype", "bf16"), ("hidden_act", "gelu"), ("norm_head", True),
    ("partial_rotary_factor", 1), ("partial_rotary_factor", 0), ("partial_rotary_factor", True), ("rotary_dim", 7),
    ("rotary_dim", 32), ("first_k_dense_replace", 3), ("first_k_dense_replace", -1), ("first_k_dense_replace", None),
    ("n_group", 3), ("n_group", 8), ("topk_group", 5), ("num_experts_per_tok", 5), ("num_shared_experts", 0),
    ("num_shared_experts", None), ("moe_intermediate_size", 0), ("moe_shared_expert_intermediate_size", 64),
    ("routed_scaling_factor", 0), ("routed_scaling_factor", "2.5"), ("pad_token_id", None), ("pad_token_id", 160),
    ("eos_token_id", 160), ("block_length", 0), ("num_experts", 10**9), ("num_key_value_heads", 3),
    ("quantization_config", {"bits": 8}), ("intermediate_size", None), ("dtype", "int8")])
def test_what_is_refused_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        model_config({**FIELDS, field: value}, file=Path("config.json"))
    assert caught.value.file == "config.json"
    assert caught.value.key == field or (field, caught.value.key) == ("rotary_dim", "partial_rotary_factor")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{}, {"mask_id": None}, {"block_length": 32, "eos_id": 4}, {"rotary_dim": 16}])
def test_fields_round_trip(change: dict[str, Any]) -> None:
    config = dataclasses.replace(golden.CONFIG, **change)
    assert model_config(json.loads(json.dumps(hf_fields(config)))) == config


JSON = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.lists(
    st.integers(), max_size=2) | st.text(max_size=4)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.dictionaries(st.sampled_from(sorted(FIELDS)), JSON, min_size=1, max_size=3))
def test_any_json_gives_a_configuration_or_one_typed_error(changes: dict[str, Any]) -> None:
    try:
        model_config({**FIELDS, **changes}, file=Path("config.json"))
    except CheckpointError as error:
        assert error.file == "config.json"  # noqa: PT017


# --- keys ---


def test_every_element_is_used_once() -> None:
    used = {key: np.zeros(int(np.prod(tensor.shape)), int) for key, tensor in TENSORS.items()}
    for name, pieces in fill(TABLE, TENSORS, LEAVES, source=Path("source")).items():
        for piece in pieces:
            size = int(np.prod(LEAVES[name] if piece.index is None else LEAVES[name][1:]))
            used[piece.key][piece.start:piece.start + size] += 1
    assert all((count == 1).all() for count in used.values())


@pytest.mark.parametrize("dropped", [
    QKV, "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.gate.expert_bias",
    "model.layers.1.mlp.shared_experts.down_proj.weight", "model.layers.2.mlp.experts.5.gate_proj.weight"])
def test_a_missing_key_is_counted_once_and_named(dropped: str) -> None:
    kept = {key: tensor for key, tensor in TENSORS.items() if key != dropped}
    with pytest.raises(MissingKeyError, match="missing: 1 keys") as caught:
        fill(TABLE, kept, LEAVES, source=Path("source"))
    assert caught.value.key == dropped


@pytest.mark.parametrize("extra", [
    "model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate_proj.weight", "model.layers.1.attention.q_proj.weight",
    "model.layers.3.input_layernorm.weight", "model.layers.1.mlp.experts.8.up_proj.weight",
    "model.embed_tokens.weight"])
def test_a_key_of_another_kind_of_layer_is_unexpected(extra: str) -> None:
    with pytest.raises(UnexpectedKeyError) as caught:
        fill(TABLE, {**TENSORS, extra: Tensor((8, 64))}, LEAVES, source=Path("source"))
    assert caught.value.key == extra


@pytest.mark.parametrize("shape", [(127, 64), (129, 64), (64, 64), (128, 63), (8, 16, 64)])
def test_stacked_rows_must_be_those_of_all_heads(shape: tuple[int, ...]) -> None:
    with pytest.raises(TensorShapeError, match=r"the configuration says \(128, 64\)") as caught:
        fill(TABLE, {**TENSORS, QKV: Tensor(shape)}, LEAVES, source=Path("source"))
    assert caught.value.key == QKV


def test_a_table_that_leaves_stacked_rows_unused_is_caught() -> None:
    table = Table(rules=(Rule(key="w", leaf="a", stacked=True), Rule(key="w", leaf="b")))
    with pytest.raises((TensorShapeError, MappingError)):
        fill(table, {"w": Tensor((5, 2))}, {"a": (2, 2), "b": (3, 2)}, source=Path("source"))


# --- whole checkpoints ---


def expected(dtype: str) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_leaves(golden.parameters(dtype)).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_golden_checkpoint_equals_the_one_read_by_hand(dtype: str) -> None:
    config, params = convert.load_params(golden.GOLDENS, dtype=dtype)
    assert config.dtype == dtype
    tree_equal(params, expected(dtype))


def test_a_checkpoint_in_two_dtypes_as_published(tmp_path: Path) -> None:
    """bfloat16 weights and a float32 bias: the configuration's dtype decides, and no bit changes."""
    import ml_dtypes

    stored = {key: value if "expert_bias" in key else value.astype(ml_dtypes.bfloat16)
              for key, value in golden.checkpoint().items()}
    (tmp_path / "config.json").write_text(json.dumps({**FIELDS, "dtype": "bfloat16"}))
    save_file(stored, tmp_path / "model.safetensors")
    config, params = convert.load_params(tmp_path)
    assert config.dtype == "bfloat16"
    tree_equal(params, expected("bfloat16"))
    written = convert.export(tmp_path / "out", params, config=config)
    again = load_file(written / "model.safetensors")
    assert again.keys() == stored.keys()
    for key, value in stored.items():
        assert again[key].dtype == value.dtype, key
        np.testing.assert_array_equal(again[key], value, err_msg=key)


def test_tensors_come_back_under_their_keys(tmp_path: Path) -> None:
    config, params = convert.load_params(golden.GOLDENS)
    written = convert.export(tmp_path / "out", params, config=config, largest_file=50_000)
    index = json.loads((written / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == golden.checkpoint().keys()
    for name in set(index.values()):
        tensors = load_file(written / name)
        assert sum(value.nbytes for value in tensors.values()) <= 50_000
        for key, value in tensors.items():
            np.testing.assert_array_equal(value, golden.checkpoint()[key], err_msg=key)
    again_config, again = convert.load_params(written)
    assert again_config == config
    tree_equal(again, expected("float32"))


def test_a_converted_checkpoint_is_described_and_restored(tmp_path: Path) -> None:
    converted = convert.convert(golden.GOLDENS, tmp_path / "converted", dtype="bfloat16")
    convert.verify(converted)
    config, params = convert.load_params(converted)
    assert (config.architecture, config.dtype) == ("llada2_moe", "bfloat16")
    tree_equal(params, expected("bfloat16"))
    leaves = expected("bfloat16")
    assert convert.describe(converted).nbytes == sum(leaf.nbytes for leaf in leaves.values())
    by_name = {parameter.name: parameter for parameter in convert.describe(golden.GOLDENS).parameters}
    for name in ("query", "key", "value"):
        assert by_name[f"layers.1.attention.{name}"].keys == (QKV,)
    assert by_name["layers.1.moe.shared.up"].axes == ("ffn", "embed")
