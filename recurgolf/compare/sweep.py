"""The end of a multirun: a table grouped by everything but the seed, and sweep.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from recurgolf.training.summary import Summary


@dataclass
class Group:
    """Jobs that differ in nothing but their seed."""

    label: str
    jobs: list[Mapping[str, Any]]
    summaries: list[Summary]

    @property
    def failed(self) -> int:
        return len(self.jobs) - len(self.summaries)

    def spread(self, name: str) -> tuple[float, float | None]:
        """Mean and sample deviation (None for a single run) of a summary's figure."""
        values = [getattr(summary, name) for summary in self.summaries]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return statistics.fmean(values), deviation


def is_seed(override: str) -> bool:
    """Whether an override only changes chance: seed or seeds.*."""
    key = override.partition("=")[0].lstrip("+")
    return key == "seed" or key.startswith("seeds.")


def grouped(jobs: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Jobs by their overrides without the seed, in order of appearance."""
    groups: dict[str, Group] = {}
    for job in jobs:
        label = " ".join(o for o in job["overrides"] if not is_seed(o)) or "default"
        group = groups.setdefault(label, Group(label, [], []))
        group.jobs.append(job)
        if (Path(job["folder"]) / "summary.json").exists() and job["status"] == "completed":
            group.summaries.append(Summary.read(Path(job["folder"])))
    return list(groups.values())


def finish_sweep(folder: Path, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Write sweep.json and print the table and what failed."""
    groups = grouped(jobs)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"jobs": list(jobs), "groups": [as_json(g) for g in groups]}, indent=1)
    (folder / "sweep.json").write_text(text + "\n")
    console = Console(highlight=False)
    console.print(table(groups))
    for job in jobs:
        if job["status"] != "completed":
            console.print(f"failed: {' '.join(job['overrides'])}: {job['error']}", markup=False)
    console.print(f"sweep: {folder}/sweep.json", markup=False)


def table(groups: Sequence[Group]) -> Table:
    """Mean ± deviation over seeds, one row per group."""
    grid = Table(box=box.SIMPLE_HEAD)
    grid.add_column("setting", overflow="fold")
    for name in ("n", "val_bpb", "artifact bytes", "failed", "over budget"):
        grid.add_column(name, justify="right")
    for group in groups:
        over = sum(not summary.within_budget for summary in group.summaries)
        done = group.summaries
        grid.add_row(
            group.label,
            str(len(done)),
            plus_minus(*group.spread("val_bpb"), ".4f") if done else "-",
            plus_minus(*group.spread("artifact_bytes"), ",.0f") if done else "-",
            str(group.failed),
            str(over),
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
        "seeds": [summary.seed for summary in group.summaries],
        **figures,
    }
