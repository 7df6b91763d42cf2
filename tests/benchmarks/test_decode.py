"""The decode benchmark: its twin decodes what djax decodes, and its figures are what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import moe_sides, readme
from benchmarks.decode import __main__ as decode
from benchmarks.decode import products
from benchmarks.decode.engines import Case, Run
from benchmarks.harness import checkpoint, report

CASE = Case(recipe="dual", threshold=0.9, cache="dual", batch=2, prompt_length=2, max_new_tokens=4, block_length=2)
EOS = 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    checkpoint.write(path, checkpoint.TINY, seed=3)
    return path


@pytest.fixture(scope="module")
def twin(directory: Path) -> Any:
    pytest.importorskip("torch", reason="the twin needs torch (pip install djax[oracle], Python 3.11)")
    from benchmarks.decode.torch_twin import TorchTwin

    return TorchTwin(directory, threads=1)


@pytest.mark.slow
def test_tiny_run_in_both_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command as it is used: two workers in turn, a table, a record; both decode the same."""
    pytest.importorskip("torch", reason="the twin needs torch (pip install djax[oracle], Python 3.11)")
    out = tmp_path / "sub" / "decode.json"
    arguments = ["--tiny", "--pairs", "2", "--batches", "3", "--out", str(out)]
    assert decode.main(arguments) == 0
    record, = decode.records(out)
    assert record["machine"] == report.machine()
    assert [row["case"]["recipe"] for row in record["rows"]] == ["none", "dual", "vicinity"]
    for row in record["rows"]:
        assert row["agreement"] == {"tokens": True, "commit_steps": True, "nfe": True, "share_of_equal_tokens": 1.0}
        djax, twin = row["djax"], row["twin"]
        assert djax["forwards"] == twin["forwards"] >= max(djax["nfe"]) > 2
        assert len(djax["nfe"]) == len(djax["tokens"]) == 3
        assert djax["programs"] == 2  # what begins, and the loop
        assert djax["compile_seconds"] > 0
        ratios = [pair["twin_seconds"] / pair["djax_seconds"] for pair in row["pairs"]]
        assert row["ratio"]["minimum"] == pytest.approx(min(ratios))
        assert row["ratio"]["median"] == pytest.approx(np.mean(ratios))
        assert row["ratio_per_forward"]["maximum"] == pytest.approx(max(ratios))
        assert sum(djax["tokens"]) / djax["seconds"]["median"] == pytest.approx(djax["tokens_per_second"])
        spans = ["refresh"] if row["case"]["cache"] == "none" else ["window", "refresh"]
        assert [(rate["name"], rate["span"]) for rate in row["rates"]] == [
            (name, span) for span in spans for name in ("attention", "experts")]
        assert all(0 < rate[engine]["minimum"] <= rate[engine]["median"] <= rate[engine]["maximum"]
                   for rate in row["rates"] for engine in ("djax", "twin"))
    assert record["hardware"]["cores"] >= 1
    assert record["versions"]["jax"]
    assert "benchmarks.decode" in record["command"]
    assert all(record["matmul_gflops"][engine] > 0 for engine in ("djax", "twin"))
    assert "commit" in record
    printed = capsys.readouterr().out
    assert all(printed.count(f"{name}, 3") == 2 for name in decode.RECIPES)  # the ratios', and the rates' table


def test_readme_shows_the_committed_results() -> None:
    assert readme.main(["--check"]) == 0, "run python -m benchmarks.readme"


def machine(name: str, ratio: float, rates: tuple[float, float] | None) -> dict[str, Any]:
    """The committed record under another name, all its ratios and rates replaced."""
    record = decode.records(decode.RESULTS)[0] | {"machine": name}
    spread = {"median": ratio, "minimum": ratio - 0.25, "maximum": ratio + 0.5}
    made = None if rates is None else [
        {"name": kind, "span": span} | {engine: {"median": scale * rate, "minimum": 0.0, "maximum": 1e3}
                                        for engine, rate in zip(("djax", "twin"), rates, strict=True)}
        for kind, scale in (("attention", 1), ("experts", 2)) for span in ("window", "refresh")]
    return record | {"rows": [row | {"ratio": spread, "rates": made} for row in record["rows"]],
                     "matmul_gflops": {"djax": 468.3, "twin": 207.7}}


