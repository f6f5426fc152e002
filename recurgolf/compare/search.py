"""Searching a space of settings for the best bytes and bits per byte, with Optuna.

Every trial is a run of its own in a process of its own, with a folder like any run's. The study
lies in SQLite beside them, so that a search that was stopped goes on where it was. Trials that are
clearly beaten on the way are ended early.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from recurgolf.config import EXIT_INTERRUPTED, EXIT_OVER_BUDGET, ConfigError, suggestion
from recurgolf.disk import write_json
from recurgolf.folders import only_one
from recurgolf.overrides import Choice, Interval, quoted
from recurgolf.plan import make_plan
from recurgolf.record import read_jsonl
from recurgolf.run import Run
from recurgolf.training.own_data import check_comparable
from recurgolf.training.signals import WATCHED
from recurgolf.training.summary import FILE as SUMMARY
from recurgolf.training.summary import Summary

OBJECTIVES = ("val_bpb", "artifact_bytes", "train_seconds", "params")
"""Figures of a summary that a search can make small."""
STUDY, RESULT = "study.db", "search.json"
_COMPOSING = threading.Lock()
"""Hydra composes once at a time in a process."""
_POLL_SECONDS = 0.5
TWIN = "tried before"
"""Attribute of a trial whose setting another one has tried."""
_MOST_SETTINGS = 10_000
"""Of a space that is looked at as a whole."""


@dataclass(frozen=True)
class Search:
    """What to search and how long.

    Attributes:
        fixed: overrides of every trial.
        flags: of the command line of every trial, such as --config-dir.
        space: key -> the values it may take.
        objectives: figures of the summary to make small, the first one first in tables.
        trials: how many are wanted in all, those of earlier calls included.
        jobs: how many run at a time.
        patience: finished trials that must be there before one is given up; 0: never give up.
        margin: bits per byte by which a trial must be worse than their median to be given up.
    """

    folder: Path
    fixed: tuple[str, ...]
    space: Mapping[str, Choice | Interval]
    compose: Callable[[Sequence[str]], Run] = field(repr=False)
    flags: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ("val_bpb", "artifact_bytes")
    trials: int = 20
    jobs: int = 1
    seed: int = 0
    patience: int = 3
    margin: float = 0.0
    stopping: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        if not self.space:
            raise ConfigError(
                "a search needs something to vary: key=choice(a,b), key=range(1,9), "
                "key=interval(0.01,0.1), or key=tag(log,interval(0.001,0.1))"
            )
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise ConfigError(f"objective {name!r}{suggestion(name, OBJECTIVES)}")
        for name, least in (("trials", 1), ("jobs", 1), ("patience", 0), ("margin", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} {getattr(self, name)}: at least {least}")

    @cached_property
    def grid(self) -> list[dict[str, Any]]:
        """All settings of a space without continuous ranges; empty where they are endless."""
        values = [space.values_tried for space in self.space.values()]
        finite = all(values) and math.prod(map(len, values)) <= _MOST_SETTINGS
        every = itertools.product(*values) if finite else ()
        return [dict(zip(self.space, setting, strict=True)) for setting in every]


class TrialFailed(Exception):
    """A trial without a result; the search goes on."""


class TriedBefore(Exception):
    """A setting was drawn a second time; another one waits in its place."""


def all_failed(study: optuna.Study) -> bool:
    """Whether trials have ended and not one of them with a result."""
    return not any(trial.state == TrialState.COMPLETE for trial in study.trials)


def search(asked: Search, say: Callable[[str], None] = print) -> optuna.Study:
    """Run trials until there are as many as asked for; finished ones of earlier calls count.

    Raises:
        ConfigError: the folder holds a search of other settings or on other data, or one that goes
            on in another process.
    """
    asked.folder.mkdir(parents=True, exist_ok=True)
    with only_one(asked.folder, "is searching in this folder; name another --folder"):
        return _search(asked, say)


def _search(asked: Search, say: Callable[[str], None]) -> optuna.Study:
    # It warns of every trial that fails or is interrupted, with a traceback; we say it in a line.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        study_name="recurgolf",
        # Quoted for SQLite, whose URI stands in SQLAlchemy's: a folder's name may hold anything.
        storage=f"sqlite:///file:{quote(quote(str(asked.folder / STUDY)))}?uri=true",
        sampler=optuna.samplers.TPESampler(
            seed=asked.seed,
            multivariate=True,
            constant_liar=asked.jobs > 1,
        ),
        directions=[StudyDirection.MINIMIZE] * len(asked.objectives),
        load_if_exists=True,
    )
    _same_search(study, asked)
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    folders = [asked.folder / str(trial.number) for trial in ended]
    if folders:
        asked.compose(list(asked.fixed))  # which imports the plugins that the trials' runs name
    check_comparable(folder for folder in folders if (folder / SUMMARY).exists())
    _take_up(study)
    had = sum(_ended(trial) for trial in study.trials)
    if had:
        say(f"{had} of {asked.trials} trials are there")
        # With its first seed it would draw the same trials again.
        study.sampler.reseed_rng()
    grid = asked.grid
    wanted = min(asked.trials, len(grid) or asked.trials)
    try:
        with _ending_trials(asked):
            _draw(study, asked, wanted, say)
    except (KeyboardInterrupt, SystemExit) as end:
        asked.stopping.set()
        say("stopped; the same command goes on with this search")
        raise KeyboardInterrupt("told") if isinstance(end, KeyboardInterrupt) else end from None
    if wanted < asked.trials:
        say(f"all {len(grid)} settings of this space are tried")
    _write(study, asked)
    return study


def _draw(study: optuna.Study, asked: Search, wanted: int, say: Callable[[str], None]) -> None:
    """Run trials until so many have ended."""
    # More than once only where a setting was drawn that had been tried.
    while (missing := wanted - sum(_ended(trial) for trial in study.trials)) > 0:
        study.optimize(
            lambda trial: _run_trial(study, trial, asked, say),
            n_trials=missing,
            n_jobs=asked.jobs,
            catch=(TrialFailed, TriedBefore),
        )


@contextlib.contextmanager
def _ending_trials(asked: Search) -> Iterator[None]:
    """Inside, a signal that ends the search ends the trials of its threads, too; Optuna would wait
    for them."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in WATCHED if here}

    def hear(number: int, frame: FrameType | None) -> None:
        asked.stopping.set()
        before[number](number, frame)  # type: ignore[operator]

    ours = [number for number, handler in before.items() if callable(handler)]
    for number in ours:
        signal.signal(number, hear)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def _ended(trial: FrozenTrial) -> bool:
    """Whether a trial came to an end of its own: a result, given up, or failed."""
    return trial.user_attrs.get("ended", False)


