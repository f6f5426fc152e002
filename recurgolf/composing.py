"""From overrides to a Run, by Hydra.

This module, `multirun.py`, `override_errors.py` and `cli.py` are the only importers of Hydra.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult

from recurgolf.conf import (
    PageOption,
    conf_folder,
    group_names,
    options,
    read_yaml,
    system_options,
)
from recurgolf.config import (
    REGISTRY,
    ConfigError,
    load_plugins,
    to_config,
    to_dict,
    to_object,
)
from recurgolf.override_errors import COMPOSE_ERRORS, check_readable, explain, is_bug
from recurgolf.overrides import (
    added_keys,
    as_overrides,
    check_overrides,
    group_of,
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

    A key alone (`eval.stride=32`) changes the run's own option; a group (`eval=sliding`,
    `quant/calibration=train`) starts from that option's YAML. Other data keep the model's
    vocabulary, unless they name their own.
    """
    if not overrides:
        return run
    keys = {override.partition("=")[0] for override in overrides}
    if "data" in keys and "data.vocab_size" not in keys:
        overrides = [f"data.vocab_size={run.data.vocab_size}", *overrides]
    changed = dict.fromkeys(map(group_of, overrides))
    chosen = {key.replace("/", ".") for key in keys if key in changed or "/" in key}
    own: list[str] = []
    kept: dict[str, dict[str, Any]] = {}
    for group in changed.keys() - chosen:
        option = getattr(run, group)
        # No override can write a new entry of a mapping from names to options (`budget.caps`).
        kept[group] = {key: value for key, value in vars(option).items() if isinstance(value, dict)}
        kind = getattr(type(option), "kind", "")
        # Where no option is named after the kind, all values are given anyway.
        own += [f"{group}={kind}"] if kind in options().get(group, ()) else []
        values = {key: value for key, value in to_dict(option).items() if key not in kept[group]}
        own += as_overrides(group, values)
    below = tuple(f"{group}." for group in chosen)
    own = [o for o in own if not f"{o.partition('=')[0]}.".replace("/", ".").startswith(below)]
    # The parts alone: together with the default run's model they might be refused.
    parts = _composed(
        [*own, *overrides],
        None,
        lambda config: {group: built(config[group], f"{group}.") for group in changed},
    )
    for group, values in kept.items():
        parts[group] = dataclasses.replace(parts[group], **values)
    return dataclasses.replace(run, **parts)


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
    """Hand Hydra the schemas, as schema/<group>/<kind>, and the options on the pages of systems."""
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
    """What Hydra or OmegaConf refused; see `override_errors.explain`."""
    groups = group_names()
    chosen = [o for o in overrides if o.partition("=")[0] in groups and "," not in o]

    def config() -> Any:
        with hydra_initialized(folder):
            try:
                return hydra.compose("config", overrides=chosen)
            except COMPOSE_ERRORS:
                return hydra.compose("config")

    return explain(error, folder, config)
