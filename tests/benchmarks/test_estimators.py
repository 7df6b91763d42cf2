"""The benchmark of estimators: its figures are what they say, and the command runs."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from benchmarks import estimators


def tables(*, seed: int) -> np.ndarray:
    """log-probs of two completions, any numbers."""
    return -np.random.default_rng(seed).exponential(size=(2, 64, estimators.LENGTH))


def test_the_bound_is_the_mean_over_orders() -> None:
    """Uncovering the tokens one by one, averaged over all 720 orders."""
    table = tables(seed=0)[0]
    total = 0.0
    for order in itertools.permutations(range(estimators.LENGTH)):
        hidden = sum(1 << token for token in order)
        for token in order:
            total += table[hidden, token]
            hidden -= 1 << token
    assert math.isclose(estimators.elbo(table), total / math.factorial(estimators.LENGTH), rel_tol=1e-9)


def test_unbiased_schemes_have_no_bias_and_biased_ones_do() -> None:
    old = tables(seed=0)
    new = old + 0.01 * tables(seed=1)
    rows = {(scheme, n): estimators.measure(old, new, scheme, n, draws=500, seed=3)
            for scheme, n in (("fixed_k", 3), ("stratified", 8), ("one_step", 1))}
    for key in (("fixed_k", 3), ("stratified", 8)):
        row = rows[key]
        assert row.forwards == key[1]
        assert row.worst is not None
        assert row.worst < 3.5
        assert abs(row.bias) < 3.5 * row.bias_error
        assert row.difference_apart > 4 * row.difference_same
        assert math.isclose(row.error ** 2, row.spread ** 2, rel_tol=0.1)
    exact = rows["one_step", 1]
    assert exact.worst is None
    assert exact.spread == pytest.approx(0.0, abs=1e-6)
    full = [table[-1].sum() - estimators.elbo(table) for table in old]
    assert exact.bias == pytest.approx(np.mean(full), rel=1e-6)
    shown = estimators.show(list(rows.values()))
    assert shown.row_count == 3


@pytest.mark.slow
def test_the_command(tmp_path, capsys) -> None:
    out = tmp_path / "estimators.json"
    assert estimators.main(["--completions", "2", "--draws", "100", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [row["scheme"] for row in record["rows"]] == [scheme for scheme, _ in estimators.SCHEMES]
    assert len(record["elbo"]) == 2
    assert all(bound < 0 for bound in record["elbo"])
    assert "stratified" in capsys.readouterr().out
