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
    {"struct"},
    {"types", "config", "schedules"},
    {"canvas", "cache"},
    {"transforms", "proposals", "strategies", "cache_policies", "smoothing", "stopping"},
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


def wrong_imports(path: Path) -> set[str]:
    """What a file imports and may not."""
    name = relative(path)
    used = roots(path)
    wrong = used & {"torch", "tokamax", "tests", "benchmarks"}
    if name != "djax/rl/tunix.py":
        wrong |= used & {"tunix"}
    if name.startswith("kernels_pallas/"):
        wrong |= used - {"__future__", "jax", "jaxtyping", "numpy", "kernels_pallas"} - set(sys.stdlib_module_names)
    elif name.startswith("convert/"):
        inner = {module for module in imports(path) if module.startswith("djax")}
        allowed = ("djax.config", "djax.errors", "djax.models", "djax.sharding", "djax.distributed", "djax.__version__")
        wrong |= {module for module in inner if module != "djax" and not module.startswith(allowed)}
        wrong |= used & {"kernels_pallas"}
    else:
        if not name.startswith(("djax/api.py", "djax/cli", "djax/train/bundled/")):
            wrong |= used & {"convert"}
        if not name.startswith("djax/models/") and name != "djax/proposals.py":
            wrong |= used & {"kernels_pallas"}
        if name not in ("djax/text.py", "djax/train/bundled/tokenizer.py"):
            wrong |= used & {"transformers", "tokenizers"}
    return wrong


def test_imports_follow_the_direction():
    wrong = {relative(path): wrong_imports(path) for path in FILES}
    assert not {name: modules for name, modules in wrong.items() if modules}


@pytest.mark.parametrize(
    ("layer", "module"), [(n, module) for n, layer in enumerate(LAYERS) for module in sorted(layer)])
def test_djax_imports_downwards(layer, module):
    paths = sorted((ROOT / "djax" / module).rglob("*.py")) or [ROOT / "djax" / f"{module}.py"]
    above = set().union(*LAYERS[layer:]) - {module}
    other = {"api", "models", "cli", "text", "generation", "calls", "memory", "prompts", "live"}
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


def untyped_or_asserting(path: Path) -> list[str]:
    """Every assert, and every public function with something that is not typed."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assert):
            found.append(f"{relative(path)}:{node.lineno}: assert in library code")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [a.arg for a in arguments if a.arg not in ("self", "cls") and a.annotation is None]
            if node.returns is None:
                found.append(f"{relative(path)}:{node.lineno} {node.name}: no return type")
            if untyped:
                found.append(f"{relative(path)}:{node.lineno} {node.name}: {untyped} untyped")
    return found


def test_public_functions_are_typed_and_nothing_asserts():
    assert not [problem for path in FILES for problem in untyped_or_asserting(path)]


def test_the_wheel_lists_every_package():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    present = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in FILES}
    assert listed == present
