"""The scaling benchmark on toy sizes: it runs, and its figures are what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import report as scaling_report
from djax.models.families import published
from djax.plan.request import Request


@pytest.mark.slow
def test_one_shard_is_timed_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--shard", "2", "--tiny", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "scaling-shard-2.json").read_text())
    assert record["mesh"] == {"tensor": 2}
    assert record["programs"] == 1
    assert all(seconds > 0 for seconds in record["generation_seconds"])
    assert record["modelled_exchange_seconds"]["window"] > 0
    assert record["window_seconds"] == pytest.approx(
        record["window_compute_seconds"] + record["modelled_exchange_seconds"]["window"])
    assert "modelled for h200" in capsys.readouterr().out


@pytest.mark.slow
def test_fake_devices_decode_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = scaling.on_fake_devices()
    assert [(row["devices"], row["preset"]) for row in rows] == list(scaling.FAKE)
    for row in rows:
        assert row["equal"] == {"tokens": True, "commit_step": True, "nfe": True}, row
        for step in row["steps"].values():
            assert step["layer"].get("all-reduce", {"count": 0})["count"] <= 2, row
    assert rows[0]["steps"]["window"]["all"] == {}


def test_the_fastest_mesh_is_found() -> None:
    request = Request.of(published()["llada-moe"], topology="v5e:1", batch=1, prompt_length=176, max_new_tokens=1024)
    one, eight = (scaling.fastest(request, "v5e", count) for count in (1, 8))
    assert one["window_exchange_seconds"] == 0
    assert one["fits"]
    assert eight["window_compute_seconds"] < one["window_compute_seconds"] / 6
    for tensor in (1, 2, 4, 8):
        shared = request.on_mesh({"tensor": tensor, "expert": 8 // tensor})
        assert shared.steps["window"][1].seconds >= eight["window_seconds"]
    assert scaling.fastest(request, "v5e", 7)["mesh"] is None


def test_rows_replace_those_that_asked_the_same() -> None:
    first, second = ({"asked": dict(zip(("model", "topology", "mesh"), entry, strict=True))}
                     for entry in scaling.PLANS[:2])
    rows: list[dict[str, Any]] = []
    for row in (second | {"n": 1}, first, second | {"n": 2}):
        rows = scaling.merged(rows, row)
    assert rows == [first, second | {"n": 2}]


def test_the_committed_record_is_shown_as_it_is() -> None:
    """Every compiled program fits, sums twice a layer, and was estimated within a tenth."""
    path = scaling.RESULTS / "scaling.json"
    record = json.loads(path.read_text())
    assert (scaling.RESULTS / "scaling.md").read_text() == scaling_report.markdown(record)
    planned = [row["plan"] for row in record["plan"] if "plan" in row]
    assert planned
    for found in planned:
        assert found["compiled"]["total"] <= found["device_memory"]
        assert found["estimate"]["total"] == pytest.approx(found["compiled"]["total"], rel=0.1)
        assert all(step["layer_collectives"]["all-reduce"]["count"] == 2 for step in found["steps"].values())
    assert all(all(row["equal"].values()) for row in record["devices"]["rows"])
