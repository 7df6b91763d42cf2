from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import djax
from convert import convert, load_params
from convert.errors import CheckpointError, ConfigError, SourceError
from convert.hf_config import hf_fields, model_config, read_config
from djax.models.config import LLADA_MOE_MASK_ID, LladaMoeConfig
from tests.support.builders import CONFIG, tensors, write

GOLDENS = Path(__file__).parents[1] / "goldens"
PUBLISHED = {
    **CONFIG, "vocab_size": 157184, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "expert_intermediate_size": 1024,
    "max_position_embeddings": 8192, "moe_layer_freq": [1] * 16, "pad_token_id": 156892, "eos_token_id": 156892,
    "torch_dtype": "bfloat16",
}


def test_the_published_configuration() -> None:
    assert model_config(PUBLISHED) == LladaMoeConfig(
        vocab_size=157184, hidden_size=2048, num_layers=16, num_heads=16, num_kv_heads=16, head_dim=128,
        num_experts=64, experts_per_token=8, expert_size=1024, rms_norm_eps=1e-5, rope_theta=50000.0,
        max_positions=8192, mask_id=LLADA_MOE_MASK_ID, eos_id=156892, pad_id=156892, dtype="bfloat16")


def test_the_golden_configuration() -> None:
    config = read_config(GOLDENS / "llada_moe")
    assert (config.vocab_size, config.hidden_size, config.head_dim, config.dtype) == (160, 64, 16, "float32")
    assert config.mask_id is None


@pytest.mark.parametrize(("field", "value", "expected"), [
    ("mask_token_id", 3, 3), ("mask_token_id", None, None), ("mask_token_id", 0, 0)])
def test_the_mask_id_of_the_file_goes_first(field: str, value: Any, expected: int | None) -> None:
    assert model_config({**CONFIG, field: value}).mask_id == expected


def test_what_may_be_absent() -> None:
    fields = {key: value for key, value in CONFIG.items()
              if key not in ("num_key_value_heads", "pad_token_id", "torch_dtype", "rope_scaling", "hidden_act",
                             "moe_layer_freq", "tie_word_embeddings", "norm_topk_prob")}
    config = model_config(fields)
    assert (config.num_kv_heads, config.pad_id, config.dtype) == (4, 20, "bfloat16")
    assert model_config({**CONFIG, "norm_topk_prob": True}) == model_config(CONFIG)
    assert model_config({**CONFIG, "eos_token_id": [20]}) == model_config(CONFIG)


@pytest.mark.parametrize("changes", [
    {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 50000}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 1}},
    {"rope_scaling": {"type": "default"}}, {"rope_scaling": {"rope_type": "default"}},
    {"torch_dtype": "torch.float32"}, {"torch_dtype": None, "dtype": "float32"}, {"eos_token_id": [20, 20]}], ids=str)
def test_other_spellings_of_the_same(changes: dict[str, Any]) -> None:
    assert model_config({**CONFIG, **changes}) == model_config(CONFIG)


def test_auto_leaves_the_dtype_to_the_tensors(tmp_path: Path) -> None:
    assert model_config({**CONFIG, "torch_dtype": "auto"}).dtype == "bfloat16"
    directory = write(tmp_path, tensors(dtype="float16"), config={**CONFIG, "torch_dtype": "auto"})
    assert load_params(directory)[0].dtype == "float16"


@pytest.mark.slow
def test_several_tokens_end_a_sequence(tmp_path: Path) -> None:
    """A list in config.json, and those of generation_config.json, which chat models have alone."""
    several = model_config({**CONFIG, "eos_token_id": [20, 3]})
    assert (several.eos_id, several.other_eos_ids, several.pad_id) == (20, (3,), 20)
    assert model_config(hf_fields(several)) == several
    directory = write(tmp_path / "source", tensors(), config={**CONFIG, "eos_token_id": 20})
    (directory / "generation_config.json").write_bytes(b'\xef\xbb\xbf{"eos_token_id": [3, 20, 7]}')
    config = read_config(directory)
    assert (config.eos_id, config.other_eos_ids) == (20, (3, 7))
    converted = convert(directory, tmp_path / "converted")
    assert load_params(converted)[0].other_eos_ids == (3, 7)
    lm = djax.load(converted, mask_id=23)
    call = {"max_new_tokens": 8, "block_length": 8}
    free = lm.generate([[1, 2]], stop_on_eos=False, eos_id=0, **call).canvas[0][-8:]
    ending = djax.DiffusionLM(dataclasses.replace(lm.config, eos_id=21, other_eos_ids=(int(free[3]),)), lm.params)
    ended = ending.generate([[1, 2]], **call)
    assert ended.stop_reason == ["eos"]
    assert ended.tokens[0].tolist() == free[:list(free).index(free[3]) + 1].tolist()
    assert djax.load(converted, mask_id=23, eos_id=5).config.other_eos_ids == ()


