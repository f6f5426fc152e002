"""recurgolf sweep: show the table of a sweep again, or run what is missing or failed in it.

A sweep's folder says itself which jobs there should be (`multirun.yaml`) and which there are (a
`summary.json` with the fingerprint that the job's overrides give today).
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recurgolf.compare.sweep import FAILURE, finish_sweep, note_failure
from recurgolf.config import ConfigError
from recurgolf.run import Run
from recurgolf.training.launch import launch
from recurgolf.training.summary import FILE as SUMMARY
from recurgolf.training.summary import Summary

EXIT_FAILED, EXIT_OVER_BUDGET = 1, 3
JOBS_FILE = "multirun.yaml"


@dataclass
class Job:
    """One job of a sweep: its number, its overrides and what is to be done with it.

    Attributes:
        remark: why it has to run; None where it is finished.
    """

    number: int
    folder: Path
    overrides: list[str]
    run: Run
    remark: str | None


def main(arguments: Sequence[str]) -> int:
    """Show a sweep's table, or run what is missing or failed in it."""
    parser = argparse.ArgumentParser(prog="recurgolf sweep", description=main.__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in (("show", "print the table"), ("resume", "run what is not finished")):
        action = actions.add_parser(name, help=text)
        action.add_argument("folder", type=Path, help="folder of the sweep")
    action.add_argument("--jobs", type=int, default=1, help="how many at a time (1)")
    action.add_argument("--config-dir", type=Path, help="YAML of your own, if it has moved")
    only = actions.add_parser("job", help="run one job in this process")
    only.add_argument("folder", type=Path)
    only.add_argument("number", type=int)
    only.add_argument("--config-dir", type=Path)
    asked = parser.parse_args(arguments)
    if asked.action == "show":
        return _ended(asked.folder)
    jobs = jobs_of(asked.folder, asked.config_dir)
    if asked.action == "job":
        return run_job(jobs[asked.number])
    if asked.jobs < 1:
        raise ConfigError(f"--jobs {asked.jobs}: at least 1")
    waiting = [job for job in jobs if job.remark is not None]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} jobs are finished")
    for job in waiting:
        print(f"job {job.number} ({' '.join(job.overrides)}): {job.remark}")
    if asked.jobs == 1 or len(waiting) < 2:
        for job in waiting:
            run_job(job)
    else:
        with ThreadPoolExecutor(asked.jobs) as pool:
            list(pool.map(lambda job: _in_own_process(job, asked), waiting))
    return _ended(asked.folder)


def jobs_of(folder: Path, config_dir: Path | None = None) -> list[Job]:
    """All jobs that a sweep was to have, with what each still needs.

    Raises:
        ConfigError: not a sweep's folder, or overrides that no longer compose.
    """
    from recurgolf.composing import compose, sweep_jobs

    path = folder / JOBS_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} is not the folder of a sweep: it has no {JOBS_FILE}")
    asked = yaml.safe_load(path.read_text())["hydra"]
    own = config_dir or _config_dir(asked)
    jobs = []
    for number, overrides in enumerate(sweep_jobs(asked["overrides"]["task"])):
        run = compose(overrides, own)
        place = folder / str(number)
        jobs.append(Job(number, place, overrides, run, unfinished(run, place)))
    return jobs


def unfinished(run: Run, folder: Path) -> str | None:
    """Why a job has to run; None if its folder holds the result of this very Run."""
    if (folder / FAILURE).exists():
        return f"failed: {(folder / FAILURE).read_text().splitlines()[0]}"
    if not (folder / SUMMARY).exists():
        return "interrupted" if (folder / "run.json").exists() else "never started"
    there = Summary.read(folder).fingerprint
    if there not in run.known_as(folder):
        return f"its settings have changed (fingerprint {there}, now {run.fingerprint})"
    return None


def run_job(job: Job) -> int:
    """Run a job in its folder, from its newest checkpoint where it has one of the same Run."""
    job.folder.mkdir(parents=True, exist_ok=True)
    noted = job.folder / ".hydra" / "overrides.yaml"
    noted.parent.mkdir(exist_ok=True)
    noted.write_text(yaml.safe_dump(job.overrides))
    # A finished result under other settings would be taken for this one's.
    for name in (FAILURE, SUMMARY):
        (job.folder / name).unlink(missing_ok=True)
    continues = job.remark == "interrupted"
    resume = "auto" if continues else "never"
    trainer = dataclasses.replace(job.run.trainer, resume=resume)
    try:
        launch(dataclasses.replace(job.run, trainer=trainer), job.folder)
    except Exception as error:
        note_failure(job.folder, error)
        return EXIT_FAILED
    return 0


def _in_own_process(job: Job, asked: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "recurgolf", "sweep", "job", str(asked.folder)]
    command += [str(job.number)]
    command += ["--config-dir", str(asked.config_dir)] if asked.config_dir else []
    subprocess.run(command, check=False)


def _config_dir(asked: dict[str, Any]) -> Path | None:
    """The --config-dir that the sweep was started with."""
    for source in asked.get("runtime", {}).get("config_sources", []):
        if source["provider"] == "command-line" and source["schema"] == "file":
            return Path(source["path"])
    return None


def _ended(folder: Path) -> int:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    outcome = finish_sweep(folder)
    if outcome.failed:
        return EXIT_FAILED
    return EXIT_OVER_BUDGET if outcome.over_budget else 0