def _same_search(study: optuna.Study, asked: Search) -> None:
    """Refuse to mix trials of two searches."""
    own = {
        "fixed": list(asked.fixed),
        "space": {key: repr(space) for key, space in asked.space.items()},
        "objectives": list(asked.objectives),
    }
    for name, value in own.items():
        there = study.user_attrs.get(name)
        if there is None:
            study.set_user_attr(name, value)
        elif there != value:
            raise ConfigError(
                f"{asked.folder} holds a search with {name} {there}, not {value}; choose another "
                "--folder"
            )


def _take_up(study: optuna.Study) -> None:
    """Put trials that a stop of the search has ended in front, with their values."""
    taken = list(study.user_attrs.get("taken_up", []))
    for trial in study.get_trials(deepcopy=False):
        if _ended(trial) or trial.state == TrialState.WAITING or trial.number in taken:
            continue
        if TWIN in trial.user_attrs or not trial.params:
            continue
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
        taken.append(trial.number)
    study.set_user_attr("taken_up", taken)


def _run_trial(
    study: optuna.Study, trial: optuna.Trial, asked: Search, say: Callable[[str], None]
) -> list[float]:
    """The objectives of one trial, and a note that it ended by itself."""
    try:
        values = _objectives(study, trial, asked, say)
    except (TrialFailed, optuna.TrialPruned):
        trial.set_user_attr("ended", True)
        raise
    trial.set_user_attr("ended", True)
    return values


def _objectives(
    study: optuna.Study, trial: optuna.Trial, asked: Search, say: Callable[[str], None]
) -> list[float]:
    """One trial: composed, run in its folder, watched."""
    chosen = [f"{key}={space.suggest(trial, key)}" for key, space in asked.space.items()]
    _only_once(study, trial, asked)
    folder = asked.folder / str(trial.number)
    label = f"trial {trial.number} ({' '.join(chosen)})"
    try:
        with _COMPOSING:
            expected = make_plan(asked.compose([*asked.fixed, *chosen])).total_bytes
    except ConfigError as error:
        say(f"{label}: {error}")
        raise TrialFailed(str(error)) from None
    trial.set_user_attr("bytes_expected", expected)
    command = [sys.executable, "-P", "-m", "recurgolf", *asked.flags, *asked.fixed, *chosen]
    command += [f"hydra.run.dir={quoted(str(folder))}"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "console.log").open("w") as console:
        process = subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                if asked.stopping.is_set():
                    raise KeyboardInterrupt
                curve = validation_curve(folder)
                if curve:
                    trial.set_user_attr("curve", curve)
                why = hopeless(study.trials, curve, expected, asked)
                if why and process.poll() is None:
                    process.terminate()
                    process.wait()
                    say(f"{label}: given up, {why}")
                    raise optuna.TrialPruned(why)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    trial.set_user_attr("curve", validation_curve(folder))
    if process.returncode == EXIT_INTERRUPTED:  # by the same Ctrl-C that is to end the search
        raise KeyboardInterrupt
    if process.returncode not in (0, EXIT_OVER_BUDGET) or not (folder / SUMMARY).exists():
        last = (folder / "console.log").read_text().strip().splitlines()[-1:]
        say(f"{label}: failed with exit code {process.returncode}: {' '.join(last)}")
        raise TrialFailed(label)
    summary = Summary.read(folder)
    trial.set_user_attr("within_budget", summary.within_budget)
    values = [float(getattr(summary, name)) for name in asked.objectives]
    told = ", ".join(f"{n} {_form(n, v)}" for n, v in zip(asked.objectives, values, strict=True))
    say(f"{label}: {told}{'' if summary.within_budget else ', over the budget'}")
    return values


