"""Trainers for tests that do not go to a run's end."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from smoke_runs import small

import recurgolf
from recurgolf.run import Run
from recurgolf.training.job import Job
from recurgolf.training.trainer import Trainer


@pytest.fixture
def trainer_in() -> Iterator[Callable[..., Trainer]]:
    """Makes a trainer, set up, of a small run with some overrides or of a Run.

    Its log and its record are closed after the test.
    """
    jobs: list[Job] = []

    def make(folder: Path, *overrides: str, run: Run | None = None) -> Trainer:
        folder.mkdir(exist_ok=True)
        jobs.append(Job.watched(run or recurgolf.compose(small(*overrides)), folder))
        trainer = Trainer(jobs[-1])
        trainer.setup()
        return trainer

    yield make
    for job in jobs:
        job.tracker.finish()
        job.log.close()