@pytest.mark.parametrize(("changes", "field"), [
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_parameters"),
    ({"rope_parameters": {"rope_theta": 50000}}, "rope_parameters"), ({"rope_parameters": 3}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "default", "factor": 2}}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta"),
    ({"rope_theta": "50000"}, "rope_theta"), ({"rope_theta": None}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"torch_dtype": "torch.int8"}, "torch_dtype")], ids=str)
def test_other_kinds_of_it_are_refused(changes: dict[str, Any], field: str) -> None:
    fields = {**CONFIG, **changes}
    if field == "partial_rotary_factor":
        del fields["partial_rotary_factor"]
    with pytest.raises(ConfigError) as caught:
        model_config(fields)
    assert caught.value.key == field


@pytest.mark.parametrize(("names", "words"), [
    (["config.json", "adapter_config.json", "adapter_model.safetensors"], "adapter"),
    (["adapter_model.bin"], "adapter"), (["model.gguf"], "GGUF"), (["tokenizer.json"], "tokenizer and no model"),
    (["_METADATA"], "Orbax")])
def test_what_holds_no_model_is_called_what_it_is(names: list[str], words: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(SourceError, match=words):
        djax.load(tmp_path)


@pytest.mark.parametrize(("field", "value"), [
    ("rope_scaling", {"type": "linear", "factor": 2.0}), ("attention_bias", True), ("tie_word_embeddings", True),
    ("moe_router_score_function", "sigmoid"), ("shared_expert_intermediate_size", 64), ("clip_qkv", 8.0),
    ("partial_rotary_factor", 0.5), ("hidden_act", "gelu"), ("qk_layernorm", False),
    ("moe_router_enable_expert_bias", True), ("routed_scaling_factor", 2.5), ("moe_layer_freq", [0, 1]),
    ("quantization_config", {"bits": 4}), ("attention_bias", 0), ("partial_rotary_factor", True),
    ("vocab_size", 0), ("vocab_size", 2.0), ("vocab_size", True), ("vocab_size", "24"), ("vocab_size", 2**40),
    ("vocab_size", None), ("num_hidden_layers", 10**6), ("num_experts", 10**9), ("num_attention_heads", 3),
    ("head_dim", 3),
    ("num_key_value_heads", 3), ("num_experts_per_tok", 5), ("rms_norm_eps", 0), ("rms_norm_eps", "1e-5"),
    ("rope_theta", True), ("rope_theta", 1e300), ("eos_token_id", 24), ("eos_token_id", [1, 24]), ("eos_token_id", []),
    ("eos_token_id", None), ("pad_token_id", -1), ("mask_token_id", 24), ("mask_token_id", True),
    ("torch_dtype", "int8"), ("torch_dtype", 16), ("model_type", "llama"), ("model_type", None),
    ("head_dim", 0)])
def test_what_is_refused_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        model_config({**CONFIG, field: value}, file=Path("config.json"))
    assert caught.value.file == "config.json"
    assert caught.value.key == field


@pytest.mark.parametrize(
    "field", ["vocab_size", "rope_theta", "eos_token_id", "expert_intermediate_size", "model_type"])
def test_a_field_that_is_missing(field: str) -> None:
    with pytest.raises(ConfigError, match="got nothing"):
        model_config({key: value for key, value in CONFIG.items() if key != field})


def test_dense_llada_is_told_apart() -> None:
    with pytest.raises(ConfigError, match="num_experts"):
        model_config({"model_type": "llada", "d_model": 4096, "n_layers": 32})


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 2}',
                                  "version https://git-lfs.github.com/spec/v1\n", "\x00"])
def test_a_broken_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path)
    assert caught.value.file == str(tmp_path / "config.json")


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be opened"):
        read_config(tmp_path)


@pytest.mark.parametrize("change", [{}, {"mask_id": 5}, {"dtype": "float16"}, {"rope_theta": 1e6, "head_dim": 8}])
def test_fields_round_trip(change: dict[str, Any]) -> None:
    config = dataclasses.replace(model_config(CONFIG), **change)
    assert model_config(json.loads(json.dumps(hf_fields(config)))) == config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=3)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.dictionaries(st.sampled_from(sorted(CONFIG)), JSON, min_size=1, max_size=3))
def test_any_json_gives_a_configuration_or_one_typed_error(changes: dict[str, Any]) -> None:
    try:
        config = model_config({**CONFIG, **changes}, file=Path("config.json"))
    except CheckpointError as error:
        assert error.file == "config.json"  # noqa: PT017
    else:
        assert isinstance(config, LladaMoeConfig)
        assert type(config.vocab_size) is int
