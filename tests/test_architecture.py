"""The rooms' import directions and the package's public face, read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import djax

ROOT = Path(__file__).parents[1]
PACKAGES = ("djax", "kernels_pallas", "convert")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

FLOORS = (
    {"errors"},
    {"contracts", "tasks", "assets"},
    {"devices"},
    {"parts", "models"},
    {"loop"},
    {"recipes"},
    {"engine"},
    {"plan"},
    {"api"},
    {"rollouts", "train"},
    {"rl", "testing"},
    {"cli"},
)
"""The rooms of djax, from the ground up: each imports only from floors below its own."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


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


def test_every_folder_says_what_it_is_for():
    """In one sentence: a folder that needs an "and" is two."""
    folders = [path for package in (*PACKAGES, "benchmarks", "tests") for path in (ROOT / package).rglob("__init__.py")]
    first = {relative(path): (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0] for path in folders}
    assert [path for path, line in first.items() if not line.endswith(".") or " and " in line] == []


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_follow_the_direction(path):
    name = relative(path)
    used = roots(path)
    if name.startswith("kernels_pallas/"):
        assert used <= {"__future__", "jax", "jaxtyping", "numpy", "kernels_pallas"} | set(sys.stdlib_module_names)
    elif name.startswith("convert/"):
        inner = {module for module in imports(path) if module.startswith("djax")}
        allowed = ("djax.models", "djax.devices", "djax.contracts", "djax.errors", "djax.__version__")
        assert all(module == "djax" or module.startswith(allowed) for module in inner), inner
        assert "kernels_pallas" not in used
    else:
        if "convert" in used:
            assert name.startswith(("djax/api.py", "djax/cli/", "djax/train/bundled/"))
        if "kernels_pallas" in used:
            assert name.startswith("djax/models/") or name == "djax/parts/proposals.py"
        if "transformers" in used or "tokenizers" in used:
            assert name in ("djax/engine/tokenizer.py", "djax/train/bundled/tokenizer.py")
    assert not used & {"torch", "tokamax", "benchmarks"}
    assert "tunix" not in used or name == "djax/rl/tunix.py"


def test_nobody_imports_tests():
    for package in (*PACKAGES, "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            assert "tests" not in roots(path), relative(path)


def room(path: Path) -> str:
    """The folder of djax, or the file that lies in none."""
    return path.relative_to(ROOT / "djax").parts[0].removesuffix(".py")


def rooms_used(path: Path) -> set[str]:
    """Rooms a file imports; `from djax import x` gives the room that x lives in."""
    used = set()
    for name in imports(path):
        _, _, inner = name.partition("djax.") if name.startswith("djax.") else ("", "", "")
        first = inner.split(".")[0]
        if first in djax._HOME:
            first = djax._HOME[first].split(".")[0]
        used.add(djax._ROOM.get(first, first))
    return used - {"", "__version__"}


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES if path.is_relative_to(ROOT / "djax")} - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_rooms_import_from_the_floors_below(name):
    up = {}
    for path in FILES:
        if path.is_relative_to(ROOT / "djax") and room(path) == name:
            wrong = {used for used in rooms_used(path) - {name} if FLOOR.get(used, len(FLOORS)) >= FLOOR[name]}
            if wrong:
                up[relative(path)] = wrong
    assert not up


def test_the_loop_knows_no_model_and_no_flax():
    for path in (ROOT / "djax" / "loop").rglob("*.py"):
        assert "flax" not in roots(path), path
    for path in (ROOT / "djax" / "models").rglob("*.py"):
        assert not {name for name in imports(path) if name.startswith("djax.loop")}


def test_parts_know_no_sibling():
    """A wrapper is given what it wraps. What they share: schedules, `selection`, and the packages' own `__init__`."""
    parts = ROOT / "djax" / "parts"
    shared = {"djax.parts.schedules", "djax.parts.strategies.selection"}
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in parts.rglob("*.py")}
    for path in parts.rglob("*.py"):
        if path.name not in ("__init__.py", "registry.py"):
            assert not imports(path) & (modules - shared), path


def test_public_names_are_there():
    """The addresses that users have, as attributes: moves of modules change none of them."""
    names = (
        "load DiffusionLM denoise Canvas Generation StreamStep Kernels Result StopReason Parts Sampling "
        "strategies.Threshold transforms.Credit cache_policies.Vicinity proposals.Sample smoothing.SoftTokens "
        "stopping.OnEos schedules.Linear recipes.dinfer sharding.make_mesh distributed.initialize testing.check_part "
        "struct.dataclass types.Decision rl.rollout rl.score rl.accept rl.losses.grpo_loss rl.advantages.Scale "
        "rl.policy train.make_step train.tasks.held_out_set tasks.held_out_set plan.plan")
    code = "import djax, djax.rl.losses, djax.rl.advantages, djax.rl.policy, operator; " \
           f"[operator.attrgetter(name)(djax) for name in {names!r}.split()]; " \
           "import convert, kernels_pallas as k; k.moe, k.attention, k.unembed; " \
           "convert.load_params, convert.convert, convert.export, convert.describe"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_djax_is_light():
    heavy = ("jax", "torch", "transformers", "tunix", "tokamax")
    code = f"import sys, djax; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_an_attribute():
    assert {"plan", "tasks", "train"} <= set(djax.__all__)
    for name in djax.__all__:
        assert getattr(djax, name).__name__.split(".")[-1] == name


def test_the_api_loads_no_data_sheets():
    code = "import sys, djax.api, djax.rl; print([m for m in sys.modules if m.startswith('djax.plan')])"
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
