"""What a command line asks Hydra for before it runs anything: the folder, one Run, or the jobs of
a sweep; and the space of a search.

With `composing.py`, `override_errors.py` and `cli.py` the only importer of Hydra.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.types import RunMode

from recurgolf.composing import built, hydra_initialized
from recurgolf.conf import group_names
from recurgolf.config import ConfigError, as_written
from recurgolf.folders import plain_name
from recurgolf.override_errors import check_readable
from recurgolf.overrides import Choice, Interval, check_overrides, is_seed, quoted

if TYPE_CHECKING:
    from recurgolf.run import Run


def varied_keys(overrides: Sequence[str]) -> list[str]:
    """Keys to which a sweep gives several values or a range."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [override.get_key_element() for override in parsed if override.is_sweep_override()]


def of_sweep(run: Run, overrides: Sequence[str], varied: Sequence[str]) -> Run:
    """A job's Run, whose tracker knows what the sweep varies: `demo lora.rank=2`."""
    jobs = [o for o in overrides if o.partition("=")[0] in varied]
    own = [o for o in jobs if not is_seed(o)]
    own = [o for o in own if o.partition("=")[0] != "name" and o != f"experiment={run.name}"]
    group = " ".join([run.name, *own])
    return dataclasses.replace(run, tracker=run.tracker.in_sweep(group, " ".join(jobs)))


def _parsed(overrides: Sequence[str]) -> list[Override]:
    """Overrides as Hydra reads them, which it does within `hydra_initialized`."""
    loader = GlobalHydra.instance().config_loader()
    return OverridesParser.create(loader).parse_overrides(list(overrides))


def check_sweep(overrides: Sequence[str], folder: Path | None) -> None:
    """Compose every value of a sweep once: a typo in the last one is told before the first trains.

    Seeds cannot be wrong; ranges of a sweeper that searches are left to it.
    """
    with hydra_initialized(folder):
        lines: list[list[str]] = []
        for override in _parsed(overrides):
            key = override.get_key_element()
            if not override.is_sweep_override():
                lines.append([f"{key}={override.get_value_element_as_str()}"])
            elif override.is_discrete_sweep() and not is_seed(key):
                lines.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        first = [line[0] for line in lines]
        for position, line in enumerate(lines):
            for choice in line if len(line) > 1 else []:
                hydra.compose("config", [*first[:position], choice, *first[position + 1 :]])


def composed_jobs(
    jobs: Sequence[Sequence[str]], folder: Path | None, name: str = "config"
) -> list[Run]:
    """The Run of every job of a sweep, so that none trains before all are known to be right.

    Jobs that differ in `seed` alone are composed once.
    """
    known: dict[tuple[str, ...], Run] = {}
    runs = []
    with hydra_initialized(folder):
        for job in jobs:
            own = [item for item in job if not item.startswith("seed=")]
            seeds = [item for item in job if item.startswith("seed=")]
            key = (*own, str(len(seeds)))
            number = seeds[-1].partition("=")[2] if seeds else ""
            try:
                if key in known and number.isdecimal():
                    runs.append(dataclasses.replace(known[key], seed=int(number)))
                else:
                    runs.append(built(hydra.compose(name, list(job))))
                known.setdefault(key, runs[-1])
            except ConfigError as error:
                which = " ".join(job)
                raise ConfigError(f"{error} (no job was started, because of {which})") from None
    return runs


