"""Every implementation of `unembed` against float64 NumPy, on one table of cases."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import Readout, unembed, unembed_choice
from kernels_pallas.testing.unembed_cases import CASES, PLAIN, Case, operands, oracle
from kernels_pallas.testing.unembed_check import check, jitted
from kernels_pallas.unembed import IMPLEMENTATIONS, running
from kernels_pallas.unembed.xla_stream import chunk_length, unembed_xla_stream
from tests.support.cover import in_turn

SEED = 7
PUBLIC = jax.jit(unembed, static_argnames=("second", "entropy", "implementation"))
RUNS: dict[str, Callable[..., Readout]] = {
    "reference": partial(PUBLIC, implementation="reference"),
    "in_chunks": jitted(partial(unembed_xla_stream, chunk=128)),
}


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Callable[..., Readout]:
    return RUNS[request.param]


@in_turn(CASES, list(RUNS))
def test_equals_the_oracle(case: Case, implementation: str) -> None:
    arrays, options = operands(case, SEED)
    check(RUNS[implementation](*arrays, **options), oracle(*arrays, **options), case.dtype)


def test_a_loop_written_out_is_the_same() -> None:
    case = next(case for case in CASES if case.name == "bfloat16")
    arrays, options = operands(case, SEED)
    run = jitted(partial(unembed_xla_stream, chunk=150, unrolled=True))
    check(run(*arrays, **options), oracle(*arrays, **options), case.dtype)


def test_many_asked_ids_are_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits without their rows of the head in memory at once."""
    case = next(case for case in CASES if case.name == "bfloat16")
    arrays, options = operands(case, SEED)
    assert options["at"].shape[1] > 1
    at_once = jitted(partial(unembed_xla_stream, chunk=128))(*arrays, **options).at
    monkeypatch.setattr(running, "LARGEST_GATHER", 0)
    lowered = jax.jit(partial(unembed, implementation="xla_stream")).lower(*arrays, at=options["at"])
    got, allowed = lowered.compile()(*arrays, at=options["at"]).at, np.isfinite(at_once)
    assert allowed.sum() > len(allowed)
    np.testing.assert_allclose(got[allowed], at_once[allowed], rtol=1e-6)
    hidden, head = arrays
    gathered = f"{hidden.shape[0]}x{options['at'].shape[1]}x{head.shape[1]}x"
    assert gathered not in lowered.as_text()


def test_a_bad_row_stays_in_its_row(run: Callable[..., Readout]) -> None:
    case = Case(name="clean")
    arrays, options = operands(case, SEED)
    clean = run(*arrays, **options)
    got = run(arrays[0].at[2].set(jnp.nan).at[4, 1].set(jnp.inf), arrays[1], **options)
    others = np.array([0, 1, 3, 5])
    for name, values in clean._asdict().items():
        np.testing.assert_array_equal(np.asarray(getattr(got, name))[others], np.asarray(values)[others], name)
    assert np.isnan(np.asarray(got.log_total)).tolist() == [False, False, True, False, False, False]


def test_values_are_traced() -> None:
    """One program for every temperature, limit, first id and forbidden id."""
    arrays, options = operands(Case(name="traced", expected=0), SEED)
    static = {name: options.pop(name) for name in ("second", "entropy")}
    traces = 0

    def counted(hidden: Any, head: Any, options: Any) -> Readout:
        nonlocal traces
        traces += 1
        return unembed(hidden, head, **options, **static)

    program = jax.jit(counted)
    for temperature, limit, forbidden, first in ((0.0, 150, 3, 0), (1.3, 199, -1, 0), (0.5, 10**9, 210, 100)):
        changed = options | {"temperature": jnp.float32(temperature), "vocab_limit": jnp.int32(limit),
                             "forbidden": jnp.asarray([forbidden]), "first_id": jnp.int32(first)}
        check(program(*arrays, changed), oracle(*arrays, **changed, **static), "float32")
    assert traces == 1


