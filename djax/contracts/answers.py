"""Answers that a part may give about itself beyond its protocol, and the cautious default for one that gives none.

A part answers with an attribute or a method of the function's name, so that no caller has to know its class.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from djax.contracts.types import FORBID_NOTHING, CachePolicy, Forbidden, PartState, Propose, Transform


def needs_logits(part: Any) -> bool:
    """Whether a transform, proposal or denoiser cannot do with a `Reading`. Unsaid: yes.

    Raises:
        TypeError: it says neither True nor False: a text or a method would count as True.
    """
    said = getattr(part, "needs_logits", True)
    if not isinstance(said, bool):
        raise TypeError(f"needs_logits of {type(part).__name__} is {said!r}, not True or False")
    return said


def forbids(transform: Transform) -> bool:
    """Whether a reading transform drops tokens. Unsaid: if it has a `forbidden`."""
    return bool(getattr(transform, "forbids", hasattr(transform, "forbidden")))


def forbidden(transform: Transform) -> Forbidden:
    """The tokens that a transform drops whatever the logits are. Unsaid: none."""
    said = getattr(transform, "forbidden", None)
    return FORBID_NOTHING if said is None else said()


def distribution_changes(part: Transform | Propose) -> tuple[Any, ...]:
    """The parts of a transform or proposal because of which tokens are not drawn from the allowed tokens' softmax.

    Unsaid: the part itself.
    """
    return getattr(part, "distribution_changes", (part,))


def wanted_ids(transform: Transform, state: PartState) -> Int[Array, "B L S"] | None:
    """The tokens whose logits a reading transform has to know. Unsaid: none."""
    said = getattr(transform, "wanted_ids", None)
    return None if said is None else said(state)


def sampling_temperature(propose: Propose) -> float | Float[Array, ""]:
    """The temperature of a proposal's draw, 0 for none. Unsaid: 0."""
    said = getattr(propose, "sampling_temperature", None)
    return 0.0 if said is None else said()


def check_model(
    policy: CachePolicy, *, architecture: str, model_block_length: int | None, block_length: int, gaps: bool
) -> None:
    """Have a cache policy refuse a model, block length or canvas for which it is not what it says. Unsaid: none.

    Args:
        policy: the cache policy.
        architecture: the model's name, for messages.
        model_block_length: of the model's attention; None for a model without blocks.
        block_length: positions that are decoded together.
        gaps: whether there may be blocks without open positions between others, as in infilling.

    Raises:
        ArgumentError: the policy refuses.
    """
    said = getattr(policy, "check_model", None)
    if said is not None:
        said(architecture=architecture, model_block_length=model_block_length, block_length=block_length, gaps=gaps)
