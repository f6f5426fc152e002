"""recurgolf sweep: show the table of a sweep again, or run what is missing or failed in it.

The folder itself says which jobs there should be (`multirun.yaml`) and which there are (the
overrides recorded in each job's folder).
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recurgolf.compare.preview import SweepAhead
from recurgolf.compare.runs import read_overrides
from recurgolf.compare.sweep import (
    FAILURE,
    JOBS_FILE,
    MOVED_ASIDE,
    RUNS_SWEEP,
    finish_sweep,
    job_folders,
    note_failure,
    note_overrides,
)
from recurgolf.config import EXIT_FAILED, ConfigError
from recurgolf.folders import moved_aside, only_one
from recurgolf.run import Run
from recurgolf.training.launch import launch
from recurgolf.training.own_data import check_comparable
from recurgolf.training.packing import ARTIFACT
from recurgolf.training.resume import check_unused
from recurgolf.training.summary import FILE as SUMMARY
from recurgolf.training.summary import Summary
from recurgolf.trust import check_trusted
from recurgolf.verbs import add_trust, parser_of


@dataclass
class Job:
    """One job of a sweep: its number, its overrides and what is to be done with it.

    Attributes:
        varied: those of them that other jobs do not share.
        of: how many jobs the sweep has.
        run: or why there is none.
        remark: why it has to run; None where it is finished.
    """

    number: int
    folder: Path
    overrides: list[str]
    varied: list[str]
    of: int
    run: Run | ConfigError
    remark: str | None


def main(arguments: Sequence[str]) -> int:
    """Show a sweep's table, or run what is missing or failed in it."""
    parser = parser_of("sweep", main.__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in (("show", "print the table"), ("resume", "run what is not finished")):
        action = actions.add_parser(name, help=text)
        action.add_argument("folder", type=Path, help="folder of the sweep")
    action.add_argument("--jobs", type=int, default=1, help="how many at a time")
    action.add_argument("--config-dir", type=Path, help="YAML of your own, if it has moved")
    add_trust(action)
    only = actions.add_parser("job", help="run one job in this process")
    only.add_argument("folder", type=Path)
    only.add_argument("number", type=int)
    only.add_argument("--config-dir", type=Path)
    add_trust(only)
    asked = parser.parse_args(arguments)
    if asked.action == "show":
        return _ended(asked.folder)
    jobs = jobs_of(asked.folder, asked.config_dir, asked.trust)
    if asked.action == "job":
        return run_job(jobs[asked.number], "nothing")
    if asked.jobs < 1:
        raise ConfigError(f"--jobs {asked.jobs}: at least 1")
    with only_one(asked.folder, RUNS_SWEEP):
        return _resume(jobs, asked)


def _resume(jobs: Sequence[Job], asked: argparse.Namespace) -> int:
    """Run what is not finished; the exit code."""
    waiting = [job for job in jobs if job.remark is not None]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} jobs are finished")
    for job in waiting:
        print(f"job {job.number + 1} ({' '.join(job.overrides)}): {job.remark}")
    data = [job.run.data for job in waiting if isinstance(job.run, Run)]
    done = [job for job in jobs if job.remark is None]
    beside = [job.folder for job in done if isinstance(job.run, Run) and job.run.data in data]
    check_comparable(beside, asked.trust)
    if asked.jobs == 1 or len(waiting) < 2:
        for job in waiting:
            run_job(job)
    else:
        started: list[subprocess.Popen[bytes]] = []
        with ThreadPoolExecutor(asked.jobs) as pool:
            try:
                list(pool.map(lambda job: _in_own_process(job, asked, started), waiting))
            except BaseException:
                for process in started:
                    process.terminate()
                raise
    return _ended(asked.folder)


def jobs_of(folder: Path, config_dir: Path | None = None, trust: bool = False) -> list[Job]:
    """All jobs that a sweep was to have, with what each still needs.

    A job is known by the overrides that its folder has recorded, whatever the folder is called. One
    whose Run is recorded as well (run.json) goes on as that Run; only where there is none are the
    overrides composed.
    """
    from recurgolf.composing import named_plugins, plugin_modules
    from recurgolf.multirun import sweep_jobs, varied_keys

    path = folder / JOBS_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} is not the folder of a sweep: it has no {JOBS_FILE}")
    try:
        asked = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]
        # A sweep may stand in YAML; the command line comes behind it, as Hydra's sweeper has it.
        params = (asked.get("sweeper") or {}).get("params") or {}
        task = [*(f"{key}={value}" for key, value in params.items()), *asked["overrides"]["task"]]
        if not all(isinstance(override, str) for override in task):
            raise TypeError
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{path} is damaged: it is no YAML") from None
    except (KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} is damaged: it does not say the overrides of a sweep") from None
    own = config_dir or _config_dir(asked)
    recorded = {tuple(read_overrides(place)): place for place in job_folders(folder)}
    all_overrides, varied = sweep_jobs(task), varied_keys(task)
    named = named_plugins(task)
    if own is not None and config_dir is None:
        named += plugin_modules(own)
    check_trusted(named, trust)
    jobs = []
    for number, overrides in enumerate(all_overrides):
        place = recorded.get(tuple(overrides)) or folder / str(number)
        run = _run_of(place, overrides, varied, own, trust)
        label = [item for item in overrides if item.partition("=")[0].lstrip("+") in varied]
        of = len(all_overrides)
        jobs.append(Job(number, place, overrides, label, of, run, unfinished(run, place)))
    return jobs


