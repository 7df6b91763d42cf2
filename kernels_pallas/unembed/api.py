"""The op `unembed` and the choice of its implementation."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from kernels_pallas.dispatch import Implementation, resolve
from kernels_pallas.hardware import current_platform
from kernels_pallas.unembed.reference import unembed_reference
from kernels_pallas.unembed.support import any_call, unsupported_by_mosaic_gpu, unsupported_by_pallas_tpu
from kernels_pallas.unembed.types import Call, Readout
from kernels_pallas.unembed.xla_stream import unembed_xla_stream


def _mosaic_gpu(call: Call) -> Readout:
    # imported where it is used: Mosaic takes half a second
    from kernels_pallas.unembed.pallas_mosaic_gpu import unembed_mosaic_gpu

    return unembed_mosaic_gpu(call)


def _pallas_tpu(call: Call) -> Readout:
    from kernels_pallas.unembed.pallas_tpu import unembed_pallas_tpu

    return unembed_pallas_tpu(call)


_FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "reference": (unembed_reference, any_call),
    "xla_stream": (unembed_xla_stream, any_call),
    "mosaic_gpu": (_mosaic_gpu, unsupported_by_mosaic_gpu),
    "pallas_tpu": (_pallas_tpu, unsupported_by_pallas_tpu),
}
IMPLEMENTATIONS = {name: Implementation(*functions) for name, functions in _FUNCTIONS.items()}

_SMALL = 2**22
"""Logits in all up to which a CPU had better compute them at once: a chunk's overhead shows below, memory above."""


def _preference(platform: str, call: Call) -> tuple[str, ...]:
    """Names, best first."""
    if platform == "cpu":
        small = call.hidden.shape[0] * call.head.shape[0] <= _SMALL
        return ("reference", "xla_stream") if small else ("xla_stream", "reference")
    return {"gpu": ("mosaic_gpu", "xla_stream"), "tpu": ("pallas_tpu", "xla_stream")}.get(platform, ("xla_stream",))


def _check(call: Call) -> None:
    """Raise ValueError where shapes or dtypes do not fit together."""
    hidden, head = call.hidden, call.head
    if len(hidden.shape) != 2 or len(head.shape) != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"unembed: got hidden {tuple(hidden.shape)} and head {tuple(head.shape)}; they must be [N, D] and [V, D]: "
            "fold batch axes into N")
    if 0 in (*hidden.shape, *head.shape):
        raise ValueError(
            f"unembed: got hidden {tuple(hidden.shape)} and head {tuple(head.shape)}; every axis must be at least 1")
    if hidden.dtype != head.dtype:
        raise ValueError(
            f"hidden: got dtype {hidden.dtype} with head {head.dtype}; they must be one dtype: cast hidden to the "
            "weights'")
    rows, vocabulary = hidden.shape[0], head.shape[0]
    if call.at is not None and (len(call.at.shape) != 2 or call.at.shape[0] != rows):
        raise ValueError(f"at: got shape {tuple(call.at.shape)}; with hidden {tuple(hidden.shape)} it must be "
                         f"[{rows}, A]: some ids for each row")
    if call.forbidden is not None and len(call.forbidden.shape) != 1:
        raise ValueError(f"forbidden: got shape {tuple(call.forbidden.shape)}; it must be [n], ids for all rows")
    if call.temperature is not None and call.noise_keys is None:
        raise ValueError("noise_keys: got None with a temperature; give [N, 2] uint32 words, a key for each row")
    if call.noise_keys is not None and (tuple(call.noise_keys.shape) != (rows, 2) or call.noise_keys.dtype != "uint32"):
        raise ValueError(f"noise_keys: got {call.noise_keys.dtype} {tuple(call.noise_keys.shape)}; with hidden "
                         f"{tuple(hidden.shape)} they must be uint32 ({rows}, 2)")
    if call.embedding is not None and (len(call.embedding.shape) != 2 or call.embedding.shape[0] != vocabulary):
        raise ValueError(f"embedding: got shape {tuple(call.embedding.shape)}; with head {tuple(head.shape)} it must "
                         f"be [{vocabulary}, D2]")


