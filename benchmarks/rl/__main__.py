"""GRPO on the bundled model, its output matrix spoiled by noise: reward curves of plain optax and of google-tunix.

    python -m benchmarks.rl                                            # optax, trainer and rollouts on one device
    python -m benchmarks.rl --placement disjoint --devices 8           # on halves of eight (virtual, on a CPU)
    python -m benchmarks.rl --trainer tunix                            # needs the extra rl
    python -m benchmarks.rl --report                                   # table and curves of the runs that are there

A run samples a few answers to each prompt of a task that can be verified, rewards the right ones, and updates the
policy on what the sampler did, step by step (`djax.rl`). After every update trainer and rollouts must hold the same
weights, and no program of the rollouts may be compiled again; a run in which that fails stops. Writes a JSON Lines file
of metrics a run, and rl.json, rl.md and rl.png of all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import jax

from benchmarks.rl import report as rl_report
from benchmarks.rl.task import PLACEMENTS, TRAINERS, TUNIX_METHODS, Run, Settings, Trainer, meshes
from benchmarks.rl.with_optax import METHODS
from benchmarks.rl.with_optax import train as train_with_optax
from djax import tasks

RESULTS = Path(__file__).parents[1] / "results" / "rl"


def _trainer(name: str) -> Trainer:
    if name == "optax":
        return train_with_optax
    from benchmarks.rl.with_tunix import train  # Tunix is an extra

    return train


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rl", description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    default = Settings()
    parser.add_argument("--trainer", choices=TRAINERS, default="optax", help="whose loop it is")
    parser.add_argument("--placement", choices=PLACEMENTS, default="colocated", help="on which devices they are")
    parser.add_argument("--devices", type=int, default=1, help="all devices; those of a CPU are virtual")
    parser.add_argument("--task", choices=list(tasks.TASKS), default=default.task, help="what is asked")
    parser.add_argument("--method", choices=list(METHODS), default=default.method, help="how a policy is scored")
    for name, help_text in (
            ("noise", "on the output matrix, in its own standard deviation"), ("updates", "of the policy"),
            ("prompts", "an update"), ("samples", "of each prompt"), ("steps", "of the sampler for an answer"),
            ("learning_rate", "of Adam"), ("held_out", "prompts to measure on"), ("evaluate_every", "updates"),
            ("seed", "of prompts and samples")):
        value = getattr(default, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=help_text)
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--report", action="store_true", help="run nothing")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    names = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(**{name: value for name, value in vars(options).items() if name in names})
    for name in ("updates", "prompts", "samples", "steps", "held_out", "evaluate_every", "devices"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(options, name)}; allowed at least 1")
    if options.trainer == "tunix" and settings.method not in TUNIX_METHODS:
        parser.error(f"--method: got {settings.method} with --trainer tunix; allowed {', '.join(TUNIX_METHODS)}; or "
                     "use --trainer optax")
    if not options.report:
        jax.config.update("jax_num_cpu_devices", options.devices)
        try:
            train = _trainer(options.trainer)
            trainer, rollouts = meshes(options.placement, options.devices)
        except ImportError as error:
            parser.error(f"--trainer: got tunix, which cannot be imported ({error}); pip install 'djax[rl]', or use "
                         "--trainer optax")
        except ValueError as error:
            parser.error(f"--{error}")
        path = options.output / f"{options.trainer}-{settings.method}-{options.placement}.jsonl"
        with Run(path, settings, title=path.stem) as run:
            train(settings, run, trainer, rollouts)
        rl_report.keep(path, run, settings, devices=options.devices)
    print(rl_report.write(options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
