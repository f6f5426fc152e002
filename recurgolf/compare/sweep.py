"""The end of a multirun: a table grouped by everything but the seed, and sweep.json."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recurgolf.compare.runs import FoundRun, Group, read_run
from recurgolf.config import ConfigError
from recurgolf.overrides import is_seed
from recurgolf.training.summary import FILE as SUMMARY

FAILURE = "failure.txt"
"""In the folder of a job that failed: the cause in its first line, then the traceback."""


def note_failure(folder: Path, error: Exception) -> None:
    """Leave the cause in the job's folder, where the table at the end finds it."""
    refused = isinstance(error, ConfigError)
    cause = str(error) if refused else f"{type(error).__name__}: {error}"
    first = cause.splitlines()[0] if cause else type(error).__name__
    (folder / FAILURE).write_text(f"{first}\n\n{traceback.format_exc()}")
    print(f"recurgolf: this job failed: {first}", file=sys.stderr)


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

    A group's label names only what differs between groups. Jobs that failed may have left no
    settings, so that these do not tell them apart.
    """
    shared = set.intersection(*(set(job["overrides"]) for job in jobs)) if jobs else set()
    groups: dict[str, Group] = {}
    for job in jobs:
        own = [o for o in job["overrides"] if not is_seed(o) and o not in shared]
        label = " ".join(own) or "all jobs"
        group = groups.setdefault(label, Group({}, title=label))
        folder = Path(job["folder"])
        if job["status"] == "finished":
            group.runs.append(read_run(folder))
        else:
            group.unfinished.append(FoundRun(folder, {}, None))
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
    # Where no terminal sets a width, a label stays in one line.
    wide = None if sys.stdout.isatty() else 200
    console = Console(highlight=False, soft_wrap=True, width=wide)
    console.print(table(groups))
    failed = [job for job in jobs if job["status"] == "failed"]
    for job in failed:
        console.print(f"failed: {' '.join(job['overrides'])}: {job['error']}", markup=False)
    console.print(f"sweep: {folder}/sweep.json", markup=False)
    return Outcome(len(failed), sum(group.over_budget for group in groups))


def table(
    groups: Sequence[Group],
    metric: str = "val_bpb",
    baseline: Group | None = None,
    failed: bool = True,
) -> Table:
    """Mean ± deviation over seeds, one row per group.

    Args:
        failed: whether to say how many runs did not finish.
    """
    grid = Table(box=box.SIMPLE_HEAD)
    grid.add_column("setting", overflow="fold", min_width=24)
    for name in ("n", metric, "artifact bytes", *["failed"] * failed, "over budget"):
        grid.add_column(name, justify="right", no_wrap=True)
    for group in groups:
        grid.add_row(
            # A label may hold brackets, which the library would read as markup.
            escape(group.label + (" (baseline)" if group is baseline else "")),
            str(len(group.runs)),
            plus_minus(group, metric, ".4f"),
            plus_minus(group, "artifact_bytes", ",.0f"),
            *[str(len(group.unfinished))] * failed,
            str(group.over_budget),
        )
    return grid


def plus_minus(group: Group, name: str, form: str) -> str:
    """`1.6712 ± 0.0031`; a single run has no deviation to show, and no run nothing."""
    if not group.runs:
        return "-"
    mean, deviation = group.spread(name)
    text = format(mean, form)
    return text if deviation is None else f"{text} ± {format(deviation, form)}"


def as_json(group: Group) -> dict[str, Any]:
    """A group's figures for sweep.json."""
    figures = {
        name: dict(zip(("mean", "deviation"), group.spread(name), strict=True))
        for name in ("val_bpb", "artifact_bytes")
        if group.runs
    }
    return {
        "setting": group.label,
        "n": len(group.runs),
        "failed": len(group.unfinished),
        "over_budget": group.over_budget,
        "seeds": [run.summary["seed"] for run in group.runs if run.summary],
        **figures,
    }