def test_speed_has_a_row_for_every_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machines = [machine("Old, 2 cores", 1.75, None), machine("New, 4 cores", 0.95, (101.0, 145.0))]
    section = readme.decode_section(machines).splitlines()
    assert "| Old, 2 cores | 1.75 to 1.75 | not measured | not measured | not measured | not measured | 468 / 208 |" \
        in section
    first, twice = "101 to 101 / 145 to 145", "202 to 202 / 290 to 290"
    assert f"| New, 4 cores | 0.95 to 0.95 | {first} | {first} | {twice} | {twice} | 468 / 208 |" in section
    rows = [line for line in section if line.startswith("| dual, 8 ")]
    assert [row.count("|") for row in rows] == [9, 11]
    assert rows[1].endswith("| 101 / 145 | 202 / 290 |")
    monkeypatch.setattr(decode, "records", lambda path: machines)
    summary = [line for line in readme.summary().splitlines() if "PyTorch" in line]
    assert len(summary) == 2
    assert "on Old, 2 cores (GFLOP/s of XLA / PyTorch there: a large product 468 / 208) | 1.75 to 1.75" in summary[0]
    assert f"on New, 4 cores (GFLOP/s of XLA / PyTorch there: attention {first}, experts {twice}) | 0.95" in summary[1]


