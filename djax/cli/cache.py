"""The directory of compiled programs, so that the next command does not compile them again."""

from __future__ import annotations

import os
from pathlib import Path

COMPILE_CACHE_HELP = "Compile anew, and keep nothing in ~/.cache/djax (or $XDG_CACHE_HOME, $JAX_COMPILATION_CACHE_DIR)."


def use_compile_cache(wanted: bool) -> None:
    """Keep and reuse compiled programs on disk, or not. A cache that the user's environment names goes first.

    The library leaves JAX's settings alone; a process that only runs one command may set them.
    """
    import jax

    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
    elif not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "djax" / "programs"))
        # most of a small model's programs take less than the second that JAX asks for by default
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
