"""What a sweep will be, before it starts, and a line about each of its jobs while it runs."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from recurgolf.log import counted
from recurgolf.overrides import is_seed
from recurgolf.plan import check_ending, flops_per_token, make_plan
from recurgolf.run import Run
from recurgolf.training.base import check_base
from recurgolf.training.distributed import Ranks
from recurgolf.training.launch import check_device, crowded, threads_of
from recurgolf.training.summary import Summary

MATMUL_SHARE = 0.25
"""Of the speed of a matrix product, what training reached: 0.2 to 0.4 over the experiments here."""
START_SECONDS = 10.0
"""Of a run besides its training: imports, data, packing, scoring."""


@dataclass(frozen=True)
class Expected:
    """A job before it runs.

    Attributes:
        varied: its own values of what the sweep varies.
        seconds: about; None where nothing is known of the machine's speed.
        bytes: of model file and code.
    """

    varied: list[str]
    seconds: float | None
    bytes: int
    budget: int

    @property
    def setting(self) -> str:
        return " ".join(item for item in self.varied if not is_seed(item)) or "as given"

    @property
    def seed(self) -> str:
        return " ".join(item for item in self.varied if is_seed(item))


@dataclass
class SweepAhead:
    """The jobs of a sweep, and how long those that ended took."""

    jobs: list[Expected]
    at_once: int = 1
    elsewhere: str = ""
    """Where the jobs run, if not in this process: `joblib`, `submitit`."""
    warning: str = ""
    measured: dict[int, float] = field(default_factory=dict)
    count: int = 0
    """Of jobs, where nothing more is known of them."""

    def lines(self) -> list[str]:
        """The list that is told before the first job starts."""
        settings: dict[str, list[Expected]] = {}
        for job in self.jobs:
            settings.setdefault(job.setting, []).append(job)
        seeds = list(dict.fromkeys(job.seed for job in self.jobs if job.seed))
        shown = ", ".join(seed.removeprefix("seed=") for seed in seeds)
        of_seeds = f" x {counted(len(seeds), 'seed')} ({shown})" if seeds else ""
        how = f", {self.at_once} at a time" if self.at_once > 1 else ""
        where = f" by {self.elsewhere}" if self.elsewhere else ""
        wide = max(7, *(len(setting) for setting in settings))
        text = [
            f"{counted(len(self.jobs), 'job')}: {counted(len(settings), 'setting')}"
            f"{of_seeds}{how}{where}"
        ]
        # A setting in a line of its own where it would push the figures off a narrow terminal.
        for setting, jobs in settings.items():
            one = jobs[0]
            over = f", OVER the budget of {one.budget:,}" if one.bytes > one.budget else ""
            figures = f"{clock(one.seconds):>8} each  {one.bytes:>12,} bytes{over}"
            if wide > 40:
                text += [f"  {setting}", f"    {figures}"]
            else:
                text.append(f"  {setting:<{wide}}  {figures}")
        total = self._total(self.jobs)
        if total is not None:
            text.append(f"  about {clock(total / max(1, self.at_once))[1:]} in all")
        return [*text, *([self.warning] if self.warning else [])]

    def head(self, number: int, varied: Sequence[str]) -> str:
        """`job 3 of 9  lora.rank=1 seed=2  ~4:10 left`, counted from 1."""
        left = "" if self.elsewhere else self._left(number)
        return _fitting(self.named(number, varied), left)

    def result(self, number: int, varied: Sequence[str], summary: Summary, seconds: float) -> str:
        """What came of a job, in a line."""
        self.measured[number] = seconds
        over = "" if summary.within_budget else " OVER THE BUDGET"
        return _fitting(
            self.named(number, varied),
            f"val_bpb {summary.val_bpb:.4f}  {summary.artifact_bytes:,} bytes{over}  "
            f"{clock(seconds)[1:]}",
        )

    def named(self, number: int, varied: Sequence[str]) -> str:
        """`job 3 of 9  lora.rank=1 seed=2`."""
        count = len(self.jobs) or self.count
        of = f" of {count}" if count else ""
        return "  ".join(filter(None, [f"job {number + 1}{of}", " ".join(varied)]))

    def _total(self, jobs: Sequence[Expected]) -> float | None:
        known = [job.seconds for job in jobs if job.seconds is not None]
        return sum(known) if jobs and len(known) == len(jobs) else None

    def _left(self, number: int) -> str:
        """Time to the end of the sweep: what jobs took is the measure once one has ended."""
        if number >= len(self.jobs):
            return ""
        expected = self._total(self.jobs[number:])
        if self.measured:
            done = self._total([self.jobs[n] for n in self.measured])
            took = sum(self.measured.values())
            mean = took / len(self.measured)
            left = len(self.jobs) - number
            expected = expected * took / done if expected and done else mean * left
        return "" if expected is None else f"{clock(expected)} left"


def _fitting(name: str, figures: str) -> str:
    """In a line; figures in one of their own where a terminal would break them."""
    line = "  ".join(filter(None, [name, figures]))
    narrow = sys.stdout.isatty() and len(line) >= shutil.get_terminal_size().columns
    return f"{name}\n    {figures}" if figures and narrow else line


def clock(seconds: float | None) -> str:
    """`~4:10`, `~2:05:00`; a question mark where nothing is known."""
    if seconds is None:
        return "~?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"~{hours}:{minutes:02d}:{rest:02d}" if hours else f"~{minutes}:{rest:02d}"


def look_ahead(
    runs: Sequence[tuple[list[str], Run]], at_once: int = 1, elsewhere: str = ""
) -> SweepAhead:
    """What the jobs of a sweep will take, from their Runs alone.

    Args:
        runs: for every job, its values of what varies, and its Run.

    Raises:
        ConfigError: a job that would be refused as soon as it starts.
    """
    known: dict[str, tuple[float | None, int]] = {}
    speed = _flops_per_second()
    jobs = []
    for varied, run in runs:
        if run.setting not in known:
            check_device(run)
            check_base(run)
            check_ending(run)
            known[run.setting] = (expected_seconds(run, speed), make_plan(run).total_bytes)
        seconds, size = known[run.setting]
        jobs.append(Expected(varied, seconds, size, run.budget.artifact_bytes))
    here = (
        ""
        if elsewhere == "submitit"
        else next(iter(filter(None, (crowded(run, at_once) for _, run in runs))), "")
    )
    return SweepAhead(jobs, at_once, elsewhere, here)


def expected_seconds(run: Run, flops_per_second: float) -> float | None:
    """Roughly, from training's FLOPs and the speed of a matrix product on one thread.

    Not known for a GPU, where the cap of the budget is all that there is.
    """
    cap = run.budget.max_train_seconds
    if run.trainer.device != "cpu":
        return None if cap is None else cap + START_SECONDS
    points = 20
    per_token = sum(flops_per_token(run, run.plan(n / points)) for n in range(points)) / points
    threads = threads_of(run, Ranks(world_size=run.trainer.devices)) * run.trainer.devices
    speed = flops_per_second * MATMUL_SHARE * min(threads, os.cpu_count() or 1)
    training = run.trainer.steps * run.trainer.batch_tokens * per_token / speed
    return min(training, cap or training) + START_SECONDS


def _flops_per_second() -> float:
    """Of a matrix product of a size that small models have, on one thread; the best of a few."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left = torch.ones(256, 256)
        best = 0.0
        for _ in range(20):
            began = time.perf_counter()
            torch.mm(left, left)
            best = max(best, 2 * 256**3 / (time.perf_counter() - began))
        return best
    finally:
        torch.set_num_threads(before)
