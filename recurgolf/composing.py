"""From overrides to a Run, by Hydra.

This module, `override_errors.py` and `cli.py` are the only importers of Hydra.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode

from recurgolf.conf import (
    PageOption,
    conf_folder,
    group_names,
    read_yaml,
    system_options,
)
from recurgolf.config import (
    REGISTRY,
    ConfigError,
    as_written,
    kind_of,
    load_plugins,
    to_config,
    to_dict,
    to_object,
)
from recurgolf.folders import plain_name
from recurgolf.override_errors import COMPOSE_ERRORS, check_readable, explain, is_bug
from recurgolf.overrides import (
    Choice,
    Interval,
    added_keys,
    as_overrides,
    check_overrides,
    group_of,
    is_seed,
)
from recurgolf.trust import look_in_working_folder

if TYPE_CHECKING:
    from recurgolf.run import Run


def prepared(overrides: Sequence[str], folder: Path | None) -> Path | None:
    """Checked overrides, imported plugins and registered schemas: what composing needs."""
    check_readable(overrides)
    check_overrides(overrides, group_names())
    modules = [*(plugin_modules(folder) if folder else []), *named_plugins(overrides)]
    if modules:
        look_in_working_folder()
    load_plugins(modules)
    register(folder)
    Plugins.instance()  # which registers Hydra's own sources, and would refuse to replace ours
    SourcesRegistry.instance().types["file"] = _Yaml
    return folder


def with_vocabulary(overrides: Sequence[str]) -> list[str]:
    """The overrides, and with data=shards the number of pieces that their tokenizer has, unless
    one is asked for: any other number would be refused when the data are read."""
    from recurgolf.data import DataError
    from recurgolf.data.dataset import tokenizer_of

    given = {key: value for key, _, value in (o.partition("=") for o in overrides)}
    if given.get("data") != "shards" or "data.vocab_size" in given or "data.path" not in given:
        return list(overrides)
    texts = [f"{key}={given[key]}" for key in ("data.path", "data.tokenizer") if key in given]
    values = [override.value() for override in OverridesParser.create().parse_overrides(texts)]
    folder, *tokenizer = [Path(str(value)).expanduser() for value in values if value]
    with contextlib.suppress(DataError):  # which is told in full when the data are read
        pieces = tokenizer_of(folder, tokenizer[0] if tokenizer else None).vocab_size
        return [*overrides, f"data.vocab_size={pieces}"]
    return list(overrides)


def named_plugins(overrides: Sequence[str]) -> list[str]:
    """Modules under `plugins=` on the command line, those of every value of a sweep."""
    found: list[str] = []
    for text in overrides:
        if not re.match(r"\+{0,2}plugins=", text):
            continue
        override = OverridesParser.create().parse_override(text)
        swept = override.is_discrete_sweep()
        values = (
            [yaml.safe_load(value) for value in override.sweep_string_iterator()] if swept else []
        )
        for value in values or [override.value()]:
            found += value if isinstance(value, list) else []
    return found


def varied_keys(overrides: Sequence[str]) -> list[str]:
    """Keys to which a sweep gives several values or a range."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [override.get_key_element() for override in parsed if override.is_sweep_override()]


def of_sweep(run: Run, overrides: Sequence[str], varied: Sequence[str]) -> Run:
    """A job's Run, whose tracker knows what the sweep varies: `demo lora.rank=2`.

    Args:
        overrides: the job's own.
    """
    jobs = [o for o in overrides if o.partition("=")[0] in varied]
    own = [o for o in jobs if not is_seed(o)]
    own = [o for o in own if o.partition("=")[0] != "name" and o != f"experiment={run.name}"]
    group = " ".join([run.name, *own])
    return dataclasses.replace(run, tracker=run.tracker.in_sweep(group, " ".join(jobs)))


class _Yaml(FileConfigSource):
    """YAML files, where `plugins:` may stand in an option's; `plugin_modules` has read it there."""

    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(config_path)
        # In an experiment it is a key of the Run; no option has it.
        if isinstance(result.config, MutableMapping) and result.header.get("package") != "_global_":
            result.config.pop("plugins", None)
        return result


# By its name Hydra knows that `file` has its source, in a process that a launcher starts.
_Yaml.__name__ = FileConfigSource.__name__


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Run:
    """The Run that the command line would make of these overrides.

    Args:
        overrides: as on the command line: `["lora.rank=1", "experiment=smoke"]`.
        config_dir: a folder with YAML of your own, searched before the package's.

    Raises:
        ConfigError: what cannot be composed, with the nearest right name.
    """
    folder = Path(config_dir).resolve() if config_dir else None
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"config_dir {str(config_dir)!r} is not a folder")
    return _composed(overrides, folder, built)


def _composed(overrides: Sequence[str], folder: Path | None, made: Callable[[Any], Any]) -> Any:
    """What `made` makes of the composed config, errors in the words of overrides."""
    prepared(overrides, folder)
    overrides = with_vocabulary(overrides)
    try:
        with hydra_initialized(folder):
            return made(hydra.compose("config", overrides=list(overrides)))
    except COMPOSE_ERRORS as error:
        if is_bug(error):
            raise
        raise ConfigError(explained(error, overrides, folder)) from None


