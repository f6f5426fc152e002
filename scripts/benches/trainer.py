"""The trainer's step against a bare loop of the same parts, and what a checkpoint costs."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benches.timing import interleaved, show_ratio

import recurgolf
from recurgolf.training.job import Job
from recurgolf.training.precision import autocast
from recurgolf.training.state import TrainState
from recurgolf.training.trainer import Trainer


def main(asked: argparse.Namespace) -> None:
    """Everything the trainer does around a step, against the step alone."""
    # Without a cap: a step that the clock forbids would take no time.
    own = ["tracker=offline", "trainer.steps=10000", "budget.train_seconds=null"]
    run = recurgolf.compose([*own, *asked.overrides])
    with tempfile.TemporaryDirectory() as folder:
        job = Job.watched(run, Path(folder))
        trainer = Trainer(job)
        trainer.setup()
        state = trainer.state
        model, optimizers, loader = state.model, state.optimizers, state.loader
        config, plan = run.trainer, run.plan(0.0)

        def bare() -> None:
            x, y = loader.next_batch(config.batch_tokens, 1)
            with autocast(job.precision, job.device):
                loss = model(x, plan, y)
            loss.backward()
            optimizers.step(1.0, 0.95, 0.0)
            optimizers.zero_grad()

        with job.log.bar("training", 10_000) as bar, job.clock.phase("training"):
            times = interleaved(
                {"bare loop": bare, "trainer": lambda: trainer.advance(bar)}, asked.rounds
            )
            saving = statistics.median(seconds_to_save(job, state) for _ in range(5))
        job.tracker.finish()
    show_ratio("trainer / bare loop", times, "trainer", "bare loop", 1.03)
    share = saving / config.checkpoint_seconds
    print(f"a checkpoint: {1000 * saving:.0f} ms, one every {config.checkpoint_seconds:.0f} s")
    print(f"stall: {share:.2%} of training (at most 5%)")


def seconds_to_save(job: Job, state: TrainState) -> float:
    """A checkpoint, on disk when it returns, and the removal of the one before."""
    job.guard.saved_at = -1
    state.step += 1
    began = time.perf_counter()
    job.guard.save(job, state)
    return time.perf_counter() - began
