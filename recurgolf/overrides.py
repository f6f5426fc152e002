"""Overrides as text: what may be written on the command line, and an option tree written as it."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurgolf.config import ConfigError

if TYPE_CHECKING:
    import optuna

CONFIG_DIR_FLAGS = ("--config-dir", "-cd")


def as_list(overrides: str | Sequence[str]) -> list[str]:
    """Overrides from Python: a list of them, or one string as it would be typed."""
    if isinstance(overrides, str):
        try:
            overrides = shlex.split(overrides)
        except ValueError as error:
            raise ConfigError(f"{overrides}: {error}".replace("No closing", "no closing")) from None
    if not isinstance(overrides, Iterable):
        overrides = [overrides]
    for override in overrides:
        if not isinstance(override, str) or ("=" not in override and override[:1] != "~"):
            raise ConfigError(
                f"{override!r} is no override: compose takes texts key=value, as in "
                'compose(["experiment=smoke", "lora.rank=2"])'
            )
    return list(overrides)


def check_overrides(overrides: Sequence[str], groups: Collection[str]) -> None:
    """Refuse what Hydra itself would break on."""
    if (
        "hydra/launcher=slurm" in overrides
        and {"-m", "--multirun"} & set(overrides)
        and shutil.which("srun") is None
    ):
        raise ConfigError(
            "hydra/launcher=slurm, but this machine has no srun: start it on a node of the "
            "cluster, or take hydra/launcher=slurm_here or joblib"
        )
    for override in overrides:
        group, _, value = override.partition("=")
        if not group.strip("+~ "):
            raise ConfigError(f"{override!r}: no key stands in front of the sign =")
        if "." in group and "=" in override and group.replace(".", "/") in groups:
            slashed = group.replace(".", "/")
            raise ConfigError(f"{override}: {slashed} is a group; write {slashed}={value}")
        plain = group.lstrip("+")
        if plain in groups and (group[:2] == "++" or (group[:1] == "+" and "/" not in plain)):
            raise ConfigError(f"{override}: a run has one already; write {plain}={value}")
        if value == "null" and group.lstrip("+") in groups:
            raise ConfigError(
                f"{override}: a group cannot be null; where absence makes sense it is an option of "
                f"its own, as in {group}=none"
            )


def split_arguments(arguments: Sequence[str], verb: str) -> tuple[list[str], Path | None]:
    """Overrides and the folder of --config-dir, for verbs that compose without Hydra's own main."""
    overrides: list[str] = []
    skip = False
    for argument in arguments:
        if skip or argument.partition("=")[0] in CONFIG_DIR_FLAGS:
            skip = not skip and "=" not in argument
        elif argument.startswith("~") or ("=" in argument and not argument.startswith("-")):
            overrides.append(argument)
        else:
            raise ConfigError(
                f"{verb} takes overrides (key=value) and --config-dir FOLDER, not {argument!r}"
            )
    return overrides, config_dir(arguments)


def config_dir(arguments: Sequence[str]) -> Path | None:
    """The folder given by --config-dir, absolute; None without one."""
    for position, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in CONFIG_DIR_FLAGS:
            value = value or "".join(arguments[position + 1 : position + 2])
            if not value or not Path(value).is_dir():
                raise ConfigError(f"--config-dir {value!r} is not a folder")
            return Path(value).resolve()
    return None


def group_of(override: str) -> str:
    """The first name in an override: `quant` of `quant.bits=4` and of `quant/qat=none`."""
    return re.split(r"[=./]", override.lstrip("+~"), maxsplit=1)[0]


def check_parts(overrides: Iterable[str], allowed: Sequence[str], verb: str) -> None:
    """Refuse overrides of other parts of a run than these."""
    for override in overrides:
        if group_of(override) not in allowed:
            named = f"{', '.join(allowed[:-1])} and {allowed[-1]}"
            raise ConfigError(f"{verb} takes overrides of {named}, not {override!r}")


def is_seed(override: str) -> bool:
    """Whether an override (or its key) only changes chance: seed or seeds.*."""
    key = override.partition("=")[0].lstrip("+")
    return key == "seed" or key.startswith("seeds.")


def added_keys(node: Any, path: str = "") -> Iterator[str]:
    """Dotted keys of an option tree that are no fields of its classes."""
    if dataclasses.is_dataclass(node):
        fields = {field.name for field in dataclasses.fields(node)}
        for key, value in vars(node).items():
            if key not in fields:
                yield f"{path}{key}"
            else:
                yield from added_keys(value, f"{path}{key}.")
    elif isinstance(node, list):
        for position, item in enumerate(node):
            yield from added_keys(item, f"{path}{position}.")


def as_overrides(path: str, node: dict[str, Any]) -> list[str]:
    """Overrides that bring back an option tree as `to_dict` wrote it."""
    found = []
    for key, value in node.items():
        if isinstance(value, dict):
            if "kind" in value:
                found.append(f"{path}/{key}={value['kind']}")
            found += as_overrides(f"{path}.{key}", value)
        elif key != "kind":
            found.append(f"{path}.{key}={quoted(value)}")
    return found


def quoted(value: Any) -> str:
    """A JSON value in the grammar of overrides."""
    if value is None:
        return "null"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    if isinstance(value, list):
        return "[" + ",".join(map(quoted, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{quoted(item)}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Choice:
    """One of some values, as they are written in an override."""

    values: tuple[str, ...]

    @property
    def values_tried(self) -> Sequence[Any]:
        """All that can be drawn, as a trial keeps it; empty where there is no end to it."""
        return list(dict.fromkeys(self.values))

    def suggest(self, trial: optuna.Trial, key: str) -> str:
        return str(trial.suggest_categorical(key, list(self.values)))


@dataclass(frozen=True)
class Interval:
    """Any number between two, ends included; `log` spreads the trials over orders of magnitude."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @property
    def values_tried(self) -> Sequence[Any]:
        """All that can be drawn; empty where there is no end to it."""
        return range(int(self.low), int(self.high) + 1) if self.whole else ()

    def suggest(self, trial: optuna.Trial, key: str) -> str:
        if self.whole:
            return str(trial.suggest_int(key, int(self.low), int(self.high), log=self.log))
        return repr(trial.suggest_float(key, self.low, self.high, log=self.log))
