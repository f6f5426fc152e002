"""Milliseconds per visit at 1, 2, 4 and 8 passes."""

from __future__ import annotations

import argparse

import torch
from benches.timing import interleaved

import recurgolf


def main(asked: argparse.Namespace) -> None:
    """Time grows linearly in visits."""
    for passes in (1, 2, 4, 8):
        run = recurgolf.compose(["looping=cycle", f"looping.passes={passes}", *asked.overrides])
        model, plan = run.build_model(), run.plan(1.0)
        tokens = torch.randint(0, run.model.vocab_size, (8, 256))

        def step(model=model, plan=plan, tokens=tokens) -> None:
            model.zero_grad(set_to_none=True)
            model(tokens, plan, tokens).backward()

        (milliseconds,) = interleaved({"step": step}, asked.rounds).values()
        per_visit = milliseconds / plan.num_visits
        print(f"  {passes} passes, {plan.num_visits:3d} visits {milliseconds:9.1f} ms")
        print(f"    per visit {per_visit:9.2f} ms")