def test_a_row_draws_the_same_in_any_batch_and_any_cut(run: Callable[..., Readout]) -> None:
    case = Case(name="draws", rows=40, scale=1.0, **PLAIN | {"temperature": 1.5})
    arrays, options = operands(case, SEED)
    whole = run(*arrays, **options)
    few = run(arrays[0][7:12], arrays[1], **options | {"noise_keys": options["noise_keys"][7:12]})
    np.testing.assert_array_equal(np.asarray(whole.drawn)[7:12], np.asarray(few.drawn))
    assert (np.asarray(whole.drawn) != np.asarray(whole.best)).mean() > 0.5


def test_draws_follow_the_softmax() -> None:
    """4000 keys on one row: frequencies against probabilities by chi-square."""
    rng = np.random.default_rng(SEED)
    logits = rng.normal(size=12)
    hidden, head = jnp.ones((4000, 1)), jnp.asarray(logits[:, None], jnp.float32)
    keys = jnp.asarray(rng.integers(0, 2**32, (4000, 2), dtype=np.uint32))
    drawn = RUNS["reference"](hidden, head, temperature=0.8, noise_keys=keys).drawn
    probs = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum()
    counts = np.bincount(np.asarray(drawn), minlength=12)
    statistic = ((counts - 4000 * probs) ** 2 / (4000 * probs)).sum()
    assert statistic < 31.3, f"seed {SEED}"  # the 0.999 quantile of chi-square with 11 degrees of freedom


def _shapes(**options: Any) -> tuple[tuple[Any, Any], dict[str, Any]]:
    dtype = options.pop("dtype", jnp.bfloat16)
    rows, vocabulary, model = options.pop("shape", (64, 157184, 2048))
    shape = jax.ShapeDtypeStruct
    return (shape((rows, model), dtype), shape((vocabulary, model), dtype)), options


@pytest.mark.parametrize(("platform", "options", "expected"), [
    ("cpu", {"shape": (64, 32000, 512)}, "reference"),
    ("cpu", {}, "xla_stream"),
    ("gpu", {}, "mosaic_gpu" if jax.__version_info__ >= (0, 11) else "xla_stream"),
    ("gpu", {"dtype": jnp.float32}, "xla_stream"),
    ("gpu", {"embedding": jax.ShapeDtypeStruct((157184, 2048), jnp.bfloat16)}, "xla_stream"),
    ("gpu", {"shape": (64, 157184, 1000)}, "xla_stream"),
    ("gpu", {"shape": (64, 200, 1024)}, "xla_stream"),
    ("gpu", {"forbidden": jax.ShapeDtypeStruct((17,), jnp.int32)}, "xla_stream"),
    ("tpu", {}, "pallas_tpu"),
    ("tpu", {"dtype": jnp.float32}, "pallas_tpu"),
    ("tpu", {"shape": (64, 157184, 1000)}, "xla_stream"),
    ("rocm", {}, "xla_stream"),
])
def test_the_choice_can_be_asked(platform: str, options: dict[str, Any], expected: str) -> None:
    operands, options = _shapes(**options)
    assert unembed_choice(*operands, **options, platform=platform) == expected
    assert unembed_choice(*operands, **options, platform=platform, implementation="reference") == "reference"


def test_none_is_the_reference_where_the_problem_is_small() -> None:
    arrays, options = operands(next(case for case in CASES if case.name == "everything"), SEED)
    got, expected = PUBLIC(*arrays, **options), RUNS["reference"](*arrays, **options)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_named_implementation_does_not_fall_back() -> None:
    arrays, options = operands(Case(name="small", **PLAIN), SEED)
    for name, reason in (("mosaic_gpu", "it needs a Hopper GPU, got cpu"), ("pallas_tpu", "it needs a TPU, got cpu")):
        with pytest.raises(NotImplementedError, match=reason):
            unembed(*arrays, **options, implementation=name)


