"""Replay dInfer's recorded traces through `lm.generate`: tokens exactly, steps as NFE, in float32.

    python -m tests.replay_goldens DIR [DIR ...] [--kernels moe=reference,unembed=xla_stream] [--mesh tensor=2,expert=4]

A directory holds config.json, model.safetensors and cases.jsonl (see tests/goldens/*/README.md).
Prints every case that differs, and ends with "N passed, M failed".
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

import djax
from djax.devices.sharding import make_mesh, parse_mesh
from djax.parts.cache_policies import BlockCausal, Dual, NoCache, Prefix, Vicinity, WithWarmup
from djax.parts.schedules import Linear
from djax.parts.smoothing import HardTokens, SoftTokens
from djax.parts.strategies import Hierarchical, Threshold
from djax.parts.transforms import Credit, Identity
from djax.recipes import Recipe
from tests.support.select import SelectStrategy, SelectTransform

Case = dict[str, Any]


def read_cases(directory: Path) -> list[Case]:
    return [json.loads(line) for line in (directory / "cases.jsonl").read_text().splitlines() if line.strip()]


def recipe_of(case: Case) -> Recipe:
    """The recipe whose parts are those of a recorded dInfer run."""
    smooth = case["algo"].startswith("itersmooth")
    high = Linear(1.0, -0.02, minimum=case["threshold"]) if smooth else case["threshold"]
    if case["algo"] == "bd":
        cache = BlockCausal()
    elif case["algo"].endswith("vicinity"):
        cache = WithWarmup(Vicinity(before=case["before"], after=case["after"]), steps=case["warmup_steps"])
    else:
        cache = {"none": NoCache(), "prefix": Prefix(), "dual": Dual()}[case["cache"]]
    hierarchical = case["decoder"] == "hierarchy"
    return Recipe(
        strategy=Hierarchical(high=high, low=case["low_threshold"]) if hierarchical else Threshold(high),
        cache_policy=cache, transform=Credit() if case["decoder"] == "credit" else Identity(),
        smoothing=SoftTokens() if smooth else HardTokens(), mask_token="refuse")


def shared(recipe: Recipe) -> Recipe:
    """The same recipe with its strategy and transform chosen by a leaf: one program serves all decoders."""
    strategy, hierarchical = recipe.strategy, isinstance(recipe.strategy, Hierarchical)
    high = strategy.high if isinstance(strategy, Hierarchical) else strategy.threshold
    low = strategy.low if isinstance(strategy, Hierarchical) else 0.0
    return dataclasses.replace(
        recipe,
        strategy=SelectStrategy(index=int(hierarchical), parts=(Threshold(high), Hierarchical(high=high, low=low))),
        transform=SelectTransform(index=int(isinstance(recipe.transform, Credit)), parts=(Identity(), Credit())))


def with_blocks(
    lm: djax.DiffusionLM, case: Case, kernels: djax.Kernels, made: dict[int, djax.DiffusionLM]
) -> djax.DiffusionLM:
    """The model with attention blocks as long as the case's, from `made` if it is there; `lm` itself if it has none."""
    if lm.config.block_length is None:
        return lm
    length = case["block_length"]
    if length not in made:
        config = dataclasses.replace(lm.config, block_length=length)
        made[length] = djax.DiffusionLM(config, lm.params, kernels=kernels, mesh=lm.mesh)
    return made[length]


def replay(lm: djax.DiffusionLM, case: Case) -> str | None:
    """What differs from the recorded run, or None."""
    length, prompt, new_tokens = case["block_length"], case["prompt"], case["gen_length"]
    block_diffusion = case["algo"].startswith("bd")
    if block_diffusion:  # the last block is decoded to its end
        new_tokens = -(-(len(prompt) + new_tokens) // length) * length - len(prompt)
    out = lm.generate(
        [prompt], recipe=shared(recipe_of(case)), max_new_tokens=new_tokens, block_length=length,
        mask_id=case["mask_id"], eos_id=case["eos_id"], align=case["align"] or block_diffusion)
    # Without early stop dInfer ends at EOS all the same, but leaves mask ids where djax fills with EOS.
    drop = {case["eos_id"]} | (set() if case["early_stop"] else {case["mask_id"]})
    got = [int(token) for token in out.canvas[0][out.canvas_mask[0]] if token not in drop]
    expected = [token for token in case["tokens"] if token not in drop]
    problems = []
    if got != expected:
        problems.append(f"tokens {got} instead of {expected}")
    if int(out.nfe[0]) != case["steps"]:
        problems.append(f"NFE {int(out.nfe[0])} instead of {case['steps']}")
    return "; ".join(problems) or None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.replay_goldens", description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR")
    parser.add_argument(
        "--kernels", default="", help="implementations to run on, op=name with commas; default: the best ones")
    parser.add_argument("--mesh", help="axis sizes or a preset; default: one device")
    given = parser.parse_args(arguments)
    try:
        mesh = given.mesh and make_mesh(parse_mesh(given.mesh, devices=jax.device_count()))
    except ValueError as error:
        parser.error(f"--mesh: {error}")
    try:
        kernels = djax.Kernels(**dict(pair.split("=") for pair in given.kernels.split(",") if pair))
    except (TypeError, ValueError) as error:
        parser.error(f"--kernels: {error}")
    for directory in given.directories:
        for name in ("config.json", "cases.jsonl"):
            if not (directory / name).is_file():
                parser.exit(2, f"{parser.prog}: DIR: got {str(directory)!r}, which has no {name}\n")
    passed = failed = 0
    for directory in given.directories:
        made: dict[int, djax.DiffusionLM] = {}
        lm = djax.load(directory, dtype="float32", kernels=kernels, mesh=mesh)
        for number, case in enumerate(read_cases(directory), start=1):
            problem = replay(with_blocks(lm, case, kernels, made), case)
            passed, failed = passed + (problem is None), failed + (problem is not None)
            if problem is not None:
                what = {name: case[name] for name in ("algo", "decoder", "cache", "block_length", "align")}
                print(f"{directory}/cases.jsonl:{number}: {what}: {problem}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
