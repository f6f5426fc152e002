"""What keeps a run safe: its folder, its checkpoints, its data, and words for what went wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from recurgolf.config import Diverged
from recurgolf.data.shard_fingerprints import check_unchanged
from recurgolf.disk import read_json, write_json
from recurgolf.folders import only_one
from recurgolf.looping import LoopPlan
from recurgolf.training import checkpoint, faults, resume
from recurgolf.training.non_finite import Batches, check_score, check_weights, diagnosis
from recurgolf.training.summary import FILE as SUMMARY
from recurgolf.training.summary import Summary, environment

if TYPE_CHECKING:
    from recurgolf.data import Dataset
    from recurgolf.model.transformer import Transformer
    from recurgolf.run import Run
    from recurgolf.training.job import Job
    from recurgolf.training.state import TrainState

LOCK_SECONDS = 30.0
"""A killed run's ranks need a moment to end; who comes after them waits so long."""
OFTEN = 4
"""A text read so often is nearly as good as new text; more of it is worth less and less (arXiv
2305.16264), and a network without decay learns it by heart."""


class Guard:
    """Looks after one run in this process.

    Attributes:
        found: the checkpoint that the run continues from; None where it starts anew.
        saved_at: step of the newest checkpoint of this folder that holds the present state.
    """

    def __init__(self) -> None:
        self.found: resume.Found | None = None
        self.saved_at, self.saved_time = -1, time.monotonic()

    def locked(self, job: Job) -> AbstractContextManager[None]:
        """Inside, no other process trains in the folder."""
        if not job.ranks.is_first:  # the others do not write there
            return contextlib.nullcontext()
        return only_one(job.folder, "is training in this folder", LOCK_SECONDS)

    def begin(self, job: Job) -> None:
        """Find what to continue from, and leave only that in the folder. Collective."""
        read_again = repeats(job.run, job.dataset.train_tokens)  # all ranks prepare the data
        if job.ranks.is_first:
            for line in job.run.tracker.told():
                job.log.line(line)
            if read_again:
                job.log.line(read_again)
            self.found = resume.find(job.run, job.folder, job.log.line)
            resume.make_room(job.run, job.folder, self.found, job.log.line)
        self.found = job.ranks.broadcast(self.found)

    def resume(self, job: Job, state: TrainState) -> None:
        """Put the state where the checkpoint that was found ends."""
        found = self.found
        if found is None:
            return
        state.restore(job, *checkpoint.load(found.path))
        self.saved_at = state.step if found.is_of(job.folder) else -1
        job.log.line(f"continued from {found.path}, step {state.step}")
        if found.remark:
            job.log.line(found.remark)

    def due(self, seconds: float) -> bool:
        """Whether the last checkpoint is so old; 0: never."""
        return 0 < seconds <= time.monotonic() - self.saved_time

    def save(self, job: Job, state: TrainState, phase: str = "checkpoint") -> None:
        """A checkpoint of everything that training depends on, unless there is one. Collective.

        Args:
            phase: what the time counts as; the last one is no part of training.

        Raises:
            Diverged: a weight is not finite. The checkpoints before stay the newest.
        """
        if self.saved_at == state.step:
            return
        check_weights(state.model)
        config, ranks = job.run.trainer, job.ranks
        with job.clock.phase(phase):
            self.check_data(job.dataset)
            parts, rest = state.collect(job)
            if ranks.is_first:
                folder = job.folder / resume.CHECKPOINTS
                checkpoint.save(folder, state.step, parts, rest)
                checkpoint.prune(folder, config.keep_last, config.keep_best)
            self.saved_at, self.saved_time = state.step, time.monotonic()
            ranks.barrier()

    def check_data(self, dataset: Dataset) -> None:
        """Refuse to go on with data that changed since they were opened."""
        check_unchanged(dataset.files)

    def diagnosis(
        self, job: Job, state: TrainState, plan: LoopPlan, batches: Batches, loss: Tensor
    ) -> str:
        """Where numbers stopped being finite, kept beside the batch that did it. Collective."""
        return diagnosis(job, state, plan, batches, loss)

    def check_end(self, job: Job, model: Transformer, val_bpb: float) -> None:
        """Refuse a result of data that changed since they were opened, and one that is no number.

        Raises:
            Diverged: the score, or a weight in the type that the file keeps, is infinite or NaN.
        """
        self.check_data(job.dataset)
        check_weights(model, job.run.quant.keep_dtype)
        check_score(val_bpb)

    def explained(self, job: Job, step: int, error: Exception) -> Exception | None:
        """An error of the machine in words that help; None: it speaks for itself.

        Of a run that diverged, the summary says so from here on.
        """
        if isinstance(error, Diverged):
            if job.ranks.is_first:
                summary = summary_of_diverged(job, step, str(error))
                write_json(job.folder / SUMMARY, summary)
                job.tracker.summary({"status": summary["status"], "diverged": summary["diverged"]})
            return None
        if faults.is_out_of_memory(error):
            return faults.out_of_memory(error, f"in step {step + 1}", job.run.trainer)
        if faults.lacks_compiler(error):
            return faults.no_compiler(error)
        if isinstance(error, OSError) and faults.is_full_disk(error):
            place = Path(error.filename) if isinstance(error.filename, str) else job.folder
            last = checkpoint.newest(job.folder / resume.CHECKPOINTS)
            left = f"{last} is kept and whole." if last else "No checkpoint was written yet."
            return faults.full_disk(place, 0, error, left)
        return None


def summary_of_diverged(job: Job, step: int, why: str) -> dict[str, Any]:
    """What summary.json holds of a run that diverged: no figure but those of its training.

    Args:
        step: the last that went well.
    """
    missing = dataclasses.MISSING
    unknown = [
        field.name
        for field in dataclasses.fields(Summary)
        if field.default is missing and field.default_factory is missing
    ]
    seconds = job.clock.seconds
    return {
        **dict.fromkeys(unknown),
        "evals": {},
        "within_budget": False,
        "budget_bytes": job.run.budget.artifact_bytes,
        "steps": step,
        "tokens": step * job.run.trainer.batch_tokens,
        "train_seconds": round(seconds["training"], 3),
        "seed": job.run.seed,
        "fingerprint": job.run.fingerprint,
        "status": "diverged",
        "diverged": why,
        "folder": str(job.known_as),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "environment": environment(job),
    }


def drop_diverged(folder: Path) -> None:
    """Remove the summary of an earlier attempt that diverged: another one begins."""
    path = folder / SUMMARY
    with contextlib.suppress(OSError, ValueError):
        if read_json(path).get("status") == "diverged":
            path.unlink()


def repeats(run: Run, train_tokens: int) -> str | None:
    """How often the training text is read, where that is more than a few times."""
    config = run.trainer
    times = config.steps * config.batch_tokens / train_tokens
    if config.progress != "steps" or times <= OFTEN:
        return None
    decay = ": weights that decay learn less of it by heart, optimizer.matrix_weight_decay=0.1"
    advice = "" if run.optimizer.matrix_weight_decay else decay
    return f"the training text is read {times:.1f} times over{advice}"


__all__ = ["Guard", "drop_diverged", "repeats"]
