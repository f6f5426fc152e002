"""What bytes in the loss cost a step in time and memory: quant/qat=rate against a run without."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benches.memory import peak_above
from benches.timing import interleaved, show_ratio

import recurgolf
from recurgolf.quant.rate import EVERY
from recurgolf.training.job import Job
from recurgolf.training.trainer import Trainer


def main(asked: argparse.Namespace) -> None:
    """The trainer's step where the rate is on, in turns of as many steps as there are to a look."""
    own = ["tracker=none", "trainer.steps=10000", "budget.train_seconds=null"]
    rate = ["quant/qat=rate", "quant.qat.start_fraction=0", "artifact/codec=ans"]
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name, more in (("without", []), ("rate", rate)):
            run = recurgolf.compose([*own, *asked.overrides, *more])
            trainers[name] = Trainer(Job.watched(run, Path(folder)))
            trainers[name].setup()

        def steps(trainer: Trainer) -> None:
            for _ in range(EVERY):
                # Far from the fractions at which the file is packed to see what it takes.
                trainer.train_step(trainer.run.plan(1.0), 1.0, 0.4)
                trainer.state.step += 1

        parts = {name: lambda t=trainer: steps(t) for name, trainer in trainers.items()}
        times = interleaved(parts, asked.rounds, warmup=1)
        peak = {name: peak_above(part, trainers[name].job.device) for name, part in parts.items()}
    show_ratio(f"{EVERY} steps with rate / without", times, "rate", "without", 1.08)
    added = f"{peak['rate'] / 1e6:.1f} MB with, {peak['without'] / 1e6:.1f} MB without"
    print(f"memory of a step above what is kept between steps: {added}")
