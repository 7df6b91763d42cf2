"""The type of every recipe."""

from __future__ import annotations

from jaxtyping import Array, Float

from djax.loop.state import Parts

Number = float | Float[Array, ""]
"""A number of a recipe: Python's, or a traced scalar in a sweep."""
Recipe = Parts
"""A choice of parts, some of them left at their defaults."""
