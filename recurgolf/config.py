"""Typed options: the registry of every component, and the way to and from run.json.

An option is a dataclass registered with `@option(group, kind)`. Hydra composes YAML against these
classes (composing.py hands them over), `to_object` turns the composed config into plain objects,
and `to_dict`/`from_dict` write and read them again without Hydra, each registered node carrying its
`kind`. This is the only module that imports omegaconf.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recurgolf.limits import refused

T = TypeVar("T")

REGISTRY: dict[str, dict[str, type]] = {}
"""Group -> kind -> dataclass. Filled by the `@option` lines when the package's modules load."""

EXIT_FAILED, EXIT_USER_ERROR, EXIT_OVER_BUDGET, EXIT_INTERRUPTED = 1, 2, 3, 130
"""Exit codes of the command line."""

CONFIG_LIBRARY_ERRORS = (OmegaConfBaseException,)
"""What OmegaConf raises on a wrong key or type; override_errors.py rewords it."""


class ConfigError(ValueError):
    """A contradiction in what the user asked for. Its text is the whole message shown."""


class RunFailed(RuntimeError):
    """The run cannot go on. Its text is the whole message shown; what was saved stays."""


class Diverged(RunFailed):
    """A loss, weight or score is not finite: the run has a status, `diverged`, and no figures."""


class Checked:
    """Base of the option dataclasses: what is built keeps the limits of its fields (limits.py).

    A subclass with a `__post_init__` of its own calls this one first.
    """

    def __post_init__(self) -> None:
        if wrong := refused(type(self), vars(self), _home(type(self))):
            raise ConfigError(wrong)


def option(group: str, kind: str) -> Callable[[type[T]], type[T]]:
    """Register a dataclass as the option `kind` of a config group (`model/mixer` when nested)."""

    def register(cls: type[T]) -> type[T]:
        known = REGISTRY.setdefault(group, {})
        if kind in known and known[kind].__qualname__ != cls.__qualname__:
            raise ConfigError(
                f"two components are registered as {group}={kind}: {known[kind]}, {cls}"
            )
        known[kind] = cls
        cls.kind = kind  # type: ignore[attr-defined]
        return cls

    return register


def kind_of(node: Any) -> str:
    """The registered kind of an option object; its tag in W&B and its name in YAML."""
    return type(node).kind


def import_modules(package: str) -> list[str]:
    """Import every module of a package, so that the `@option` lines in them run.

    The `__init__` of a package whose modules hold options ends with
    `MODULES = import_modules(__name__)`: a new module then needs no line anywhere else. It is an
    assignment because nothing reads it, so that packed programs leave it out; they carry the
    modules that they use and import those themselves.
    """
    names = [
        f"{package}.{module.name}" for module in pkgutil.iter_modules(sys.modules[package].__path__)
    ]
    for name in names:
        importlib.import_module(name)
    return names


def _home(cls: type) -> str:
    """Dotted path at which an option is usually found; empty where it is registered nowhere."""
    groups = (group for group, kinds in REGISTRY.items() if cls in kinds.values())
    return next(groups, "").replace("/", ".")


def load_plugins(modules: typing.Iterable[str] = ()) -> None:
    """Import components that live outside the package, so that their `@option` lines run.

    Args:
        modules: importable module names, besides every `recurgolf.plugins` entry point installed.
    """
    for entry in entry_points(group="recurgolf.plugins"):
        entry.load()
    for name in modules:
        try:
            importlib.import_module(name)
        except (ImportError, SyntaxError, ValueError) as error:
            raise ConfigError(
                f"plugins: cannot import {name!r} ({error}); it must be importable from the folder "
                "where recurgolf was started, or installed"
            ) from None


def to_config(content: Mapping[str, Any]) -> DictConfig:
    """What a YAML file would hold, as a node to compose with."""
    return OmegaConf.create(dict(content))


def to_object(config: DictConfig, path: str = "") -> Any:
    """The composed config as instances of the registered classes, interpolations resolved.

    Raises:
        ConfigError: a value beyond the limits of its field, by its full key.
    """
    OmegaConf.resolve(config)
    _check_limits(config, OmegaConf.to_container(config), path)
    return OmegaConf.to_object(config)


