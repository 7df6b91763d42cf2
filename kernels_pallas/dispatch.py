"""Resolution of `implementation=`, the same way for every op.

None picks the best implementation that supports the call on the platform in use; an explicit name never
falls back to another one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `function` takes the op's arrays. `unsupported` takes the platform and the same arrays (or anything with
    their `shape` and `dtype`) and says why it cannot compute them, or None if it can.
    """

    function: Callable[..., Any]
    unsupported: Callable[..., str | None]


def resolve(
    op: str,
    implementations: Mapping[str, Implementation],
    *,
    implementation: str | None,
    preference: Sequence[str],
    platform: str,
    operands: Sequence[Any],
) -> str:
    """Name of the implementation that a call uses.

    `preference` lists names, best first; it is read only when `implementation` is None.

    Raises:
        ValueError: `implementation` is not a known name.
        NotImplementedError: the named implementation, or every preferred one, does not support the call.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(
                f"implementation: got {implementation!r}; {op} has {', '.join(map(repr, implementations))}, "
                "or None to pick one")
        reason = implementations[implementation].unsupported(platform, *operands)
        if reason is not None:
            raise NotImplementedError(
                f"{op}: implementation {implementation!r} does not support this call: {reason}. "
                "Name another one, or pass None to pick one")
        return implementation
    reasons = []
    for name in preference:
        reason = implementations[name].unsupported(platform, *operands)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(
        f"{op}: no implementation supports this call on {platform!r} ({'; '.join(reasons)})")
