"""Milliseconds per visit at 1, 2, 4 and 8 passes, and the straight line through them."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from benches.timing import interleaved

import recurgolf
from recurgolf.run import Run

PASSES = (1, 2, 4, 8)


def main(asked: argparse.Namespace) -> None:
    """Forward and backward of one batch: time = readout and embedding + visits x time per visit.

    The run's own looping is taken where it has passes, a cycle of all blocks otherwise.
    """
    own = recurgolf.compose(asked.overrides)
    kind = [] if hasattr(own.looping, "passes") else ["looping=cycle"]
    steps: dict[str, Callable[[], object]] = {}
    visits: dict[str, int] = {}
    for passes in PASSES:
        run = recurgolf.compose([*asked.overrides, *kind, f"looping.passes={passes}"])
        name = f"{passes} passes"
        steps[name], visits[name] = step_of(run), run.plan(1.0).num_visits
    times = interleaved(steps, asked.rounds)
    count, spent = np.array([*visits.values()], float), np.array([*times.values()])
    per_visit, rest = np.polyfit(count, spent, 1)
    print(f"{own.name}: embedding and readout {rest:.1f} ms, then {per_visit:.2f} ms per visit")
    for name, milliseconds in times.items():
        alone = (milliseconds - rest) / visits[name]
        print(
            f"  {name:<10}{visits[name]:4d} visits {milliseconds:9.1f} ms "
            f"{alone:9.2f} ms per visit, {alone / per_visit:.2f} of the line's"
        )
    left = spent - (rest + per_visit * count)
    explained = 1 - (left @ left) / ((spent - spent.mean()) ** 2).sum()
    print(f"straight line: R2 = {explained:.4f}, largest deviation {max(abs(left / spent)):.1%}\n")


def step_of(run: Run) -> Callable[[], object]:
    """One forward and backward over a batch of the run's own shape."""
    model, plan = run.build_model(), run.plan(1.0)
    rows = max(1, run.trainer.batch_tokens // run.trainer.seq_len)
    tokens = torch.randint(0, run.model.vocab_size, (min(rows, 8), min(run.trainer.seq_len, 256)))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, plan, tokens).backward()

    return step
