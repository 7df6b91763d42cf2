"""DESIGN's import directions and the package's public face, read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("djax", "kernels_pallas", "convert")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

LAYERS = [
    {"struct", "errors", "ambient", "interrupts"},
    {"types", "config", "schedules", "keys"},
    {"canvas", "cache"},
    {"transforms", "proposals", "strategies", "cache_policies", "smoothing", "stopping"},
    {"part_shapes"},
    {"state"},
    {"step"},
    {"denoise"},
    {"recipes"},
]
"""Inside djax imports go downwards only; files of one layer do not import each other (but a family's own)."""


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Modules a file imports, relative imports left out (there are none)."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_follow_the_direction(path):
    name = relative(path)
    used = roots(path)
    if name.startswith("kernels_pallas/"):
        assert used <= {"__future__", "jax", "jaxtyping", "numpy", "kernels_pallas"} | set(sys.stdlib_module_names)
    elif name.startswith("convert/"):
        inner = {module for module in imports(path) if module.startswith("djax")}
        allowed = ("djax.config", "djax.models", "djax.sharding", "djax.distributed", "djax.errors",
                   "djax.__version__")
        assert all(module == "djax" or module.startswith(allowed) for module in inner), inner
        assert "kernels_pallas" not in used
    else:
        if "convert" in used:
            assert name.startswith(("djax/api.py", "djax/cli", "djax/train/bundled/"))
        if "kernels_pallas" in used:
            assert name.startswith("djax/models/") or name == "djax/proposals.py"
        if "transformers" in used or "tokenizers" in used:
            assert name in ("djax/text.py", "djax/train/bundled/tokenizer.py")
    assert not used & {"torch", "tokamax", "tests", "benchmarks"}
    assert "tunix" not in used or name == "djax/rl/tunix.py"


@pytest.mark.parametrize(
    ("layer", "module"), [(n, module) for n, layer in enumerate(LAYERS) for module in sorted(layer)])
def test_djax_imports_downwards(layer, module):
    paths = sorted((ROOT / "djax" / module).rglob("*.py")) or [ROOT / "djax" / f"{module}.py"]
    above = set().union(*LAYERS[layer:]) - {module}
    other = {"api", "models", "cli", "text", "generation", "calls", "memory", "prompts", "live",
             "running", "program"}
    for path in paths:
        used = {name.split(".")[1] for name in imports(path) if name.startswith("djax.")}
        assert not used & (above | other), f"{relative(path)} imports {used & (above | other)}"


def test_the_loop_knows_no_model_and_no_flax():
    assert not {name for name in imports(ROOT / "djax" / "denoise.py") if name.split(".")[0] == "flax"}
    for path in (ROOT / "djax" / "models").rglob("*.py"):
        assert not {name for name in imports(path) if name.startswith(("djax.denoise", "djax.state"))}


def test_importing_djax_is_light():
    code = "import sys, djax; print([m for m in ('torch', 'transformers', 'tunix', 'tokamax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_public_functions_are_typed_and_nothing_asserts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"{relative(path)}:{node.lineno}: assert in library code"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [a.arg for a in arguments if a.arg not in ("self", "cls") and a.annotation is None]
            assert node.returns is not None, f"{relative(path)}:{node.lineno} {node.name}: no return type"
            assert not untyped, f"{relative(path)}:{node.lineno} {node.name}: {untyped} untyped"


def test_the_wheel_lists_every_package():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    present = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in FILES}
    assert listed == present