def test_a_run_replaces_its_own_machines_record(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    for name, value in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        decode.keep(path, {"machine": name, "value": value})
    assert decode.records(path) == [
        {"machine": "a", "value": 3}, {"machine": "b", "value": 2}, {"machine": "c", "value": 4}]
    path.write_text('{"benchmark": "decode", "rows": []}')
    with pytest.raises(ValueError, match="one per machine"):
        decode.records(path)
    with pytest.raises(SystemExit):
        decode.parse(["--out", str(path)])


def test_a_tiny_run_keeps_nothing_by_itself(tmp_path: Path) -> None:
    assert decode.parse(["--tiny"]).out is None
    assert decode.parse([]).out == decode.RESULTS
    assert decode.parse(["--tiny", "--out", str(tmp_path / "x.json")]).out == tmp_path / "x.json"


def test_products_have_the_layers_sizes() -> None:
    options = decode.parse(["--recipes", "none", "vicinity", "--batches", "8"])
    full, windowed = (products.of_case(case, checkpoint.MID_SIZE) for case in decode.cases(options))
    assert full == windowed[2:]
    # 8 rows of 16 + 32 + 16 of 192 positions; an expert gets 4 / 16 of them
    assert [(product.name, product.span, product.rows) for product in windowed] == [
        ("attention", "window", 512), ("experts", "window", 128),
        ("attention", "refresh", 1536), ("experts", "refresh", 384)]
    assert windowed[0].flops == 2 * 512 * 4 * 512 * 512
    assert windowed[1].flops == 2 * 128 * 16 * 2 * 512 * 256
    assert windowed[0].sizes[:2] == (512, 512)
    assert windowed[1].sizes[:3] == (512, 256, 512)


def test_both_libraries_multiply_the_same() -> None:
    pytest.importorskip("torch", reason="the twin needs torch (pip install djax[oracle], Python 3.11)")
    product = products.Product(name="experts", span="window", rows=3, sizes=(8, 5, 8, 5, 8))
    x, factors = product.operands()
    expected = np.linalg.multi_dot([x.astype(np.float64), *factors])
    for library in (products.in_xla, products.in_torch):
        np.testing.assert_allclose(np.asarray(library(product)()), expected, atol=1e-5)


@pytest.mark.slow
def test_sides_of_the_expert_products(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sides.json"
    arguments = ["--tiny", "--pairs", "2", "--batches", "2", "--window", "3", "--dtypes", "float32", "--out", str(out)]
    assert moe_sides.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"]["gradient"] for row in rows] == [False, True]
    for row in rows:
        assert row["rows"] == 6
        assert row["apart"] < 1e-5
        assert 0 < row["ratio"]["minimum"] <= row["ratio"]["median"] <= row["ratio"]["maximum"]
        assert all(row["seconds"][side]["minimum"] > 0 for side in moe_sides.SIDES)
    assert "gradient, 2, float32" in capsys.readouterr().out


def test_forwards_of_a_batch_count_each_blocks_slowest_row() -> None:
    # row 0 takes 1 step and then 2, row 1 takes 2 and then 1: the batch runs 2 + 2
    steps = np.array([[-1, -1, 0, 0, 2, 1], [-1, -1, 1, 0, 2, 2]])
    assert decode.forwards(steps, CASE) == 4
    assert decode.forwards(steps[:1], CASE) == 3


def test_tokens_are_counted_up_to_the_first_eos() -> None:
    tokens = np.array([[EOS, 5, 6, EOS, 7, EOS], [5, 5, 6, 7, 8, 9]])
    assert decode.generated(tokens, CASE, EOS).tolist() == [2, 4]


def test_record_of_pairs() -> None:
    steps = np.array([[-1, -1, 0, 0, 1, 1], [-1, -1, 0, 0, 1, 2]])
    other = np.array([[-1, -1, 0, 0, 1, 1], [-1, -1, 0, 1, 2, 3]])
    tokens, changed = np.full((2, 6), 9), np.full((2, 6), 9)
    changed[0, 4] = 8
    pairs = [(Run(1.0, 1.0, tokens, steps), Run(3.0, 1.0, changed, other)),
             (Run(2.0, 1.0, tokens, steps), Run(3.0, 1.0, changed, other)),
             (Run(2.0, 1.0, tokens, steps), Run(2.0, 1.0, changed, other))]
    got = decode.case_record(CASE, pairs, {"djax": {"first_call_seconds": 5.0}, "twin": {}}, EOS)
    assert got["ratio"] == {"median": 1.5, "minimum": 1.0, "maximum": 3.0}
    # the twin ran 4 forwards where djax ran 3
    assert (got["djax"]["forwards"], got["twin"]["forwards"]) == (3, 4)
    assert got["ratio_per_forward"]["median"] == pytest.approx(1.5 * 3 / 4)
    assert got["agreement"] == {"tokens": False, "commit_steps": False, "nfe": False, "share_of_equal_tokens": 7 / 8}
    assert got["djax"]["compile_seconds"] == 3.0
    assert got["djax"]["tokens_per_second"] == 4.0
    assert got["djax"]["tokens_per_forward"] == pytest.approx((4 + 4) / (2 + 3))


@pytest.mark.slow
def test_twin_is_bidirectional_and_its_cache_exact_where_nothing_changed(twin: Any) -> None:
    torch = pytest.importorskip("torch")
    from benchmarks.decode.torch_twin import TwinRecipe, WindowCache

    tokens = torch.from_numpy(checkpoint.prompts(checkpoint.TINY, batch=2, length=24, seed=0)).long()
    recipe, here = TwinRecipe(threshold=0.9, window=(2, 3)), slice(8, 16)
    with torch.inference_mode():
        cache = WindowCache(checkpoint.TINY["num_hidden_layers"])
        full = twin._logits(tokens, here, TwinRecipe(threshold=0.9, window=None), None, True)
        first = twin._logits(tokens, here, recipe, cache, True)
        again = twin._logits(tokens, here, recipe, cache, False)
        changed = tokens.clone()
        changed[:, -1] = (tokens[:, -1] + 1) % checkpoint.TINY["vocab_size"]
        later = twin._logits(changed, here, recipe, None, True)
        stale = twin._logits(changed, here, recipe, cache, False)
    torch.testing.assert_close(first, full)
    torch.testing.assert_close(again, full)
    # a token after the block counts in a full forward, and the cache has not seen it change
    assert (later - full).abs().max() > 1e-3
    torch.testing.assert_close(stale, full)


@pytest.mark.slow
def test_decision_of_the_twin() -> None:
    torch = pytest.importorskip("torch", reason="the twin needs torch (pip install djax[oracle], Python 3.11)")
    from benchmarks.decode.torch_twin import decide

    sure, unsure = [0.0, 5.0, 0.0, 9.0], [0.0, 0.1, 0.0, 9.0]
    logits = torch.tensor([[sure, unsure, sure], [unsure, unsure, [0.2, 0.0, 0.0, 9.0]], [sure, sure, sure]])
    masked = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    commit, token = decide(logits, masked, 0.9, mask_id=3)
    # the sure masked position; where none is sure the best one; nothing in a finished row; never the mask
    assert commit.tolist() == [[True, False, False], [False, False, True], [False, False, False]]
    assert token.tolist()[:2] == [[1, 1, 1], [1, 1, 0]]


def test_twin_uses_the_fastest_setting(twin: Any) -> None:
    seconds = twin.calibrate(1, 8, repeats=1)
    assert {setting.experts for setting in seconds} == {"eager", "grouped_mm", "batched_mm"}
    assert seconds[twin.chosen[1, 8]] == min(seconds.values())


def test_checkpoint_is_seeded() -> None:
    first, again, other = (checkpoint.tensors(checkpoint.TINY, seed=seed) for seed in (0, 0, 1))
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["lm_head.weight"] != other["lm_head.weight"]).any()


def test_provenance_and_spread(tmp_path: Path) -> None:
    found = report.provenance("benchmarks.decode")
    assert found["hardware"]["cpu"]
    assert found["versions"]["numpy"] == np.__version__
    assert report.Spread.of([3.0, 1.0, 2.0]) == report.Spread(median=2.0, minimum=1.0, maximum=3.0)
    report.save(tmp_path / "new" / "file.json", found)
    assert json.loads((tmp_path / "new" / "file.json").read_text()) == found


@pytest.mark.parametrize("arguments", [["--pairs", "0"], ["--batches", "0"], ["--cores", "0"], ["--recipes", "no"]])
def test_bad_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        decode.parse(arguments)
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err
