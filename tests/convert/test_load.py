from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import convert
from convert.errors import (
    CheckpointError,
    ConfigError,
    HeaderError,
    IndexFileError,
    MissingKeyError,
    SourceError,
    TensorDtypeError,
    TensorShapeError,
    UnexpectedKeyError,
)
from djax.devices.sharding import named_leaves
from djax.models import build
from tests.support import builders, golden
from tests.support.builders import tree_equal, write

STORED = builders.tensors()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("source") / "model", STORED)


def test_the_golden_checkpoint_equals_the_one_read_by_hand() -> None:
    config, params = convert.load_params(golden.GOLDENS)
    assert config.dtype == "float32"
    expected = {name: np.asarray(value) for name, value in named_leaves(golden.parameters()).items()}
    tree_equal(params, expected)


def test_the_result_is_the_models_state(checkpoint: Path) -> None:
    config, params = convert.load_params(checkpoint)
    graphdef, abstract = nnx.split(build(config))
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    model = nnx.merge(graphdef, params)
    np.testing.assert_array_equal(model.layers[1].moe.router[...], STORED["model.layers.1.mlp.gate.weight"])


@pytest.mark.parametrize("layout", ["expert-wise", "fused"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout_gives_the_same_parameters(layout: str, shards: int, tmp_path: Path) -> None:
    stored = STORED if layout == "expert-wise" else builders.fused(STORED)
    _, params = convert.load_params(write(tmp_path, stored, shards=shards))
    tree_equal(params, builders.parameters(STORED))


@pytest.mark.parametrize("stored", sorted(builders.DTYPES))
@pytest.mark.parametrize("dtype", [None, *sorted(builders.DTYPES)])
def test_dtypes(stored: str, dtype: str | None, tmp_path: Path) -> None:
    values = builders.tensors(dtype=stored)
    config, params = convert.load_params(write(tmp_path, values), dtype=dtype)
    assert config.dtype == (dtype or stored)
    tree_equal(params, {
        name: value.astype(builders.DTYPES[dtype or stored]) for name, value in builders.parameters(values).items()})


def test_a_given_configuration_replaces_the_files(checkpoint: Path, tmp_path: Path) -> None:
    config, _ = convert.load_params(checkpoint, convert.model_config({**builders.CONFIG, "mask_token_id": 7,
                                                                      "torch_dtype": "bfloat16"}))
    assert (config.mask_id, config.dtype) == (7, "bfloat16")
    shutil.copyfile(checkpoint / "model.safetensors", tmp_path / "model.safetensors")
    convert.load_params(tmp_path, config)  # no config.json at all


def test_a_value_that_float16_cannot_hold(tmp_path: Path) -> None:
    values = builders.tensors()
    values["model.layers.1.self_attn.k_proj.weight"][3, 4] = 70000.0
    write(tmp_path, values)
    with pytest.raises(TensorDtypeError, match="largest float16") as caught:
        convert.load_params(tmp_path, dtype="float16")
    assert caught.value.key == "model.layers.1.self_attn.k_proj.weight"
    convert.load_params(tmp_path, dtype="bfloat16")


def test_infinities_and_nans_of_the_source_are_kept(tmp_path: Path) -> None:
    values = builders.tensors()
    values["model.norm.weight"][:3] = [np.inf, -np.inf, np.nan]
    _, params = convert.load_params(write(tmp_path, values), dtype="bfloat16")
    np.testing.assert_array_equal(
        np.asarray(params["norm"][...])[:3].astype(np.float32), np.float32([np.inf, -np.inf, np.nan]))


def test_progress_ends_at_the_total(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert.load_params(checkpoint, progress=lambda done, total: seen.append((done, total)))
    total = sum(value.nbytes for value in STORED.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_unknown_dtype_is_the_callers_error(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="dtype: got 'int8'") as caught:
        convert.load_params(checkpoint, dtype="int8")
    assert not isinstance(caught.value, CheckpointError)


def test_describe_names_the_keys_of_every_parameter(checkpoint: Path, tmp_path: Path) -> None:
    described = convert.describe(checkpoint)
    by_name = {parameter.name: parameter for parameter in described.parameters}
    assert set(by_name) == set(builders.parameters(STORED))
    assert by_name["layers.1.moe.up"].keys == tuple(f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in range(4))
    assert by_name["layers.1.moe.up"].axes == ("experts", "ffn", "embed")
    assert described.nbytes == sum(value.nbytes for value in STORED.values())
    ignored = "model.rotary_emb.inv_freq"
    write(tmp_path, {**STORED, ignored: np.ones(2, np.float32)})
    assert convert.describe(tmp_path).ignored == (ignored,)


# What is broken in a copy of the sharded checkpoint, the error, the file and the key that it names.
FIRST, SECOND = (f"model-0000{shard}-of-00002.safetensors" for shard in (1, 2))
INDEX = "model.safetensors.index.json"
NORM, HEAD = "model.norm.weight", "lm_head.weight"


def _index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
        change(weight_map)
        builders.write_index(directory, weight_map)
    return apply


def _rewrite(change: Callable[[dict[str, np.ndarray]], Any], shards: int = 1) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        for path in [*directory.glob("*.safetensors"), directory / INDEX]:
            path.unlink()
        values = builders.tensors()
        change(values)
        write(directory, values, shards=shards)
    return apply


def _config(**fields: Any) -> Callable[[Path], None]:
    return lambda directory: (directory / "config.json").write_text(json.dumps({**builders.CONFIG, **fields}))


def _two_shards_hold_a_key(directory: Path) -> None:
    from safetensors.numpy import load_file, save_file
    values = load_file(directory / SECOND)
    extra = load_file(directory / FIRST)
    save_file({**values, "model.embed_tokens.weight": extra["model.embed_tokens.weight"]}, directory / SECOND)


BROKEN: dict[str, tuple[Callable[[Path], Any], type[CheckpointError], str, str | None]] = {
    "missing key": (_rewrite(lambda v: v.pop(NORM)), MissingKeyError, "", NORM),
    "extra key": (_rewrite(lambda v: v.update(extra=v[NORM])), UnexpectedKeyError, "model.safetensors", "extra"),
    "renamed key": (
        _rewrite(lambda v: v.update({"norm": v.pop(NORM)})), UnexpectedKeyError, "model.safetensors", "norm"),
    "wrong shape": (
        _rewrite(lambda v: v.update({NORM: v[NORM][:3].copy()})), TensorShapeError, "model.safetensors", NORM),
    "transposed": (
        _rewrite(lambda v: v.update({HEAD: v[HEAD].T.copy()})), TensorShapeError, "model.safetensors", HEAD),
    "wrong dtype": (
        _rewrite(lambda v: v.update({NORM: v[NORM].astype(np.int32)})), TensorDtypeError, "model.safetensors", NORM),
    "missing shard": (lambda d: (d / SECOND).unlink(), SourceError, SECOND, None),
    "empty shard": (lambda d: (d / SECOND).write_bytes(b""), HeaderError, SECOND, None),
    "git-lfs shard": (
        lambda d: (d / FIRST).write_text("version https://git-lfs.github.com/"), HeaderError, FIRST, None),
    "half a shard": (lambda d: os.truncate(d / FIRST, (d / FIRST).stat().st_size // 2), HeaderError, FIRST, None),
    "trailing bytes": (lambda d: (d / FIRST).open("ab").write(b"\0"), HeaderError, FIRST, None),
    "path in the index": (_index(lambda m: m.update({NORM: "../x.safetensors"})), IndexFileError, INDEX, NORM),
    "absolute path in the index": (_index(lambda m: m.update({NORM: "/x.safetensors"})), IndexFileError, INDEX, NORM),
    "index names the wrong shard": (_index(lambda m: m.update({NORM: FIRST})), IndexFileError, INDEX, NORM),
    "index names a key nobody has": (_index(lambda m: m.update(ghost=FIRST)), IndexFileError, INDEX, "ghost"),
    "index lacks a key": (_index(lambda m: m.pop(NORM)), IndexFileError, INDEX, NORM),
    "a key in two shards": (_two_shards_hold_a_key, IndexFileError, SECOND, "model.embed_tokens.weight"),
    "index is not JSON": (lambda d: (d / INDEX).write_text("{"), IndexFileError, INDEX, None),
    "no index": (lambda d: (d / INDEX).unlink(), SourceError, "", None),
    "an index and a single file": (lambda d: shutil.copy(d / FIRST, d / "model.safetensors"), SourceError, "", None),
    "no config": (lambda d: (d / "config.json").unlink(), SourceError, "config.json", None),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), ConfigError, "config.json", None),
    "more layers than the files": (_config(num_hidden_layers=3, moe_layer_freq=None), MissingKeyError, "", None),
    "512 layers": (_config(num_hidden_layers=512, moe_layer_freq=None), MissingKeyError, "", None),
    "fewer layers": (_config(num_hidden_layers=1, moe_layer_freq=None), UnexpectedKeyError, FIRST, None),
    "more experts": (_config(num_experts=5), TensorShapeError, "", None),
    "an enormous vocabulary": (_config(vocab_size=2**31 - 1), TensorShapeError, "", None),
    "another architecture": (_config(model_type="llama"), ConfigError, "config.json", "model_type"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_source_is_one_typed_error_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    apply, kind, file, key = BROKEN[name]
    source = write(tmp_path / "source", STORED, shards=2)
    apply(source)
    with pytest.raises(CheckpointError) as caught:
        convert.convert(source, tmp_path / "destination")
    assert type(caught.value) is kind
    assert caught.value.file is not None
    if file:
        assert Path(caught.value.file).name == file
    if key is not None:
        assert caught.value.key == key
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["source"]


def test_pickles_are_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(builders.CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match="never read"):
        convert.load_params(tmp_path)


@pytest.mark.parametrize("source", ["no/such/directory/at/all", "/no/such", "..", "a b", "-x", "a/../b", "~nobody/x"])
def test_no_such_source(source: str) -> None:
    with pytest.raises(SourceError):
        convert.load_params(source)


def test_a_file_is_no_source(checkpoint: Path) -> None:
    with pytest.raises(SourceError, match="give the directory"):
        convert.load_params(checkpoint / "model.safetensors")


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_canary_repository_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, fired = tmp_path / "source", tmp_path / "fired"
    write(source, STORED, config={**builders.CONFIG, "auto_map": {
        "AutoConfig": "configuration_canary.C", "AutoModel": "modeling_canary.M",
        "AutoTokenizer": "tokenization_canary.T"}})
    for name in ("configuration_canary.py", "modeling_canary.py", "tokenization_canary.py", "__init__.py",
                 "conftest.py", "setup.py"):
        (source / name).write_text(f"import os\nos.mkdir({str(fired)!r})\n")
    for name in ("pytorch_model.bin", "model.pt", "optimizer.pkl"):
        (source / name).write_bytes(pickle.dumps(_Canary(fired)))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_canary.T", None]}}))
    monkeypatch.chdir(source)
    convert.load_params(source)
    convert.describe(source)
    destination = convert.convert(source, tmp_path / "destination")
    convert.load_params(destination)
    assert not fired.exists()
    assert not list(destination.rglob("*.py"))
    assert not [path for path in destination.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    pickle.loads((source / "model.pt").read_bytes())
    assert fired.exists()  # the canary does sing


def test_hub_ids_fetch_safe_files_only(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch

    import huggingface_hub
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repo_id=repo_id, revision=revision, allow_patterns=allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    _, params = convert.load_params("owner/name@refs/pr/1")
    tree_equal(params, builders.parameters(STORED))
    assert (asked["repo_id"], asked["revision"]) == ("owner/name", "refs/pr/1")
    for name in ("modeling_llada.py", "pytorch_model.bin", "model.pt", "x.pkl", "a.so", "README.md", "x.sh"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"])
    for name in ("model.safetensors", "model-00001-of-00003.safetensors", INDEX, "config.json", "tokenizer.json"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"])


def test_a_failed_download_is_one_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(repo_id: str, **rest: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(SourceError, match="no route") as caught:
        convert.load_params("owner/name")
    assert "\n" not in str(caught.value)


def test_a_local_directory_goes_before_the_hub(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    convert.load_params("owner/name")


def test_importing_convert_imports_no_framework() -> None:
    code = ("import sys, convert; "
            "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'tensorflow') if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


ON_EIGHT_DEVICES = r"""
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, AxisType
import convert
from djax.devices.sharding import named_leaves
from tests.support import builders

assert jax.device_count() == 8
source, converted = sys.argv[1:]
expected = builders.parameters(builders.tensors())
devices = np.array(jax.devices())
meshes = {
    "tensor": Mesh(devices[:2], ("tensor",)),
    "tensor x expert": Mesh(devices.reshape(2, 4), ("tensor", "expert")),
    "data x expert": Mesh(devices.reshape(4, 2), ("data", "expert")),
    "explicit": jax.make_mesh((4, 2), ("expert", "tensor"), axis_types=(AxisType.Explicit,) * 2),
}
for name, mesh in meshes.items():
    for path in (source, converted):
        for dtype in ("float32", "bfloat16"):
            _, params = convert.load_params(path, dtype=dtype, mesh=mesh)
            for leaf_name, leaf in named_leaves(params).items():
                assert isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
                whole = expected[leaf_name].astype(leaf.dtype)
                for shard in leaf.addressable_shards:
                    assert np.array_equal(np.asarray(shard.data), whole[shard.index]), (name, leaf_name)
    up = named_leaves(params)["layers.0.moe.up"]
    experts, ffn = mesh.shape.get("expert", 1), mesh.shape.get("tensor", 1)
    assert up.addressable_shards[0].data.shape == (4 // experts, 8 // ffn, 16), name
    one_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in named_leaves(params).values())
    print(name, one_device, sum(leaf.nbytes for leaf in named_leaves(params).values()))
try:
    convert.load_params(source, mesh=Mesh(devices[:3], ("tensor",)))
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_on_eight_devices_each_holds_its_slice(checkpoint: Path, tmp_path: Path) -> None:
    converted = convert.convert(checkpoint, tmp_path / "converted")
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, str(checkpoint), str(converted)], env=environment,
        capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert len(lines) == 5
    for line in lines[:4]:
        held, whole = (int(number) for number in line.split()[-2:])
        assert held < 0.75 * whole, line
    # 3 divides the vocabulary of 24: the first parameter that it does not divide is named
    assert lines[4].startswith("layers.0.attention.output: got axis 'heads' of size 4, which cannot be split evenly")


def test_the_bits_of_bfloat16_are_the_librarys(tmp_path: Path) -> None:
    values = builders.tensors()
    _, params = convert.load_params(write(tmp_path, values), dtype="bfloat16")
    jax_rounded = jax.numpy.asarray(values["lm_head.weight"]).astype(jax.numpy.bfloat16)
    np.testing.assert_array_equal(
        np.asarray(params["head"][...]).view(np.uint16), np.asarray(jax_rounded).view(np.uint16))
    assert params["head"][...].dtype == ml_dtypes.bfloat16
