"""Gumbel noise that is a pure function of a row's key and a vocabulary id, in operations that any backend has."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24


def threefry_2x32(
    key: tuple[UInt32[Array, "..."], UInt32[Array, "..."]], counter: tuple[UInt32[Array, "..."], UInt32[Array, "..."]]
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """The two words of the 20-round Threefry-2x32 block (Salmon et al., SC 2011), elementwise.

    Shapes broadcast.
    """
    schedule = (*key, key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = counter[0] + schedule[0], counter[1] + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = (y << jnp.uint32(rotation)) | (y >> jnp.uint32(32 - rotation))
            y = y ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def gumbel_from_bits(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Standard Gumbel variates, float32, from uniform 32-bit words; always finite.

    -log(-log(1 - u)) with u = (bits + 1/2) / 2^32: the upper tail, which decides draws, belongs to small u,
    where float32 is finest. It reaches 22.9, and -2.9 below.
    """
    # Two exact conversions of 16 bits, since some backends convert signed integers only.
    high, low = (bits >> jnp.uint32(16)).astype(jnp.int32), (bits & jnp.uint32(0xFFFF)).astype(jnp.int32)
    u = high.astype(jnp.float32) * 2.0**-16 + (low.astype(jnp.float32) * 2.0**-32 + 2.0**-33)
    u = jnp.minimum(u, _LARGEST_BELOW_ONE)
    # -log(1 - u); its series where the logarithm of a number near 1 would lose the digits
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6))))))
    return -jnp.log(jnp.where(u < 1 / 16, series, -jnp.log(1.0 - u)))


def gumbel_noise_of(
    first_word: UInt32[Array, "..."], second_word: UInt32[Array, "..."], ids: Int[Array, "..."]
) -> Float[Array, "..."]:
    """`gumbel_noise` with the key's two words apart."""
    counter = ids.astype(jnp.uint32)
    return gumbel_from_bits(threefry_2x32((first_word, second_word), (counter, jnp.zeros_like(counter)))[0])


def gumbel_noise(keys: UInt32[Array, "... 2"], ids: Int[Array, "..."]) -> Float[Array, "..."]:
    """Standard Gumbel noise of each key for each vocabulary id, float32 and finite.

    A pure function of (key, id), so it does not depend on how a vocabulary or a batch is cut: the first word
    of Threefry-2x32 under the key, on the counter (id, 0). The keys' leading axes and `ids` broadcast.
    """
    return gumbel_noise_of(keys[..., 0], keys[..., 1], ids)
