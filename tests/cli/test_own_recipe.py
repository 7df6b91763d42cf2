"""`--recipe module:function`, the compilation cache of the command line, and what `--json` holds."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from djax import Parts, recipes
from djax.cli.app import app
from djax.cli.cache import use_compile_cache
from djax.cli.flags import RecipeFlags
from djax.cli.outputs import print_json
from djax.cli.recipe import build_recipe
from djax.engine.results import Generation
from djax.parts.cache_policies import Prefix
from djax.parts.strategies import LocalLeap
from djax.parts.transforms import Credit
from djax.train.config import describe_fields

MODULE = """
from djax import recipes
def mine():
    return recipes.fast_dllm(threshold=0.7, cache="none")
def numbered(sure: float, *, blocks: int | None = None, cache="dual"):
    return recipes.fast_dllm(threshold=sure, cache=cache)
def wrong():
    return 3
value = recipes.llada()
def failing():
    return {}["strategy"]
"""
BROKEN = {"syntax": "def f(:", "raising": "1 / 0", "leaving": "raise SystemExit(3)"}
SHORT = {"index", "text", "tokens", "length", "nfe", "refreshes", "tokens_per_forward", "stop_reason", "masked_left"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_recipes_of_a_test.py").write_text(MODULE)
    for name, text in BROKEN.items():
        (tmp_path / f"broken_recipe_{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_of_ones_own(here: Path) -> None:
    module = "own_recipes_of_a_test"
    assert build_recipe(RecipeFlags(recipe=f"{module}:mine")) == recipes.fast_dllm(threshold=0.7, cache="none")
    assert build_recipe(RecipeFlags(recipe=f"{module}:value")) == recipes.llada()
    given = RecipeFlags(recipe=f"{module}:numbered", set=["cache=prefix", "sure=0.7", "strategy.threshold=0.6"])
    assert build_recipe(given) == recipes.fast_dllm(threshold=0.6, cache="prefix")
    changed = RecipeFlags(recipe=f"{module}:mine", strategy="local-leap", cache="prefix", set=["transform=credit"])
    assert build_recipe(changed) == Parts(strategy=LocalLeap(), cache_policy=Prefix(), transform=Credit())


@pytest.mark.parametrize(("arguments", "message"), [
    (["--recipe", "own_recipes_of_a_test:absent"], "--recipe: got 'own_recipes_of_a_test:absent' (module"),
    (["--recipe", "no_such_module_here:f"], "--recipe: got 'no_such_module_here:f' (No module named"),
    (["--recipe", "own_recipes_of_a_test:wrong"], "--recipe: got 'own_recipes_of_a_test:wrong', which gives 3; "),
    (["--recipe", "own_recipes_of_a_test:failing"],
     "--recipe: got 'own_recipes_of_a_test:failing', which fails (KeyError: 'strategy'); allowed a function"),
    (["--recipe", "./own_recipes_of_a_test:mine"], "--recipe: got './own_recipes_of_a_test:mine' ("),
    *((["--recipe", f"broken_recipe_{name}:f"], f"--recipe: got 'broken_recipe_{name}:f' (") for name in BROKEN),
    (["--recipe", ":"], "--recipe: got ':' ("),
    (["--recipe", "own_recipes_of_a_test:numbered"],
     "--set sure: got nothing; allowed a number; give it: --set sure=VALUE"),
    (["--recipe", "own_recipes_of_a_test:numbered", "--set", "blocks=x"],
     "--set blocks: got 'x'; allowed none, an integer; give one of them"),
    (["--recipe", "own_recipes_of_a_test:mine", "--set", "sure=0.5"], "--set sure: got 'sure'; allowed strategy, "),
])
def test_a_wrong_one_is_one_line(here: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["generate", "hi", *arguments])
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines() == [result.stderr.strip()]
    assert message in result.stderr


def test_the_cache_is_the_users_own_or_one_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache
    try:
        use_compile_cache(True)
        assert jax.config.jax_compilation_cache_dir == before[0], "the environment's is kept"
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        use_compile_cache(True)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "djax" / "programs")
        use_compile_cache(False)
        assert not jax.config.jax_enable_compilation_cache
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_enable_compilation_cache", before[1])


def test_json_is_short_unless_it_is_asked_for_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    row = np.zeros((1, 3), np.int32)
    generation = Generation(
        text=["a"], tokens=[row[0]], canvas=row, canvas_mask=row == 0, is_open=row == 0, is_masked=row == 1,
        lengths=row[:, 0] + 3, nfe=row[:, 0] + 2, steps=row[:, 0] + 2, refreshes=row[:, 0], stop_reason=["length"],
        commit_step=row, log_prob=np.full((1, 3), -np.inf, np.float32))
    print_json(generation, full=False)
    print_json(generation, full=True)
    short, full = map(json.loads, capsys.readouterr().out.splitlines())
    assert set(short) == SHORT
    assert set(full) == SHORT | {"canvas", "positions", "commit_step", "log_prob"}
    assert {name: full[name] for name in SHORT} == short
    assert full["log_prob"] == [None] * 3


def test_every_field_of_a_training_run_is_explained() -> None:
    """A field without a text below it fails in here."""
    lines = describe_fields()
    assert "training.steps (integer, required): Updates of the whole run." in lines
    assert "mesh.data (1): Devices over which a batch's rows are split." in lines
    assert len(lines) > 30
