"""Random keys: seeds and keys of any implementation as threefry keys.

Rows of a batch draw from keys of their own under `jax.vmap`. With threefry what a row draws depends on its key alone;
with JAX's other implementations ("rbg", "unsafe_rbg") it depends on the batch around it too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32

from djax.errors import ArgumentError, shown

IMPLEMENTATION = "threefry2x32"
SEED_LIMIT = 2**63
"""Seeds are integers from 0 to below this."""

_ALLOWED = f"a seed from 0 to {SEED_LIMIT - 1}, or one key of jax.random.key"


def as_key(key: Any, *, name: str = "key") -> Key[Array, ""]:
    """The threefry key that a seed or any key of `jax.random` stands for.

    A seed (an integer, or a scalar array of integers) gives the key whose words are its high and its low 32 bits:
    that of `jax.random.key(seed, impl="threefry2x32")` where this keeps 64 bits, so different seeds are different keys
    whatever `jax_enable_x64` and the default implementation are. A threefry key is taken as it is. Of a key of another
    implementation, whose data are more words, the first two are a key into which the others are folded. Raw words
    (`jax.random.PRNGKey`) are taken as those of a key. Traced arrays are taken too; a traced seed is not checked.

    Raises:
        ArgumentError: anything else; names `name`.
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.ndim:
            raise ArgumentError(name, f"keys of shape {key.shape}", allowed=_ALLOWED, advice="give one of them")
        if str(jax.random.key_impl(key)) == IMPLEMENTATION:
            return key
        return _from_words(jax.random.key_data(key))
    if isinstance(key, jax.Array | np.ndarray) and key.ndim == 1 and key.dtype == np.uint32 and key.size in (2, 4):
        return _from_words(key if isinstance(key, jax.Array) else jax.device_put(key))
    if isinstance(key, jax.core.Tracer):
        if key.ndim or not jnp.issubdtype(key.dtype, jnp.integer):
            raise ArgumentError(name, f"{key.dtype} of shape {key.shape}", allowed=_ALLOWED)
        return _from_words(_traced_words(key))
    seed = _seed(key, name)
    return _from_words(jax.device_put(np.asarray([seed >> 32, seed & 0xFFFFFFFF], np.uint32)))


def _seed(value: Any, name: str) -> int:
    host = jax.device_get(value) if isinstance(value, jax.Array) else value
    if isinstance(host, np.ndarray | np.generic) and host.ndim == 0 and host.dtype.kind in "iu":
        host = int(host)
    if isinstance(host, bool) or not isinstance(host, int) or not 0 <= host < SEED_LIMIT:
        raise ArgumentError(name, shown(value), allowed=_ALLOWED)
    return host


def _traced_words(seed: Array) -> UInt32[Array, "2"]:
    high = seed >> 32 if seed.dtype.itemsize == 8 else jnp.zeros((), jnp.uint32)
    return jnp.stack([high.astype(jnp.uint32), seed.astype(jnp.uint32)])


@jax.jit
def _from_words(words: UInt32[Array, " n"]) -> Key[Array, ""]:
    key = jax.random.wrap_key_data(words[:2], impl=IMPLEMENTATION)
    for index in range(2, words.shape[0]):
        key = jax.random.fold_in(key, words[index])
    return key
