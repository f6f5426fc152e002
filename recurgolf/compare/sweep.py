"""The end of a multirun: a table grouped by everything but the seed, and sweep.json."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from recurgolf.compare.groups import ABSENT, TEXT, Group
from recurgolf.compare.runs import (
    OVERRIDES,
    FoundRun,
    folders_with,
    foreign_summary,
    read_overrides,
    read_run,
)
from recurgolf.config import EXIT_FAILED, EXIT_OVER_BUDGET, ConfigError, Diverged
from recurgolf.disk import DamagedFile, write_file, write_json
from recurgolf.folders import InUse
from recurgolf.log import plain_console
from recurgolf.overrides import is_seed

JOBS_FILE = "multirun.yaml"
"""In a sweep's folder: what Hydra was asked for."""
MOVED_ASIDE = "moved_aside"
"""In a sweep's folder: folders that made way for a job."""
RUNS_SWEEP = "is running this sweep; it has to end first"
FAILURE = "failure.txt"
"""In the folder of a job that failed: the cause in its first line, then the traceback."""


def check_new_sweep(folder: Path, jobs: Sequence[Sequence[str]]) -> None:
    """Refuse to begin a sweep in a folder that another sweep, or any run, has used.

    The very same sweep may go on under `trainer.resume=auto`.
    """
    there = [read_overrides(path) for path in job_folders(folder)]
    if not there and not any(folder.glob("*/run.json")) and not (folder / JOBS_FILE).exists():
        return
    mine = [list(job) for job in jobs]
    if there and all(job in mine and "trainer.resume=auto" in job for job in there):
        return
    raise ConfigError(
        f"{folder} holds a sweep already ({len(there)} jobs): go on with it by recurgolf sweep "
        "resume FOLDER, or name another hydra.sweep.dir"
    )


def note_overrides(folder: Path, overrides: list[str]) -> None:
    """Record a job's overrides in its folder, also where Hydra was told to write nothing."""
    path = folder / OVERRIDES
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, yaml.safe_dump(overrides))


def job_folders(folder: Path) -> list[Path]:
    """The folders of a sweep's jobs, whatever they are called and however deep: 9 before 10."""
    return folders_with(OVERRIDES, folder, without=[MOVED_ASIDE])


def note_failure(folder: Path, error: Exception, job: str = "this job") -> None:
    """Leave the cause in the job's folder, where the table at the end finds it."""
    if isinstance(error, InUse):  # the folder is the other's, who may well finish
        print(f"recurgolf: {job}: {error}", file=sys.stderr)
        return
    refused = isinstance(error, (ConfigError, Diverged))
    cause = str(error) if refused else f"{type(error).__name__}: {error}"
    first = cause.splitlines()[0] if cause else type(error).__name__
    write_file(folder / FAILURE, f"{first}\n\n{traceback.format_exc()}")
    print(f"recurgolf: {job} failed: {first}", file=sys.stderr)


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """The jobs of a sweep's folder in order, from what each left behind.

    Folders are the truth, whichever launcher ran the jobs and in whichever process.
    """
    jobs = []
    for path in job_folders(folder):
        try:
            run, error = read_run(path), foreign_summary(path) or _cause(path / FAILURE)
        except FileNotFoundError:  # it did not compose
            run, error = FoundRun(path, {}, None), _cause(path / FAILURE)
        except DamagedFile as damage:
            run, error = FoundRun(path, {}, None), str(damage)
        finished = run.summary is not None
        failed = run.status if run.status == "diverged" else "failed"
        jobs.append(
            {
                "overrides": read_overrides(path),
                "folder": str(path),
                "status": "finished" if finished else failed,
                "error": None if finished else error,
            }
        )
    return jobs


def _cause(note: Path) -> str:
    """The first line of a failure.txt."""
    lines = note.read_text(errors="replace").splitlines() if note.exists() else []
    return next(iter(lines), "it did not finish")