def sweep_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job of a sweep, in the order of Hydra's own sweeper."""
    with hydra_initialized():
        parsed = _parsed(overrides)
    for override in parsed:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(f"{override.input_line}: not a list of values")
    return [list(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]


class Composed(ConfigLoaderImpl):
    """Hydra's loader when it has composed already: whoever asks gets that config."""

    def __init__(self, path: ConfigSearchPath, config: Any):
        super().__init__(path)
        self.config = config

    def load_configuration(self, *asked: Any, **more: Any) -> Any:
        return copy.deepcopy(self.config)


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line asks Hydra for, before Hydra writes anything.

    Attributes:
        key: of the folder: `hydra.run.dir` or `hydra.sweep.dir`.
        folder: where everything goes.
        new: whether the folder is to be made under a name that nobody has; else it was named.
        run: the Run; None where there are several.
        jobs: a sweep's: the overrides of every one; empty where a searching sweeper makes them.
        config: name of the config that is composed.
        launcher: what runs the jobs: `basic`, `joblib`, `submitit`, or the name of another.
        at_once: how many jobs run at a time, as far as that is known.
        loader: holds the config of a single run.
    """

    key: str
    folder: Path
    new: bool
    run: Run | None
    jobs: list[list[str]]
    config: str = "config"
    launcher: str = "basic"
    at_once: int = 1
    loader: Composed | None = None


def flags_first(arguments: Sequence[str]) -> list[str]:
    """A command line of Hydra's with its flags in front: between overrides it would refuse them."""
    rest = list(arguments)
    overrides = get_args_parser().parse_intermixed_args(rest).overrides
    for override in overrides:
        rest.remove(override)
    return [*rest, *overrides]


def command(arguments: Sequence[str], folder: Path | None) -> Command | None:
    """What Hydra would do with a command line; None where it only prints something."""
    asked = get_args_parser().parse_args(list(arguments))
    if asked.cfg or asked.info or asked.hydra_help or asked.shell_completion:
        return None
    for flag in ("config_path", "experimental_rerun"):
        if getattr(asked, flag) is not None:
            raise ConfigError(
                f"--{flag.replace('_', '-')} of Hydra is not supported; --config-dir=FOLDER adds "
                "YAML of your own, and `recurgolf resume FOLDER` continues a run"
            )
    name, overrides = asked.config_name or "config", list(asked.overrides)
    with hydra_initialized(folder):
        several = asked.multirun or any(o.is_sweep_override() for o in _parsed(overrides))
        told = _of_hydra(name, overrides, RunMode.MULTIRUN if several else RunMode.RUN)
        if not asked.multirun and told.hydra.mode != RunMode.MULTIRUN:
            if several:
                hydra.compose(name, overrides)  # says what is wrong with several values
            main = GlobalHydra.instance().hydra
            assert main is not None
            loader = main.config_loader = Composed(main.config_loader.get_search_path(), told)
            run = built(hydra.compose(name, overrides))
            place = _place(loader.load_configuration(), "run")
            return Command("hydra.run.dir", *place, run, [], loader=loader)
        params = told.hydra.sweeper.get("params") or {}
        place = _place(told, "sweep")
        launcher, at_once = _launcher(told.hydra.launcher)
    task = [*(f"{key}={value}" for key, value in params.items()), *told.hydra.overrides.task]
    try:
        jobs = sweep_jobs(task)
    except ConfigError:
        jobs = []
    if len(jobs) > 1 and "${hydra.job.num}" not in as_written(told.hydra.sweep)["subdir"]:
        # As they were typed: what they refer to differs from job to job.
        of_hydra = as_written(told.hydra.overrides)["hydra"]
        _check_apart([[*of_hydra, *job] for job in jobs], name, folder)
    return Command("hydra.sweep.dir", *place, None, jobs, name, launcher, at_once)


def run_single(asked: Command, folder: Path | None, job: Callable[[Any], Any]) -> None:
    """Have Hydra make the folder of a single run, keep its config there and call the job.

    Its `main` does the same, but composes twice more: to learn that it is a single run, and to run.
    """
    assert asked.loader is not None
    told = asked.loader.config
    if folder is not None:
        told.hydra.run.dir = str(folder)
        told.hydra.overrides.hydra.append(f"{asked.key}={quoted(str(folder))}")
    Hydra(told.hydra.job.name, asked.loader).run(told.hydra.job.config_name, job, [])


def _launcher(node: Any) -> tuple[str, int]:
    """What runs the jobs of a sweep, and how many at a time."""
    target = str(node.get("_target_", ""))
    known = [name for name in ("basic", "joblib", "submitit") if name in target]
    name = known[0] if known else target.rpartition(".")[2]
    if name == "joblib":
        asked = int(node.get("n_jobs") or -1)
        cores = os.cpu_count() or 1
        return name, asked if asked > 0 else max(1, cores + 1 + asked)
    return name, 1


def _of_hydra(name: str, overrides: list[str], mode: RunMode) -> Any:
    """The whole config, Hydra's own part among it."""
    main = GlobalHydra.instance().hydra
    assert main is not None
    return main.compose_config(
        name, overrides, mode, with_log_configuration=False, validate_sweep_overrides=False
    )


def _place(told: Any, part: str) -> tuple[Path, bool]:
    """The folder of `hydra.run` or `hydra.sweep`, and whether its name is to be a new one.

    A name with the time in it is meant to be new; the package's own is plain as well.
    """
    with _asked_of(told):
        path = Path(str(told.hydra[part].dir))
    pattern = as_written(told.hydra[part])["dir"]
    if pattern.startswith("outputs/${name}/"):
        path = Path(*map(plain_name, path.parts))
    return path, "${now:" in pattern


@contextlib.contextmanager
def _asked_of(told: Any) -> Iterator[None]:
    """Inside, `${hydra:...}` is answered from this config."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(told)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def _check_apart(jobs: Sequence[Sequence[str]], name: str, folder: Path | None) -> None:
    """Refuse a `hydra.sweep.subdir` that sends two jobs into one folder."""
    seen: dict[str, int] = {}
    with hydra_initialized(folder):
        for number, overrides in enumerate(jobs):
            own = [*overrides, f"hydra.job.num={number}", f"hydra.job.id='{number}'"]
            told = _of_hydra(name, own, RunMode.RUN)
            with _asked_of(told):
                subdir = str(told.hydra.sweep.subdir)
            if subdir in seen:
                raise ConfigError(
                    f"hydra.sweep.subdir sends jobs {seen[subdir]} and {number} into one folder, "
                    f"{subdir!r}; what varies, or ${{hydra.job.num}}, belongs into it"
                )
            seen[subdir] = number


def search_space(overrides: Sequence[str]) -> tuple[list[str], dict[str, Choice | Interval]]:
    """Overrides of a search: those of every trial, and the space of the others."""
    check_readable(overrides)
    check_overrides(overrides, group_names())
    with hydra_initialized():
        parsed = _parsed(overrides)
    fixed: list[str] = []
    space: dict[str, Choice | Interval] = {}
    for override in parsed:
        key = override.get_key_element()
        value = override.value()
        if not override.is_sweep_override():
            fixed.append(override.input_line or f"{key}={override.get_value_element_as_str()}")
        elif isinstance(value, IntervalSweep):
            low, high = float(value.start or 0), float(value.end or 0)
            log = "log" in value.tags
            if low >= high or (log and low <= 0):
                raise ConfigError(
                    f"{override.input_line}: from a smaller to a larger number"
                    + (", both above zero where the scale is logarithmic" if log else "")
                )
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            space[key] = Interval(low, high, log, whole)
        else:
            space[key] = Choice(tuple(override.sweep_string_iterator()))
    return fixed, space
