"""The noise: Threefry against JAX's own and the paper's vectors, the Gumbel form against its distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32 as jax_threefry

from kernels_pallas import gumbel_noise
from kernels_pallas.testing.unembed_cases import gumbel, threefry
from kernels_pallas.unembed.noise import gumbel_from_bits, threefry_2x32

SEED = 11
noise_of = jax.jit(gumbel_noise)
threefry_of = jax.jit(threefry_2x32)


@pytest.mark.parametrize(("key", "counter", "expected"), [
    # Random123's known answers for threefry2x32 with 20 rounds
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
])
def test_threefry_gives_the_known_answers(
    key: tuple[int, int], counter: tuple[int, int], expected: tuple[int, int]
) -> None:
    words = lambda pair: tuple(jnp.uint32(word) for word in pair)  # noqa: E731
    assert tuple(int(word) for word in threefry_of(words(key), words(counter))) == expected
    assert threefry(key, counter) == expected


def test_threefry_is_jaxs() -> None:
    rng = np.random.default_rng(SEED)
    keys, counters = (jnp.asarray(rng.integers(0, 2**32, (50, 2), dtype=np.uint32)) for _ in range(2))
    got = threefry_of((keys[:, 0], keys[:, 1]), (counters[:, 0], counters[:, 1]))
    np.testing.assert_array_equal(jnp.stack(got, axis=1), jax.vmap(jax_threefry)(keys, counters))


def test_noise_is_that_of_a_python_loop_and_broadcasts() -> None:
    rng = np.random.default_rng(SEED)
    keys = jnp.asarray(rng.integers(0, 2**32, (7, 2), dtype=np.uint32))
    ids = jnp.asarray(rng.integers(0, 157184, 40), jnp.int32)
    got = noise_of(keys[:, None], ids)
    assert got.shape == (7, 40)
    expected = np.array([[gumbel(key, int(vocab_id)) for vocab_id in ids] for key in np.asarray(keys)])
    np.testing.assert_allclose(got, expected, atol=2e-6, rtol=2e-6)
    np.testing.assert_array_equal(got[3, 5], noise_of(keys[3], ids[5]))


def test_noise_is_finite_and_fine_in_the_upper_tail() -> None:
    small = np.arange(2000, dtype=np.uint64)
    bits = np.concatenate([small, 2**32 - 1 - small, 2 ** np.arange(32, dtype=np.uint64), small * 2**16 + 2**28])
    got = np.asarray(jax.jit(gumbel_from_bits)(jnp.asarray(bits.astype(np.uint32))), np.float64)
    assert np.isfinite(got).all()
    expected = -np.log(-np.log1p(-np.minimum((bits + 0.5) / 2**32, 1 - 2.0**-24)))
    # near u = 1 float32 has few values: an error of 2^-24 there moves the noise by less than 2
    upper = bits < 2**31
    np.testing.assert_allclose(got[upper], expected[upper], atol=3e-6, rtol=1e-6)
    assert np.abs(got - expected).max() < 1.0
    assert 22.8 < got.max() < 22.9
    assert got.min() > -3


def test_noise_is_gumbel_distributed() -> None:
    """Kolmogorov-Smirnov over keys and over ids; and no correlation between neighbours."""
    from scipy import stats  # takes a second, which every worker would spend on collecting

    rng = np.random.default_rng(SEED)
    keys = jnp.asarray(rng.integers(0, 2**32, (20000, 2), dtype=np.uint32))
    by_key = np.asarray(noise_of(keys, jnp.int32(5)))
    by_id = np.asarray(noise_of(keys[0], jnp.arange(20000, dtype=jnp.int32)))
    for sample in (by_key, by_id):
        assert stats.kstest(sample, stats.gumbel_r.cdf).pvalue > 1e-3, f"seed {SEED}"
    assert abs(np.corrcoef(by_id[:-1], by_id[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(by_key, np.asarray(noise_of(keys, jnp.int32(6))))[0, 1]) < 0.03