def grouped(jobs: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Jobs by their overrides without the seed, in order of appearance.

    A group's label names only what differs between groups. Jobs that failed may have left no
    settings, so that these do not tell them apart. Figures of different texts are never averaged.
    """
    shared = set.intersection(*(set(job["overrides"]) for job in jobs)) if jobs else set()
    groups: dict[str, Group] = {}
    for job in jobs:
        own = [o for o in job["overrides"] if not is_seed(o) and o not in shared]
        label = " ".join(own) or "all jobs"
        differs = {key: value for key, _, value in (o.partition("=") for o in own)}
        group = groups.setdefault(label, Group(differs, title=label))
        folder = Path(job["folder"])
        if job["status"] == "finished":
            group.runs.append(read_run(folder))
        else:
            group.unfinished.append(FoundRun(folder, {}, None, status=job["status"]))
    return [part for group in groups.values() for part in _by_text(group)]


def _by_text(group: Group) -> list[Group]:
    """A group, or one for every text that its runs were scored on."""
    texts = list(dict.fromkeys(run.scored_text for run in group.runs))
    if len(texts) < 2:
        return [group]
    parts = []
    for text in texts:
        title = f"{group.title}, {TEXT} {text[:12] or 'unknown'}"
        differs = {**group.differs, TEXT: text[:12]}
        runs = [run for run in group.runs if run.scored_text == text]
        parts.append(Group(differs, runs, title=title))
    parts[-1].unfinished = group.unfinished
    return parts


def finish_sweep(folder: Path) -> int:
    """Write sweep.json, print the table and what failed; the exit code."""
    jobs = read_jobs(folder)
    if not jobs:
        raise ConfigError(f"{folder}: no job of a sweep in or below it")
    groups = grouped(jobs)
    # Where no terminal sets a width, a label stays in one line.
    console = plain_console(width=200)
    console.print(table(groups, width=console.width))
    failed = [job for job in jobs if job["status"] != "finished"]
    for job in failed:
        told = f"{job['status']}: {' '.join(job['overrides'])}: {job['error']}"
        console.print(told, markup=False)
    path = folder / "sweep.json"
    try:
        write_json(path, {"jobs": jobs, "groups": [as_json(g) for g in groups]})
        console.print(f"sweep: {path}", markup=False)
    except OSError as error:  # the table of somebody else's folder is worth showing all the same
        console.print(f"not kept in {path}: {error.strerror}", markup=False)
    if failed:
        return EXIT_FAILED
    return EXIT_OVER_BUDGET if any(group.over_budget for group in groups) else 0


def table(
    groups: Sequence[Group],
    metric: str = "val_bpb",
    baseline: Group | None = None,
    failed: bool = True,
    width: int = 200,
) -> Table | Text:
    """Mean ± deviation over seeds: one row per group, one column per setting that differs.

    A width that does not hold them shortens `lora.rank` to `rank`; where that is not enough, every
    setting has a line of its own above its figures. No cell is broken.

    Args:
        failed: whether to say how many runs did not finish. Where some diverged, a column of its
            own says how many of these.
        width: characters of a line.
    """
    by_key = len(groups) > 1 and not any(group.shortened for group in groups)
    keys = list(dict.fromkeys(key for group in groups for key in group.differs)) if by_key else []
    short = [key.rpartition(".")[2] for key in keys]
    short = short if len(set(short)) == len(short) else keys
    last = {
        "failed": [len(group.unfinished) if failed else 0 for group in groups],
        "diverged": [group.diverged for group in groups],
        "over budget": [group.over_budget for group in groups],
    }
    figures = {
        "n": [str(len(group.runs)) for group in groups],
        metric: [plus_minus(group, metric, ".4f") for group in groups],
        "artifact bytes": [plus_minus(group, "artifact_bytes", ",.0f") for group in groups],
        **{name: [str(n) for n in counts] for name, counts in last.items() if any(counts)},
    }
    for names in (keys, short) if keys else ([],):
        columns = {
            name: [group.differs.get(key, ABSENT) for group in groups]
            for name, key in zip(names, keys, strict=True)
        } or {"setting": [group.label for group in groups]}
        first = next(iter(columns.values()))
        first[:] = [
            text + (" (baseline)" if group is baseline else "")
            for text, group in zip(first, groups, strict=True)
        ]
        grid = _grid(columns, figures)
        if Console(width=10_000).measure(grid).maximum <= width:
            return grid
    lines = []
    for number, group in enumerate(groups):
        lines.append(group.label + (" (baseline)" if group is baseline else ""))
        lines.append("  " + "  ".join(f"{name} {own[number]}" for name, own in figures.items()))
    return Text("\n".join(lines))


def _grid(left: Mapping[str, Sequence[str]], right: Mapping[str, Sequence[str]]) -> Table:
    """A table of columns by their headings, the second ones aligned to the right."""
    grid = Table(box=box.SIMPLE_HEAD)
    for name in left:
        grid.add_column(escape(name), no_wrap=True)
    for name in right:
        grid.add_column(escape(name), justify="right", no_wrap=True)
    for cells in zip(*left.values(), *right.values(), strict=True):
        # A setting may hold brackets, which the library would read as markup.
        grid.add_row(*map(escape, cells))
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
        "diverged": group.diverged,
        "over_budget": group.over_budget,
        "seeds": [run.summary.get("seed") for run in group.runs if run.summary],
        **figures,
    }