def compose_parts(run: Run, overrides: Sequence[str]) -> Run:
    """A Run with some of its parts changed by overrides, the rest as it was.

    A key alone (`eval.stride=32`) changes the run's own option; a group (`eval=sliding`) starts
    from that option's YAML.
    """
    changed: dict[str, list[str]] = {}
    for override in overrides:
        changed.setdefault(group_of(override), []).append(override)
    own: list[str] = []
    for group, changes in changed.items():
        if not any(change.startswith(f"{group}=") for change in changes):
            own += [f"{group}={kind_of(getattr(run, group))}"]
            own += as_overrides(group, to_dict(getattr(run, group)))
    # The parts alone: together with the default run's model they might be refused.
    parts = _composed(
        [*own, *overrides],
        None,
        lambda config: {group: built(config[group], f"{group}.") for group in changed},
    )
    return dataclasses.replace(run, **parts)


def check_sweep(overrides: Sequence[str], folder: Path | None) -> None:
    """Compose every value of a sweep once: a typo in the last one is told before the first trains.

    Seeds cannot be wrong; ranges of a sweeper that searches are left to it.
    """
    with hydra_initialized(folder):
        loader = GlobalHydra.instance().config_loader()
        lines: list[list[str]] = []
        for override in OverridesParser.create(loader).parse_overrides(list(overrides)):
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

    Args:
        jobs: overrides of every one.
        folder: a user's own, as --config-dir.

    Raises:
        ConfigError: the first job that does not compose, by its overrides.
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
                raise ConfigError(f"{error} (no job was started, because of {job})") from None
    return runs


def sweep_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job of a sweep, in the order in which Hydra's own sweeper runs them.

    Raises:
        ConfigError: ranges that only a searching sweeper can read.
    """
    with hydra_initialized():
        parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(
            list(overrides)
        )
    for override in parsed:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(f"{override.input_line}: not a list of values")
    return [list(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]


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
    """

    key: str
    folder: Path
    new: bool
    run: Run | None
    jobs: list[list[str]]
    config: str = "config"
    launcher: str = "basic"
    at_once: int = 1


def flags_first(arguments: Sequence[str]) -> list[str]:
    """A command line of Hydra's with its flags in front: between overrides it would refuse them."""
    rest = list(arguments)
    overrides = get_args_parser().parse_intermixed_args(rest).overrides
    for override in overrides:
        rest.remove(override)
    return [*rest, *overrides]


def command(arguments: Sequence[str], folder: Path | None) -> Command | None:
    """What Hydra would do with a command line; None where it only prints something.

    Args:
        folder: a user's own, as --config-dir.
    """
    asked = get_args_parser().parse_args(list(arguments))
    if asked.cfg or asked.info or asked.hydra_help or asked.shell_completion:
        return None
    name, overrides = asked.config_name or "config", list(asked.overrides)
    with hydra_initialized(folder):
        told = _of_hydra(name, overrides, RunMode.MULTIRUN)
        multirun = asked.multirun or told.hydra.mode == RunMode.MULTIRUN
        if not multirun:
            run = built(hydra.compose(name, overrides))
            return Command("hydra.run.dir", *_place(told, "run"), run, [])
        params = told.hydra.sweeper.get("params") or {}
        place = _place(told, "sweep")
        launcher, at_once = _launcher(told.hydra.launcher)
    task = [*(f"{key}={value}" for key, value in params.items()), *told.hydra.overrides.task]
    try:
        jobs = sweep_jobs(task)
    except ConfigError:
        jobs = []
    if len(jobs) > 1 and "${hydra.job.num}" not in as_written(told.hydra.sweep)["subdir"]:
        of_hydra = [str(item) for item in told.hydra.overrides.hydra]
        _check_apart([[*of_hydra, *job] for job in jobs], name, folder)
    return Command("hydra.sweep.dir", *place, None, jobs, name, launcher, at_once)


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
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(told)
    try:
        path = Path(str(told.hydra[part].dir))
    finally:
        HydraConfig.instance().cfg = before
    pattern = as_written(told.hydra[part])["dir"]
    if pattern.startswith("outputs/${name}/"):
        path = Path(*map(plain_name, path.parts))
    return path, "${now:" in pattern


def _check_apart(jobs: Sequence[Sequence[str]], name: str, folder: Path | None) -> None:
    """Refuse a `hydra.sweep.subdir` that sends two jobs into one folder.

    Args:
        jobs: overrides of every one, those of Hydra's own part among them.
    """
    seen: dict[str, int] = {}
    with hydra_initialized(folder):
        for number, overrides in enumerate(jobs):
            own = [*overrides, f"hydra.job.num={number}", f"hydra.job.id='{number}'"]
            told = _of_hydra(name, own, RunMode.RUN)
            subdir = str(told.hydra.sweep.subdir)
            if subdir in seen:
                raise ConfigError(
                    f"hydra.sweep.subdir sends jobs {seen[subdir]} and {number} into one folder, "
                    f"{subdir!r}; what varies, or ${{hydra.job.num}}, belongs into it"
                )
            seen[subdir] = number


