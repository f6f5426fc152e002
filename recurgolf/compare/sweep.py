"""The end of a multirun: a table grouped by everything but the seed, and sweep.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from recurgolf.overrides import is_seed
from recurgolf.training.summary import FILE as SUMMARY
from recurgolf.training.summary import Summary

FAILURE = "failure.txt"
"""In the folder of a job that failed: the cause in its first line, then the traceback."""


@dataclass
class Group:
    """Jobs that differ in nothing but their seed."""

    label: str
    jobs: list[Mapping[str, Any]]
    summaries: list[Summary]

    @property
    def failed(self) -> int:
        return len(self.jobs) - len(self.summaries)

    @property
    def over_budget(self) -> int:
        return sum(not summary.within_budget for summary in self.summaries)

    def spread(self, name: str) -> tuple[float, float | None]:
        """Mean and sample deviation (None for a single run) of a summary's figure."""
        values = [getattr(summary, name) for summary in self.summaries]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return statistics.fmean(values), deviation


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """The jobs of a sweep's folder in order, from what each left behind.

    Folders are the truth, whichever launcher ran the jobs and in whichever process.
    """
    jobs = []
    for path in sorted(
        (p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
    ):
        note = path / FAILURE
        finished = (path / SUMMARY).exists() and not note.exists()
        error = note.read_text().splitlines()[0] if note.exists() else "it did not finish"
        jobs.append(
            {
                "overrides": yaml.safe_load((path / ".hydra" / "overrides.yaml").read_text()),
                "folder": str(path),
                "status": "finished" if finished else "failed",
                "error": None if finished else error,
            }
        )
    return jobs


def grouped(jobs: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Jobs by their overrides without the seed, in order of appearance.

    A group's label names only what differs between groups.
    """
    shared = set.intersection(*(set(job["overrides"]) for job in jobs)) if jobs else set()
    groups: dict[str, Group] = {}
    for job in jobs:
        own = [o for o in job["overrides"] if not is_seed(o) and o not in shared]
        label = " ".join(own) or "all jobs"
        group = groups.setdefault(label, Group(label, [], []))
        group.jobs.append(job)
        if job["status"] == "finished":
            group.summaries.append(Summary.read(Path(job["folder"])))
    return list(groups.values())


@dataclass(frozen=True)
class Outcome:
    """How many jobs of a sweep failed, and how many made a file over the budget."""

    failed: int
    over_budget: int


def finish_sweep(folder: Path) -> Outcome:
    """Write sweep.json, print the table and what failed."""
    jobs = read_jobs(folder)
    groups = grouped(jobs)
    text = json.dumps({"jobs": jobs, "groups": [as_json(g) for g in groups]}, indent=1)
    (folder / "sweep.json").write_text(text + "\n")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table(groups))
    failed = [job for job in jobs if job["status"] == "failed"]
    for job in failed:
        console.print(f"failed: {' '.join(job['overrides'])}: {job['error']}", markup=False)
    console.print(f"sweep: {folder}/sweep.json", markup=False)
    return Outcome(len(failed), sum(group.over_budget for group in groups))


def table(groups: Sequence[Group]) -> Table:
    """Mean ± deviation over seeds, one row per group."""
    grid = Table(box=box.SIMPLE_HEAD)
    grid.add_column("setting", overflow="fold")
    for name in ("n", "val_bpb", "artifact bytes", "failed", "over budget"):
        grid.add_column(name, justify="right")
    for group in groups:
        done = group.summaries
        grid.add_row(
            group.label,
            str(len(done)),
            plus_minus(*group.spread("val_bpb"), ".4f") if done else "-",
            plus_minus(*group.spread("artifact_bytes"), ",.0f") if done else "-",
            str(group.failed),
            str(group.over_budget),
        )
    return grid


def plus_minus(mean: float, deviation: float | None, form: str) -> str:
    """`1.6712 ± 0.0031`; a single run has no deviation to show."""
    text = format(mean, form)
    return text if deviation is None else f"{text} ± {format(deviation, form)}"


def as_json(group: Group) -> dict[str, Any]:
    """A group's figures for sweep.json."""
    figures = {
        name: dict(zip(("mean", "deviation"), group.spread(name), strict=True))
        for name in ("val_bpb", "artifact_bytes")
        if group.summaries
    }
    return {
        "setting": group.label,
        "n": len(group.summaries),
        "failed": group.failed,
        "over_budget": group.over_budget,
        "seeds": [summary.seed for summary in group.summaries],
        **figures,
    }