def _only_once(study: optuna.Study, trial: optuna.Trial, asked: Search) -> None:
    """Put a setting in front that was not tried yet where this one was, if the space is finite.

    Raises:
        TriedBefore: the trial that is at hand need not run.
    """
    grid = asked.grid
    if not grid:
        return
    tried = [
        other.params
        for other in study.get_trials(deepcopy=False)
        if other.number != trial.number
        and TWIN not in other.user_attrs
        and (_ended(other) or (other.state == TrialState.RUNNING and other.number < trial.number))
    ]
    if trial.params not in tried:
        return
    trial.set_user_attr(TWIN, True)
    waiting = [
        other.system_attrs.get("fixed_params")
        for other in study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    ]
    left = [setting for setting in grid if setting not in tried and setting not in waiting]
    if left:
        study.enqueue_trial(random.Random(f"{asked.seed} {trial.number}").choice(left))
    raise TriedBefore


def validation_curve(folder: Path) -> dict[str, float]:
    """Step -> val_bpb of the validations that a run has made so far (`trainer.val_every`)."""
    try:
        events = read_jsonl(folder / "metrics.jsonl")
    except (OSError, ValueError):
        return {}
    return {str(event["step"]): event["val/bpb"] for event in events if "val/bpb" in event}


def hopeless(
    trials: Sequence[FrozenTrial], curve: Mapping[str, float], expected: int, asked: Search
) -> str | None:
    """Why a trial will not be among the best; None while it may.

    It is compared, at its newest validation, with the finished trials that were no larger (where
    bytes are an objective): worse than their median means that it is beaten in everything.
    """
    if not curve or not asked.patience or asked.objectives[0] != "val_bpb":
        return None
    step = max(curve, key=int)
    rivals = [
        trial.user_attrs["curve"][step]
        for trial in trials
        if trial.state == TrialState.COMPLETE
        and step in trial.user_attrs.get("curve", {})
        and ("artifact_bytes" not in asked.objectives or _size(trial) <= expected)
    ]
    if len(rivals) < asked.patience:
        return None
    median = statistics.median(rivals)
    if curve[step] <= median + asked.margin:
        return None
    return (
        f"val_bpb {curve[step]:.4f} at step {step} against {median:.4f}, the median of "
        f"{len(rivals)} finished trials that are no larger"
    )


def _size(trial: FrozenTrial) -> int:
    return trial.user_attrs["bytes_expected"]


def front(study: optuna.Study) -> list[FrozenTrial]:
    """Trials within the budget that no other one beats in everything, best val_bpb first."""
    fitting = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.user_attrs.get("within_budget")
    ]
    best = [one for one in fitting if not any(_beats(other, one) for other in fitting)]
    return sorted(best, key=lambda trial: trial.values)


def _beats(one: FrozenTrial, other: FrozenTrial) -> bool:
    pairs = list(zip(one.values, other.values, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _form(name: str, value: float) -> str:
    return f"{value:.4f}" if name == "val_bpb" else f"{value:,.0f}"


def table(study: optuna.Study, asked: Search) -> str:
    """The Pareto front for people, and how the other trials ended."""
    rows = [["trial", *asked.objectives, "settings"]]
    for trial in front(study):
        figures = [_form(n, v) for n, v in zip(asked.objectives, trial.values, strict=True)]
        settings = " ".join(f"{key}={value}" for key, value in trial.params.items())
        rows.append([str(trial.number), *figures, settings])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    ended = Counter(trial.state for trial in study.trials if _ended(trial))
    lines.append(
        f"{ended[TrialState.COMPLETE]} finished, {ended[TrialState.PRUNED]} given up, "
        f"{ended[TrialState.FAIL]} failed; the front is above, each run in {asked.folder}/TRIAL"
    )
    return "\n".join(lines)


def _write(study: optuna.Study, asked: Search) -> None:
    """search.json: every trial, and which are on the front."""
    best = {trial.number for trial in front(study)}
    trials: list[dict[str, Any]] = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "settings": trial.params,
            "objectives": dict(zip(asked.objectives, trial.values or [], strict=False)),
            "front": trial.number in best,
        }
        for trial in study.trials
        if TWIN not in trial.user_attrs
    ]
    write_json(asked.folder / RESULT, {"fixed": list(asked.fixed), "trials": trials})
