"""Guards against a caller's ambient JAX state: results follow from the arguments alone.

Dtypes are explicit wherever arrays are made and keys are threefry (`djax.contracts.keys`), so neither 64-bit mode,
promotion rules nor the default random implementation matter. A caller's `jax.set_mesh` would: arrays made under it are
spread over that mesh, and no program of one device takes them. Public functions that make arrays set it aside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh


@contextmanager
def without_mesh() -> Iterator[None]:
    """Set the caller's `jax.set_mesh` aside; use it with `with`, or as a decorator of a function.

    Inside a trace nothing happens: there the mesh belongs to the program that is being made.
    """
    try:
        ambient = jax.sharding.get_mesh()
    except ValueError:  # raised while tracing
        yield
        return
    if ambient.empty:
        yield
        return
    with jax.set_mesh(Mesh(np.empty((), object), ())):
        yield


def is_traced(tree: Any) -> bool:
    """Whether any leaf belongs to a trace: of `jax.jit`, `jax.grad`, `jax.vmap`, ..."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def on_device(tree: Any) -> Any:
    """Host values moved to the default device, bound to none; arrays of JAX stay where they are.

    Explicitly, so that the caller's `jax.transfer_guard` allows it.
    """
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), tree)
