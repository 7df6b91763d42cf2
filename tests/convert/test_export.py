"""Parameters back to the published layout, and read again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import convert
from convert.errors import DestinationError
from tests.support import builders
from tests.support.builders import tree_equal, write

STORED = builders.tensors()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write(tmp_path_factory.mktemp("source") / "model", STORED, shards=2)
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.mark.parametrize("dtype", sorted(builders.DTYPES))
def test_tensors_come_back_under_their_keys(source: Path, dtype: str, tmp_path: Path) -> None:
    config, params = convert.load_params(source, dtype=dtype)
    written = convert.export(tmp_path / "out", params, config=config, text_files=source)
    assert sorted(path.name for path in written.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    tensors = load_file(written / "model.safetensors")
    assert tensors.keys() == STORED.keys()
    for key, value in STORED.items():
        np.testing.assert_array_equal(tensors[key], value.astype(builders.DTYPES[dtype]), err_msg=key)


def test_files_of_bounded_size_have_an_index(source: Path, tmp_path: Path) -> None:
    config, params = convert.load_params(source)
    written = convert.export(tmp_path / "out", params, config=config, largest_file=4000)
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == STORED.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in STORED.values())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    for name in names:
        assert sum(value.nbytes for value in load_file(written / name).values()) <= 4000
    again_config, again = convert.load_params(written)
    assert again_config == config
    tree_equal(again, builders.parameters(STORED))


def test_nothing_is_overwritten_unasked(source: Path, tmp_path: Path) -> None:
    config, params = convert.load_params(source)
    written = convert.export(tmp_path / "out", params, config=config)
    with pytest.raises(DestinationError, match="exists already"):
        convert.export(written, params, config=config)
    assert convert.export(written, params, config=config, overwrite=True) == written
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(DestinationError, match=r"has no config\.json"):
        convert.export(tmp_path / "other", params, config=config, overwrite=True)
    with pytest.raises(DestinationError, match="parent directory does not exist"):
        convert.export(tmp_path / "no" / "out", params, config=config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
