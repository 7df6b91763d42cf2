from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import convert
from convert.checkpoint import read_manifest
from convert.errors import CheckpointError, DestinationError, OutOfSpaceError, SourceError, TensorShapeError
from djax.devices.sharding import named_leaves
from djax.models import init_params
from tests.support import builders
from tests.support.builders import tree_equal, write

STORED = builders.tensors()
EXPECTED = builders.parameters(STORED)
TOKENIZER = {"tokenizer.json": '{"version": "1.0"}', "tokenizer_config.json": "{}", "chat_template.jinja": "{{ x }}"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write(tmp_path_factory.mktemp("source") / "model", STORED, shards=2)
    for name, text in TOKENIZER.items():
        (directory / name).write_text(text)
    (directory / "README.md").write_text("not a part of it")
    return directory


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert.convert(source, tmp_path_factory.mktemp("converted") / "model")


@pytest.mark.parametrize("dtype", [None, *sorted(builders.DTYPES)])
def test_what_was_converted_is_restored_in_any_dtype(converted: Path, dtype: str | None) -> None:
    config, params = convert.load_params(converted, dtype=dtype)
    assert config.dtype == (dtype or "float32")
    assert config.mask_id is None
    kind = builders.DTYPES[dtype or "float32"]
    tree_equal(params, {name: value.astype(kind) for name, value in EXPECTED.items()})


def test_conversion_in_another_dtype(source: Path, tmp_path: Path) -> None:
    destination = convert.convert(source, tmp_path / "model", dtype="bfloat16")
    config, params = convert.load_params(destination)
    assert config.dtype == "bfloat16"
    rounded = {name: value.astype(builders.DTYPES["bfloat16"]) for name, value in EXPECTED.items()}
    tree_equal(params, rounded)
    again = convert.convert(destination, tmp_path / "again", dtype="float32")
    tree_equal(convert.load_params(again)[1], {name: value.astype(np.float32) for name, value in rounded.items()})
    assert set(read_manifest(again)["source"]["files"]) == {"manifest.json"}


def test_another_library_can_read_the_tree(converted: Path) -> None:
    tree = ocp.StandardCheckpointer().restore(converted / "params")
    np.testing.assert_array_equal(tree["layers"]["1"]["moe"]["gate"], EXPECTED["layers.1.moe.gate"])
    np.testing.assert_array_equal(tree["embed"], EXPECTED["embed"])


def test_the_manifest(source: Path, converted: Path) -> None:
    manifest = json.loads((converted / "manifest.json").read_text())
    assert manifest["parameter_count"] == sum(value.size for value in EXPECTED.values())
    assert manifest["parameters"] == {name: list(EXPECTED[name].shape) for name in manifest["parameters"]}
    assert manifest["dtype"] == "float32"
    assert manifest["source"]["name"] == "model"
    for name in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        data = (source / name).read_bytes()
        assert manifest["source"]["files"][name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    on_disk = {path.relative_to(converted).as_posix() for path in converted.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == on_disk - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256((converted / name).read_bytes()).hexdigest()
    convert.verify(converted)


def test_the_tokenizer_comes_along(source: Path, converted: Path) -> None:
    for name, text in TOKENIZER.items():
        assert (converted / name).read_text() == text
    assert (converted / "config.json").read_text() == (source / "config.json").read_text()
    assert {path.name for path in converted.iterdir()} == {"params", "manifest.json", "config.json", *TOKENIZER}


def test_describe_a_converted_checkpoint(source: Path, converted: Path) -> None:
    described, original = convert.describe(converted), convert.describe(source)
    assert described.config == original.config
    assert {(parameter.name, parameter.shape, parameter.axes) for parameter in described.parameters} == {
        (parameter.name, parameter.shape, parameter.axes) for parameter in original.parameters}
    assert described.nbytes == original.nbytes


def test_trained_parameters_are_saved_without_a_source(tmp_path: Path) -> None:
    config = dataclasses.replace(convert.model_config({**builders.CONFIG, "mask_token_id": 3}), dtype="bfloat16")
    _, params = init_params(config, jax.random.key(1))
    directory = convert.save(tmp_path / "model", params, config=config)
    found, restored = convert.load_params(directory)
    assert found == config
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    tree_equal(restored, {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()})
    assert convert.read_config(directory) == config


def test_an_existing_destination_is_left_alone(source: Path, tmp_path: Path) -> None:
    destination = convert.convert(source, tmp_path / "model")
    before = (destination / "manifest.json").stat()
    with pytest.raises(DestinationError, match="--force"):
        convert.convert(source, destination)
    assert (destination / "manifest.json").stat() == before
    convert.convert(source, destination, dtype="float16", overwrite=True)
    assert convert.load_params(destination)[0].dtype == "float16"
    assert os.listdir(tmp_path) == ["model"]


def test_only_a_checkpoint_is_ever_overwritten(source: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(DestinationError, match="not a converted checkpoint"):
        convert.convert(source, precious, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DestinationError):
        convert.convert(source, tmp_path / "file", overwrite=True)
    assert (precious / "thesis.tex").read_text() == "x"
    assert sorted(os.listdir(tmp_path)) == ["file", "precious"]


def test_an_empty_directory_may_be_filled(source: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    convert.verify(convert.convert(source, tmp_path / "model"))


def test_the_source_is_never_the_destination(converted: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(converted, copy)
    with pytest.raises(DestinationError, match="holds the source"):
        convert.convert(copy, copy, overwrite=True)
    (tmp_path / "link").symlink_to(copy)
    with pytest.raises(DestinationError, match="holds the source"):
        convert.convert(copy, tmp_path / "link", overwrite=True)
    convert.verify(copy)


def test_a_link_is_replaced_at_its_target(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "model")
    convert.convert(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    convert.verify(tmp_path / "elsewhere" / "model")


def test_no_parent(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="parent"):
        convert.convert(source, tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_found_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutOfSpaceError, match="1000 free"):
        convert.convert(source, tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    shutil.copytree(converted, tmp_path / "model")
    return tmp_path / "model"


def _some_data_file(directory: Path) -> Path:
    return max((path for path in (directory / "params").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)


def test_a_missing_or_shortened_file_is_found_on_loading(copy: Path) -> None:
    path = _some_data_file(copy)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(SourceError, match="another size") as caught:
        convert.load_params(copy)
    assert caught.value.file == str(path)
    path.unlink()
    with pytest.raises(SourceError, match="missing"):
        convert.load_params(copy)


def test_a_flipped_bit_is_found_by_its_digest(copy: Path) -> None:
    path = _some_data_file(copy)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(SourceError, match="another content") as caught:
        convert.verify(copy)
    assert caught.value.file == str(path)


@pytest.mark.parametrize("change", [
    {"format": "other"}, {"version": 2}, {"config": 1}, {"parameters": []}, {"dtype": "int8"}, {"dtype": 1},
    {"files": None}, {"files": {"../x": {"bytes": 1, "sha256": ""}}}, {"files": {"/etc/passwd": {"bytes": 1}}},
    {"files": {"config.json": 3}}, {"config": {"model_type": "other"}}])
def test_a_damaged_manifest_is_one_typed_error(copy: Path, change: dict[str, Any]) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError) as caught:
        convert.load_params(copy)
    assert caught.value.file == str(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "djax-checkpoint"}'])
def test_a_manifest_that_is_not_one(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(SourceError):
        convert.load_params(copy)


def test_another_configuration_is_refused(converted: Path) -> None:
    config = convert.read_config(converted)
    with pytest.raises(TensorShapeError) as caught:
        convert.load_params(converted, dataclasses.replace(config, vocab_size=32))
    assert caught.value.key in ("embed", "head")
    for layers in (1, 3, 512):
        with pytest.raises(CheckpointError):
            convert.load_params(converted, dataclasses.replace(config, num_layers=layers))
