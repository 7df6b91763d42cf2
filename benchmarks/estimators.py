"""How well estimators of log p(completion | prompt) estimate: bias, spread and forwards of every scheme.

    python -m benchmarks.estimators

Completions of six tokens have 64 masked versions. All of them are scored once by a model, so that the ELBO is known
exactly and a draw of any estimator is a sum of table entries. Two policies are compared as a trainer compares them: the
same states for both, against states drawn for each.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import djax
from benchmarks.harness import report
from djax import rl, tasks
from djax.contracts.types import Forbidden

LENGTH = 6
SCHEMES: tuple[tuple[rl.Scheme, int | None], ...] = (
    ("one_step", 1), ("coupled", 3), ("gauss", 1), ("gauss", 3), ("fixed_k", 1), ("fixed_k", 3), ("fixed_k", 8),
    ("stratified", 3), ("stratified", 8), ("autoregressive", None))
SUBSETS = np.asarray(list(itertools.product((False, True), repeat=LENGTH)))[:, ::-1]
"""Row s hides token i where bit i of s is set."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One scheme, over all completions, in nats."""

    scheme: str
    forwards: int
    bias: float
    """Mean over completions of the estimates' mean minus the ELBO."""
    bias_error: float
    """Standard error of `bias`."""
    worst: float | None
    """The largest |bias| of a completion, in its standard errors; None for an estimate without noise."""
    spread: float
    """Root mean square over completions of the estimates' standard deviation."""
    error: float
    """Root mean square error against the ELBO."""
    difference_same: float
    """Spread of new minus old policy, both scored at the same states."""
    difference_apart: float
    """The same with states drawn for each."""


def elbo(table: np.ndarray) -> float:
    """The bound from log-probs [64, 6] of each token in each masked version (LLaDA, arXiv 2502.09992, eq. 6)."""
    sizes = SUBSETS.sum(axis=1)
    sums = (table * SUBSETS).sum(axis=1)
    return sum(float(sums[sizes == size].mean()) / size for size in range(1, LENGTH + 1))


def tables(lm: djax.DiffusionLM, params: Any, rollout: rl.Rollout, *, temperature: float) -> np.ndarray:
    """log-probs [B, 64, 6] of the completions' tokens in all masked versions."""
    here = slice(rollout.first_block, rollout.first_block + LENGTH)
    masks = np.zeros((rollout.batch, len(SUBSETS), rollout.length), bool)
    masks[:, :, here] = SUBSETS
    states = rl.MaskedStates(masks=masks, weights=masks.astype(np.float32))
    found = jax.jit(rl.score, static_argnames="reduce")(
        lm.denoiser, params, rollout, states, temperature=temperature, reduce="none")
    return np.asarray(found)[:, :, here].astype(np.float64)


def estimates(
    table: np.ndarray, scheme: rl.Scheme, n: int | None, *, draws: int, seed: int
) -> tuple[np.ndarray, int]:
    """Draws [draws] of an estimator of one completion, and the forwards that one takes."""
    blank = rl.as_rollout([[]] * draws, [[0] * LENGTH] * draws, mask_id=0, pad_id=0)
    states = rl.masked_states(blank, jax.random.key(seed), scheme=scheme, n=n)
    here = slice(blank.first_block, blank.first_block + LENGTH)
    masks, weights = np.asarray(states.masks)[..., here], np.asarray(states.weights, np.float64)[..., here]
    index = (masks * (1 << np.arange(LENGTH))).sum(axis=-1)
    return (table[index] * weights).sum(axis=(1, 2)), int((weights[0] != 0).any(axis=-1).sum())