def _run_of(
    place: Path, overrides: list[str], varied: list[str], own: Path | None, trust: bool
) -> Run | ConfigError:
    """The Run that a job's folder has recorded, else that of its overrides; why there is none."""
    from recurgolf.composing import compose
    from recurgolf.multirun import of_sweep

    try:
        path = place / "run.json"  # which a full disk may have left empty
        if read_overrides(place) == overrides and path.is_file() and path.stat().st_size:
            return Run.read(place, trust)
        return of_sweep(compose(overrides, own), overrides, varied)
    except ConfigError as error:
        return error


def unfinished(run: Run | ConfigError, folder: Path) -> str | None:
    """Why a job has to run; None if its folder holds the result of this very Run."""
    if (folder / FAILURE).exists():
        cause = (folder / FAILURE).read_text().splitlines() or ["no cause was noted"]
        return f"failed: {cause[0]}"
    if isinstance(run, ConfigError):
        return f"does not compose: {run}"
    if not (folder / SUMMARY).exists():
        return "interrupted" if (folder / "run.json").exists() else "never started"
    if not (folder / ARTIFACT).exists():
        return "its artifact.bin is gone"
    try:
        there = Summary.read(folder).fingerprint
    except (ValueError, TypeError):
        return "its summary.json is damaged"
    if there not in run.known_as(folder):
        return f"its summary.json is of another run (fingerprint {there}, not {run.fingerprint})"
    return None


def run_job(job: Job, shown: str = "bar") -> int:
    """Run a job in its folder, from its newest checkpoint where it has one."""
    lines, began = SweepAhead([], count=job.of), time.monotonic()
    print(lines.head(job.number, job.varied), flush=True)
    if isinstance(job.run, ConfigError):
        job.folder.mkdir(parents=True, exist_ok=True)
        note_overrides(job.folder, job.overrides)
        note_failure(job.folder, job.run, lines.named(job.number, job.varied))
        return EXIT_FAILED
    if _is_another_ones(job):
        aside = moved_aside(job.folder, job.folder.parent / MOVED_ASIDE)
        print(f"{job.folder} holds something else: now in {aside}")
    job.folder.mkdir(parents=True, exist_ok=True)
    note_overrides(job.folder, job.overrides)
    continues = job.remark is not None and not job.remark.startswith("failed")
    trainer = dataclasses.replace(job.run.trainer, resume="auto" if continues else "never")
    try:
        summary = launch(dataclasses.replace(job.run, trainer=trainer), job.folder, shown)
    except Exception as error:
        note_failure(job.folder, error, lines.named(job.number, job.varied))
        return EXIT_FAILED
    print(lines.result(job.number, job.varied, summary, time.monotonic() - began), flush=True)
    return 0


def _is_another_ones(job: Job) -> bool:
    """Whether a folder is recorded as another job's or, without a record, holds another Run."""
    told = read_overrides(job.folder)
    if told:
        return told != job.overrides
    assert isinstance(job.run, Run)
    try:
        check_unused(job.run, job.folder)
    except ConfigError:
        return True
    return False


def _in_own_process(
    job: Job, asked: argparse.Namespace, started: list[subprocess.Popen[bytes]]
) -> None:
    command = [sys.executable, "-P", "-m", "recurgolf", "sweep", "job", str(asked.folder)]
    command += [str(job.number)]
    command += ["--config-dir", str(asked.config_dir)] if asked.config_dir else []
    command += ["--trust"] if asked.trust else []
    with subprocess.Popen(command) as process:
        started.append(process)


def _config_dir(asked: dict[str, Any]) -> Path | None:
    """The --config-dir that the sweep was started with."""
    for source in asked.get("runtime", {}).get("config_sources", []):
        if source["provider"] == "command-line" and source["schema"] == "file":
            return Path(source["path"])
    return None


def _ended(folder: Path) -> int:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    return finish_sweep(folder)
