"""The bundled tiny model: config.json, model.safetensors, tokenizer.json and its chat template.

`benchmarks/make_assets.py` writes every file here; it is read through the same path as any checkpoint.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path


def path() -> Path:
    """Directory of the bundled checkpoint."""
    return Path(str(importlib.resources.files(__name__)))