def measure(
    old: np.ndarray, new: np.ndarray, scheme: rl.Scheme, n: int | None, *, draws: int, seed: int
) -> Row:
    """One scheme on the tables [B, 64, 6] of two policies."""
    biases, errors, spreads, same, apart = [], [], [], [], []
    forwards = 0
    for row, (before, after) in enumerate(zip(old, new, strict=True)):
        number = seed + 2 * row
        found, forwards = estimates(before, scheme, n, draws=draws, seed=number)
        other, _ = estimates(after, scheme, n, draws=draws, seed=number)
        independent, _ = estimates(after, scheme, n, draws=draws, seed=number + 1)
        biases.append(found.mean() - elbo(before))
        spreads.append(found.std())
        errors.append(found.std() / math.sqrt(draws))
        same.append((other - found).std())
        apart.append((independent - found).std())
    bias, spread = np.asarray(biases), _rms(spreads)
    return Row(
        scheme=scheme, forwards=forwards, bias=float(bias.mean()),
        bias_error=_rms(errors) / math.sqrt(len(bias)),
        worst=float(np.max(np.abs(bias) / np.maximum(errors, 1e-12))) if spread > 1e-6 else None,
        spread=spread, error=math.sqrt(_rms(bias) ** 2 + spread ** 2), difference_same=_rms(same),
        difference_apart=_rms(apart))


def completions(lm: djax.DiffusionLM, *, count: int, temperature: float, seed: int) -> rl.Rollout:
    """Samples of the model on its own tasks' prompts, cut to six tokens, as given tokens."""
    chosen = itertools.islice(tasks.examples(None, split="held_out", seed=seed), count)
    prompts = [lm.tokenizer.apply_chat([{"role": "user", "content": example.prompt}]) for example in chosen]
    sampled = rl.rollout(lm, prompts, key=seed, temperature=temperature, max_new_tokens=LENGTH, block_length=LENGTH,
                         stop_on_eos=False)
    tokens = [row[here].tolist() for row, here in zip(sampled.tokens, sampled.is_open, strict=True)]
    forbidden = Forbidden(ids=np.asarray([lm.config.mask_id], np.int32), limit=np.int32(lm.vocab_limit))
    return rl.as_rollout(prompts, tokens, mask_id=lm.config.mask_id, pad_id=lm.config.pad_id, forbidden=forbidden)


def show(rows: Sequence[Row]) -> Any:
    """The table that the command prints."""
    columns = ["scheme", "forwards", "bias", "±", "spread", "new - old", "apart", "ratio"]
    return report.table("log p(six tokens | prompt), nats", columns, [
        [row.scheme, str(row.forwards), f"{row.bias:+.3f}", f"{row.bias_error:.3f}", f"{row.spread:.3f}",
         f"{row.difference_same:.3f}", f"{row.difference_apart:.3f}",
         f"{row.difference_apart / row.difference_same:.1f}" if row.difference_same > 1e-6 else "-"]
        for row in rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimators", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", default="djax:base", help="checkpoint that samples and is scored")
    parser.add_argument("--new", default="djax:compressed", help="checkpoint of the same shape that it is compared to")
    parser.add_argument("--completions", type=int, default=16, help="completions (default 16)")
    parser.add_argument("--draws", type=int, default=2000, help="draws of every estimator (default 2000)")
    parser.add_argument("--temperature", type=float, default=2.0,
                        help="of sampling and scoring (default 2: the bundled model is certain of most tokens at 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="where to write the record (JSON)")
    asked = parser.parse_args(arguments)
    console = Console()
    lm = djax.load(asked.old, dtype="float32")
    with console.status("scoring all masked versions"):
        rollout = completions(lm, count=asked.completions, temperature=asked.temperature, seed=asked.seed)
        old, new = (tables(lm, params, rollout, temperature=asked.temperature) for params in (
            lm.params, djax.load(asked.new, dtype="float32").params))
    bounds = [elbo(table) for table in old]
    rows = [measure(old, new, scheme, n, draws=asked.draws, seed=1000 * index + asked.seed)
            for index, (scheme, n) in enumerate(SCHEMES)]
    console.print(show(rows))
    console.print(
        f"Bias is against the ELBO (mean {np.mean(bounds):.3f}), spread is one estimate's; one_step and autoregressive "
        "estimate other quantities, without noise, and coupled a proxy (djax.rl.masked_states). new - old: the spread "
        "of the difference of two policies scored at the same states; apart: at states drawn for each.", soft_wrap=True)
    if asked.out is not None:
        record = report.provenance("benchmarks.estimators") | {
            "arguments": {name: str(value) for name, value in vars(asked).items()}, "elbo": bounds,
            "rows": [dataclasses.asdict(row) for row in rows]}
        report.save(asked.out, record)
    return 0


def _rms(values: Sequence[float] | np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


if __name__ == "__main__":
    raise SystemExit(main())