def test_what_does_not_fit_is_refused() -> None:
    hidden, head = jnp.zeros((3, 8)), jnp.zeros((20, 8))
    keys = jnp.zeros((3, 2), jnp.uint32)
    refused = [
        ((hidden[None], head), {}, "fold batch axes into N"),
        ((hidden, head[:, :4]), {}, r"\(3, 8\) and head \(20, 4\)"),
        ((hidden[:0], head), {}, "at least 1"),
        ((hidden.astype(jnp.bfloat16), head), {}, "one dtype"),
        ((hidden, head), {"at": jnp.zeros(3, jnp.int32)}, r"at: got shape \(3,\).*\[3, A\]"),
        ((hidden, head), {"forbidden": jnp.zeros((3, 1), jnp.int32)}, "forbidden: got shape"),
        ((hidden, head), {"temperature": 1.0}, "noise_keys: got None with a temperature"),
        ((hidden, head), {"temperature": 1.0, "noise_keys": keys[:2]}, r"must be uint32 \(3, 2\)"),
        ((hidden, head), {"temperature": 1.0, "noise_keys": keys.astype(jnp.int32)}, "noise_keys: got int32"),
        ((hidden, head), {"embedding": head[:5]}, r"embedding: got shape \(5, 8\).*\[20, D2\]"),
        ((hidden, head), {"implementation": "triton"}, "'triton'; unembed has 'reference', 'xla_stream'"),
    ]
    for arrays, options, message in refused:
        with pytest.raises(ValueError, match=message):
            unembed(*arrays, **options)
    assert list(IMPLEMENTATIONS) == ["reference", "xla_stream", "mosaic_gpu", "pallas_tpu"]


def test_chunks_are_bounded() -> None:
    for rows, vocabulary in ((1, 157184), (64, 157184), (2048, 157184), (3, 50), (10**6, 157184)):
        loop = chunk_length(rows, vocabulary, elements=2**18, least=512, unrolled=0)
        assert min(512, vocabulary) <= loop <= vocabulary
        assert loop * rows <= 2**18 + 128 * rows or loop == 512
        written_out = chunk_length(rows, vocabulary, elements=2**18, least=512, unrolled=16)
        assert -(-vocabulary // written_out) <= 16


_SHARDED = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from kernels_pallas import combine_readouts, unembed
from kernels_pallas.testing.unembed_cases import Case, operands, oracle
from kernels_pallas.testing.unembed_check import check
mesh = jax.make_mesh((4,), ("vocab",), axis_types=(AxisType.Auto,))
cases = [
    Case(name="even", forbidden=(7, 399), vocab_limit=390),
    Case(name="shards_without_ids", vocab_limit=90),
    Case(name="ties", ties=(140, 12, 399, 260), temperature=0.0),
    Case(name="nan", poison=((2, float("nan")), (3, float("inf")))),
    Case(name="nan_at_an_id", bad_id=140),
    Case(name="none", vocab_limit=0),
    Case(name="icy", temperature=1e-30),
]
cases = [dataclasses.replace(case, vocabulary=400) for case in cases]
def local(hidden, head, embedding, options):
    first = jax.lax.axis_index("vocab") * head.shape[0]
    readout = unembed(hidden, head, embedding=embedding, second=True, entropy=True, **options | {"first_id": first})
    return combine_readouts(readout, axis_name="vocab", temperature=options.get("temperature"))
whole = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("vocab"), P("vocab"), P()), out_specs=P(),
                              check_vma=False))
for case in cases:
    arrays, options = operands(case, 7)
    given = {name: value for name, value in options.items() if name not in ("second", "entropy", "embedding")}
    check(whole(*arrays, options["embedding"], given), oracle(*arrays, **options), case.dtype)
print("sharded ok", jax.device_count())
"""


@pytest.mark.slow
def test_shards_of_the_vocabulary_are_joined() -> None:
    """In a process of its own: the number of devices is fixed before JAX starts."""
    script = f"import jax; jax.config.update('jax_num_cpu_devices', 4)\n{_SHARDED}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        cwd=pathlib.Path(__file__).parents[2], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    assert "sharded ok 4" in done.stdout