def search_space(overrides: Sequence[str]) -> tuple[list[str], dict[str, Choice | Interval]]:
    """Overrides of a search: those of every trial, and the space of the others.

    Raises:
        ConfigError: an interval without width, or a logarithmic one that reaches zero.
    """
    check_readable(overrides)
    check_overrides(overrides, group_names())
    with hydra_initialized():
        parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(
            list(overrides)
        )
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


@contextlib.contextmanager
def hydra_initialized(folder: Path | None = None) -> Iterator[None]:
    """Hydra for composing, with a user's folder before the package's as --config-dir puts it."""
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="recurgolf"):
        if folder is not None:
            path = GlobalHydra.instance().config_loader().get_search_path()
            path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2("recurgolf", path)
        try:
            yield
        except ValueError as error:
            # The library that Hydra composes with takes the key for a number without a look.
            word = re.fullmatch(r"invalid literal for int\(\) with base 10: '(.*)'", str(error))
            if word is None:
                raise
            raise ConfigError(
                f"{word[1]!r} is asked of a list, whose entries are named by their numbers, as in "
                "quant.rules.0.bits"
            ) from None


def built(config: Any, path: str = "") -> Any:
    """The objects of a composed config, or of one part of it at `path`."""
    from recurgolf.counted.code import classes_of, texts_of
    from recurgolf.run import Run

    found = to_object(config, path.rstrip("."))
    # `+key=value` adds a key to any node, and nothing would ever read it.
    for key in added_keys(found, path):
        raise ConfigError(f"+{key}: no part of a run reads this key; write known keys without +")
    if isinstance(found, Run):
        load_plugins(found.plugins)  # also those that only YAML names
        # Whoever reads run.json needs the modules of its components, wherever they were named.
        texts = set(texts_of(found))
        named = {cls for kinds in REGISTRY.values() for kind, cls in kinds.items() if kind in texts}
        for name in sorted({cls.__module__ for cls in {*classes_of(found), *named}}):
            known = {"recurgolf", "__main__", *found.plugins}
            if not {name, name.partition(".")[0]} & known:
                found.plugins.append(name)
    return found


class _Store(dict):
    """What Hydra's store holds. Hydra would copy all of it for every composition; its loads copy
    what they need anyway."""

    systems: Sequence[PageOption] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Store:
        return self


class _PageNode(ConfigNode):
    """An option of a page in Hydra's store. A config is made of it only where it is chosen: a run
    has a dozen of the hundred."""

    def __init__(self, option: PageOption) -> None:
        self.name, self.group, self.provider = f"{option.name}.yaml", option.group, None
        self.package = "_global_" if option.group == "experiment" else None
        self.content = option.content

    def __getattr__(self, name: str) -> Any:
        if name != "node":
            raise AttributeError(name)
        return to_config(self.content)


def register(folder: Path | None = None) -> None:
    """Hand Hydra the schemas, as schema/<group>/<kind>, and the options on the pages of systems.

    Args:
        folder: a user's own, whose pages are read as well.
    """
    from recurgolf.run import Run

    store = ConfigStore.instance()
    if not isinstance(store.repo, _Store):
        store.repo = _Store(store.repo)
    _register_schema("schema", "run", Run)
    for group, kinds in REGISTRY.items():
        for kind, cls in kinds.items():
            if dataclasses.is_dataclass(cls):
                _register_schema(f"schema/{group}", kind, cls)
    systems = system_options(folder)
    if systems is not store.repo.systems:
        for option in store.repo.systems:
            group = functools.reduce(dict.__getitem__, option.group.split("/"), store.repo)
            del group[f"{option.name}.yaml"]
        for option in systems:
            group = store.repo
            for name in option.group.split("/"):
                group = group.setdefault(name, {})
            group[f"{option.name}.yaml"] = _PageNode(option)
        store.repo.systems = systems


@functools.cache
def _register_schema(group: str, kind: str, cls: type) -> None:
    ConfigStore.instance().store(kind, cls, group)


def plugin_modules(folder: Path) -> list[str]:
    """Modules named under `plugins:` in the YAML of the user's folder, importable from there.

    They must be imported before composing, since they register the schemas that YAML refers to.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    modules: list[str] = []
    for path in sorted(folder.rglob("*.yaml")):
        content = read_yaml(path)
        named = content.get("plugins") if isinstance(content, dict) else None
        named = [named] if isinstance(named, str) else named or []
        modules += [name for name in named if name not in modules]
    return modules


def explained(
    error: BaseException, overrides: Sequence[str] = (), folder: Path | None = None
) -> str:
    """What Hydra or OmegaConf refused; see `override_errors.explain`.

    Args:
        overrides: of the command line; the groups they choose say which keys there are.
        folder: a user's own, whose options are known as well.
    """
    groups = group_names()
    chosen = [o for o in overrides if o.partition("=")[0] in groups and "," not in o]

    def config() -> Any:
        with hydra_initialized(folder):
            try:
                return hydra.compose("config", overrides=chosen)
            except COMPOSE_ERRORS:
                return hydra.compose("config")

    return explain(error, folder, config)