def complete(call: Call) -> Call:
    """The call as implementations take it: arrays of one integer type, and neutral ones for what was not given."""
    largest = jnp.iinfo(jnp.int32).max
    return call._replace(
        at=jnp.zeros((call.hidden.shape[0], 0), jnp.int32) if call.at is None else jnp.asarray(call.at, jnp.int32),
        forbidden=jnp.asarray([] if call.forbidden is None else call.forbidden, jnp.int32),
        vocab_limit=jnp.asarray(largest if call.vocab_limit is None else call.vocab_limit, jnp.int32),
        temperature=None if call.temperature is None else jnp.asarray(call.temperature, jnp.float32),
        first_id=jnp.asarray(call.first_id, jnp.int32))


def unembed_choice(
    hidden: Any,
    head: Any,
    *,
    at: Any = None,
    forbidden: Any = None,
    vocab_limit: Any = None,
    temperature: Any = None,
    noise_keys: Any = None,
    embedding: Any = None,
    second: bool = False,
    entropy: bool = False,
    first_id: Any = 0,
    implementation: str | None = None,
    platform: str | None = None,
) -> str:
    """Name of the implementation that `unembed` uses for these operands.

    Operands may be arrays or anything with a `shape` and a `dtype`. `platform` ("cpu", "gpu", "tpu") is the
    one in use if None.

    Raises:
        ValueError: operands do not fit together, or the name is unknown.
        NotImplementedError: the named implementation does not support the call.
    """
    call = Call(hidden, head, at, forbidden, vocab_limit, temperature, noise_keys, embedding, second, entropy, first_id)
    _check(call)
    platform = current_platform() if platform is None else platform
    return resolve(
        "unembed", IMPLEMENTATIONS, implementation=implementation,
        preference=_preference(platform, call), platform=platform, operands=(call,))


def unembed(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    *,
    at: Int[Array, "N A"] | None = None,
    forbidden: Int[Array, " n"] | None = None,
    vocab_limit: Int[Array, ""] | int | None = None,
    temperature: Float[Array, ""] | float | None = None,
    noise_keys: UInt32[Array, "N 2"] | None = None,
    embedding: Float[Array, "V D2"] | None = None,
    second: bool = False,
    entropy: bool = False,
    first_id: Int[Array, ""] | int = 0,
    implementation: str | None = None,
) -> Readout:
    """Give what a denoising step needs of the logits hidden @ head^T: never the logits themselves.

    Logits are accumulated in float32 (all bits of float32 operands count). Values of `forbidden`,
    `vocab_limit`, `temperature` and `first_id` are traced: changing them compiles nothing. Rows do not touch
    each other: a NaN stays in its row. Not differentiable in general.

    Args:
        hidden: rows, in the head's dtype.
        head: one row an id.
        at: ids whose logits are wanted, for each row.
        forbidden: few ids that no row may take; one outside the vocabulary (-1) forbids nothing.
        vocab_limit: ids from it on are forbidden too.
        temperature: draws from softmax(logits / temperature) by the Gumbel-max trick, needs `noise_keys`; at 0
            the draw is the best id, in the same program.
        noise_keys: two words a row; the noise is `gumbel_noise(noise_keys[n], id)` however the work is cut.
        embedding: asks for the expected embedding; it costs as much as the head again.
        second: asks for the runner-up.
        entropy: asks for the entropy.
        first_id: id of the head's first row. A shard of the vocabulary gives its own, takes all other ids as
            they are, returns them so, and `combine_readouts` joins the shards.
        implementation: a name in `IMPLEMENTATIONS`, or None for the best on this platform (`unembed_choice`
            says which).

    Returns:
        A `Readout`; `at` is [N, 0] if not asked for.

    Raises:
        ValueError: shapes or dtypes do not fit together, a temperature without keys, or an unknown name.
        NotImplementedError: the named implementation does not support the call.
    """
    name = unembed_choice(
        hidden, head, at=at, forbidden=forbidden, vocab_limit=vocab_limit, temperature=temperature,
        noise_keys=noise_keys, embedding=embedding, second=second, entropy=entropy, first_id=first_id,
        implementation=implementation)
    call = complete(Call(
        hidden, head, at, forbidden, vocab_limit, temperature, noise_keys, embedding,  # type: ignore[arg-type]
        second, entropy, first_id))  # type: ignore[arg-type]
    readout: Any = IMPLEMENTATIONS[name].function(call)
    return readout
