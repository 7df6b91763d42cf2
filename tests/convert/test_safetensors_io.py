from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from convert.errors import CheckpointError, HeaderError, IndexFileError, SourceError
from convert.safetensors_io import SafetensorsReader, parse_header, read_index
from tests.support import builders
from tests.support.builders import entry, raw_file

GOOD = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 8, 12)}
HUGE = 2**64 - 1

BAD: dict[str, tuple[bytes, str | None]] = {
    # name: (the file, the key that the error names)
    "empty": (b"", None),
    "three bytes": (b"abc", None),
    "length 0xff": (b"\xff" * 8 + b"{}", None),
    "length 0xff only": (b"\xff" * 16, None),
    "length past the end": (raw_file(b"{}", length=100), None),
    "length above the cap": (raw_file(b"{}", length=17 * 2**20), None),
    "header cut in the middle": (raw_file(json.dumps(GOOD).encode()[:40]), None),
    "not JSON": (raw_file(b"{nonsense}"), None),
    "not UTF-8": (raw_file(b'{"\xff\xfe": 1}'), None),
    "a list": (raw_file(b"[1, 2]"), None),
    "spaces first": (raw_file(b"  " + json.dumps(GOOD).encode(), b"\0" * 12), None),
    "nested too deeply": (raw_file(b'{"a":' + b"[" * 200_000), None),
    "an integer of 10,000 digits": (raw_file(b'{"a":' + b"9" * 10_000 + b"}"), None),
    "NaN": (raw_file(b'{"a": NaN}'), None),
    "key twice": (raw_file(b'{"a": %s, "a": %s}' % ((json.dumps(GOOD["a"]).encode(),) * 2), b"\0" * 8), None),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4939116424\n", None),
    "entry is a list": (raw_file({"a": [1, 2]}), "a"),
    "no dtype": (raw_file({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4), "a"),
    "no shape": (raw_file({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4), "a"),
    "no offsets": (raw_file({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4), "a"),
    "unknown dtype": (raw_file({"a": entry("F33", [1], 0, 4)}, b"\0" * 4), "a"),
    "dtype is a number": (raw_file({"a": entry(32, [1], 0, 4)}, b"\0" * 4), "a"),
    "negative size": (raw_file({"a": entry("F32", [-1], 0, 4)}, b"\0" * 4), "a"),
    "size is a float": (raw_file({"a": entry("F32", [1.0], 0, 4)}, b"\0" * 4), "a"),
    "size is true": (raw_file({"a": entry("F32", [True], 0, 4)}, b"\0" * 4), "a"),
    "shape is a number": (raw_file({"a": entry("F32", 1, 0, 4)}, b"\0" * 4), "a"),
    "shape overflows 64 bits": (raw_file({"a": entry("F32", [2**33, 2**33], 0, 4)}, b"\0" * 4), "a"),
    "shape overflows to 0": (raw_file({"a": entry("F32", [2**32, 2**32], 0, 0)}), "a"),
    "shape overflows to the right size": (raw_file({"a": entry("F32", [2**62 + 1], 0, 4)}, b"\0" * 4), "a"),
    "shape of 1e5 large axes": (raw_file({"a": entry("F32", [HUGE] * 100_000, 0, 4)}, b"\0" * 4), "a"),
    "offset of 2**64 - 1": (raw_file({"a": entry("F32", [1], HUGE - 4, HUGE)}, b"\0" * 4), "a"),
    "offset is negative": (raw_file({"a": entry("F32", [1], -4, 0)}, b"\0" * 4), "a"),
    "offset is a string": (raw_file({"a": entry("F32", [1], "0", 4)}, b"\0" * 4), "a"),
    "three offsets": (raw_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"\0" * 8), "a"),
    "offsets reversed": (raw_file({"a": entry("F32", [1], 4, 0)}, b"\0" * 4), "a"),
    "range longer than the shape": (raw_file({"a": entry("F32", [1], 0, 8)}, b"\0" * 8), "a"),
    "range past the end": (raw_file({"a": entry("F32", [2], 0, 8)}, b"\0" * 7), "a"),
    "overlap": (raw_file({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, b"\0" * 12), "b"),
    "same range twice": (raw_file({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, b"\0" * 8), "b"),
    "hole at the start": (raw_file({"a": entry("F32", [1], 4, 8)}, b"\0" * 8), "a"),
    "hole in the middle": (raw_file({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, b"\0" * 12), "b"),
    "trailing byte": (raw_file(GOOD, b"\0" * 13), "b"),
    "data without tensors": (raw_file(b"{}", b"\0"), None),
    "metadata is a list": (raw_file({"__metadata__": [], **GOOD}, b"\0" * 12), "__metadata__"),
    "metadata holds a number": (raw_file({"__metadata__": {"a": 1}, **GOOD}, b"\0" * 12), "__metadata__"),
}


def parse(path: Path) -> dict[str, object]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return dict(parse_header(descriptor, path))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_is_one_typed_error_that_names_the_file_and_the_key(name: str, tmp_path: Path) -> None:
    data, key = BAD[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError) as caught:
            parse(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.file == str(path)
    assert str(path) in str(caught.value)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 600
    assert peak < 8 * len(data) + 2**20


def test_the_library_refuses_what_we_refuse_or_we_are_stricter_on_purpose(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    accepted = set()
    for name, (data, _) in BAD.items():
        path.write_bytes(data)
        try:
            with safe_open(path, "numpy"):
                accepted.add(name)
        except SafetensorError:
            pass
    assert accepted <= {"key twice", "spaces first"}  # the format forbids both


def test_a_lfs_pointer_comes_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD["git-lfs pointer"][0])
    with pytest.raises(HeaderError, match="git lfs pull"):
        parse(path)


@pytest.mark.parametrize("part", range(64))
def test_truncated_at_every_64th(part: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    data = save(builders.tensors())
    path.write_bytes(data[: len(data) * part // 64])
    with pytest.raises(HeaderError) as caught:
        parse(path)
    assert caught.value.file == str(path)


def test_a_header_that_fills_the_disk_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(raw_file(b"{", length=2**35))
        file.truncate(2**36)  # sparse: 64 GiB that take no disk
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError):
            parse(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


NUMPY_DTYPES = [np.float32, np.float16, np.int64, np.uint8, np.bool_]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), count=st.integers(0, 6), seed=st.integers(0, 2**31))
def test_what_the_library_writes_is_read_back(data: st.DataObject, count: int, seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    stored = {}
    for index in range(count):
        shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=4)))
        dtype = data.draw(st.sampled_from(NUMPY_DTYPES))
        key = data.draw(st.text(max_size=8)) + str(index)
        stored[key] = rng.integers(0, 2, shape).astype(dtype)
    (tmp_path / "model.safetensors").write_bytes(save(stored, metadata={"format": "np"}))
    with SafetensorsReader(tmp_path) as reader:
        assert {key: tensor.shape for key, tensor in reader.tensors.items()} == {
            key: value.shape for key, value in stored.items()}
        for key, value in stored.items():
            out = np.empty_like(value)
            reader.read_into(key, 0, out)
            np.testing.assert_array_equal(out, value)
            flat = value.reshape(-1)
            start = data.draw(st.integers(0, flat.size))
            part = np.empty(flat.size - start, value.dtype)
            reader.read_into(key, start, part)
            np.testing.assert_array_equal(part, flat[start:])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4),
       cut=st.integers(0, 3))
def test_a_damaged_file_raises_nothing_else(edits: list[tuple[int, int]], cut: int, tmp_path: Path) -> None:
    data = bytearray(raw_file({**GOOD, "c": entry("BF16", [2, 3], 12, 24)}, b"\1" * 24))
    for position, value in edits:
        data[position % len(data)] = value
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(data[: len(data) - cut]))
    try:
        found = parse(path)
    except HeaderError as error:
        assert error.file == str(path)  # noqa: PT017
    else:
        with safe_open(path, "numpy") as file:
            assert set(file.keys()) == set(found)


BAD_NAMES = ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b.safetensors", "C:x.safetensors",
             "model.bin", "", "a\0.safetensors", "a\n.safetensors", 3, None, ["model.safetensors"]]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_the_index_only_names_plain_files(name: object, tmp_path: Path) -> None:
    builders.write_index(tmp_path, {"fine": "model-1.safetensors", "the.key": name})
    path = tmp_path / "model.safetensors.index.json"
    with pytest.raises(IndexFileError) as caught:
        read_index(path)
    assert (caught.value.file, caught.value.key) == (str(path), "the.key")


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": "x.safetensors"',
    '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
    "version https://git-lfs.github.com/spec/v1\n"])
def test_a_bad_index(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(IndexFileError) as caught:
        read_index(path)
    assert caught.value.file == str(path)


def test_an_index_above_the_cap_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    with path.open("wb") as file:
        file.truncate(2**36)
    with pytest.raises(SourceError, match="larger than"):
        read_index(path)


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="not a regular file"):
        SafetensorsReader(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(SourceError, match="not a regular file"):
        SafetensorsReader(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = builders.write(tmp_path, builders.tensors()) / "model.safetensors"
    with SafetensorsReader(tmp_path) as reader:
        os.truncate(path, 4096)
        last = list(reader.tensors)[-1]
        with pytest.raises(CheckpointError, match="ended") as caught:
            reader.read_into(last, 0, np.empty(reader.tensors[last].shape, np.float32))
    assert caught.value.key == last


def test_files_are_closed_when_a_later_shard_is_bad(tmp_path: Path) -> None:
    builders.write(tmp_path, builders.tensors(), shards=3)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(HeaderError):
            SafetensorsReader(tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