def _check_limits(node: Any, values: Any, path: str) -> None:
    if isinstance(values, dict):
        if wrong := refused(OmegaConf.get_type(node) or dict, values, path):
            raise ConfigError(wrong)
        keys: typing.Iterable[Any] = values
    else:
        keys = range(len(values))
    for key in keys:
        if isinstance(values[key], (dict, list)):
            _check_limits(node[key], values[key], f"{path}.{key}" if path else str(key))


def key_names(config: DictConfig, parent: str) -> list[str]:
    """Keys below a dotted path of a composed config, numbers below a list; else nothing."""
    node = OmegaConf.select(config, parent) if parent else config
    if isinstance(node, ListConfig):
        return [str(number) for number in range(len(node))]
    return [str(key) for key in node] if isinstance(node, DictConfig) else []


def as_written(config: DictConfig) -> dict[str, Any]:
    """A composed node with its interpolations as they stand in the YAML."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))


def to_dict(node: Any) -> Any:
    """JSON-ready copy of an option tree; `from_dict` is its inverse."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        fields = {f.name: to_dict(getattr(node, f.name)) for f in dataclasses.fields(node)}
        return {"kind": kind_of(node), **fields} if hasattr(type(node), "kind") else fields
    if isinstance(node, Mapping):
        return {str(key): to_dict(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [to_dict(value) for value in node]
    return node


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """Build `cls`, or the registered subclass named by `data["kind"]`, from `to_dict`'s output."""
    data = dict(data)
    kind = data.pop("kind", None)
    if kind is not None:
        cls = _subclass_of_kind(cls, kind)
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in data:
        if key not in names:
            raise ConfigError(f"{cls.__name__} has no field {key!r}{suggestion(key, names)}")
    return cls(**{key: _decode(hints[key], value) for key, value in data.items()})


def suggestion(wrong: str, known: typing.Iterable[str]) -> str:
    """' (did you mean x?)', or the list of what there is."""
    known = sorted(set(known))
    near = difflib.get_close_matches(wrong, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (there are: {', '.join(known)})"


def _subclass_of_kind(base: type[T], kind: str) -> type[T]:
    found = [
        cls
        for options in REGISTRY.values()
        for name, cls in options.items()
        if name == kind and issubclass(cls, base)
    ]
    if len(found) != 1:
        kinds = [k for o in REGISTRY.values() for k, c in o.items() if issubclass(c, base)]
        raise ConfigError(f"no {base.__name__} of kind {kind!r}{suggestion(kind, kinds)}")
    return found[0]


def _decode(hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in args if a is not type(None)]
        return None if value is None else _decode(inner[0], value) if len(inner) == 1 else value
    if origin is list:
        return [_decode(args[0], item) for item in value]
    if origin is dict:
        return {key: _decode(args[1], item) for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(hint, value)  # type: ignore[arg-type]
    return float(value) if hint is float and isinstance(value, int) else value


def check_types(node: Any, path: str = "") -> None:
    """Refuse a field of an option tree that was assigned a value of another type.

    Composing does so itself; Python assigns anything.
    """
    for name, hint in typing.get_type_hints(type(node)).items():
        if not hasattr(node, name) or typing.get_origin(hint) is typing.ClassVar:
            continue
        key, value = f"{path}.{name}" if path else name, getattr(node, name)
        if not _fits(hint, value):
            raise ConfigError(f"{key}={value!r}: expected {_in_words(hint)}")
        if dataclasses.is_dataclass(value):
            check_types(value, key)


def _fits(hint: Any, value: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(one, value) for one in args)
    if origin is list:
        return isinstance(value, list) and all(_fits(args[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(args[1], item) for item in value.values())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return hint is typing.Any or not isinstance(hint, type) or isinstance(value, hint)


def _in_words(hint: Any) -> str:
    """A type as a user knows it: `an option of OptimizerConfig`, `int or null`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_in_words(one) for one in typing.get_args(hint))
    if hint is type(None):
        return "null (None)"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"an object of the class {hint.__name__}"
    return str(hint) if typing.get_origin(hint) else hint.__name__
