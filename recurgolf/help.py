"""The text of `recurgolf --help`, made from the YAML that is there, and of `--help GROUP`, made
from the classes and their docstrings besides; only the latter imports anything heavy."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from recurgolf.conf import about, options, parts_of_systems
from recurgolf.config import REGISTRY, ConfigError, suggestion
from recurgolf.limits import limits_of
from recurgolf.overrides import quoted

WIDTH = 100

VERBS = {
    "train": "compose a run, train it, pack it, score the file (the default)",
    "plan": "parameters, visits, FLOPs and predicted bytes, before any training",
    "import": "somebody's checkpoint as a run folder: recurgolf import SYSTEM WEIGHTS CONFIG DEST",
    "evaluate": "score a finished run's file again: recurgolf evaluate FOLDER [eval=sliding]",
    "sample": 'let a finished run write: recurgolf sample FOLDER "How it begins"',
    "export": "a finished run as a folder that runs alone: recurgolf export RUN [RUN2 ...] DEST",
    "pack": "another quantizer on trained weights: recurgolf pack FOLDER DEST quant=gptq_int6",
    "audit": "is a finished run's score allowed and counted right? recurgolf audit FOLDER",
    "compare": "settings over seeds: recurgolf compare FOLDER... [--baseline lora.rank=0]",
    "board": "an HTML page of runs and sweeps: recurgolf board FOLDER... [--out board.html]",
    "resume": "go on with a run that was stopped: recurgolf resume FOLDER",
    "sweep": "run what is missing or failed: recurgolf sweep resume FOLDER; sweep show FOLDER",
    "sync": "upload the W&B runs below folders: recurgolf sync FOLDER... [--dry-run]",
    "search": "look for the best settings, by bits per byte and bytes (recurgolf search --help)",
    "completion": 'tab completion: eval "$(recurgolf completion bash)" (or zsh, fish)',
    "control": "a looped run without its loop at equal cost: recurgolf control compare.match=flops",
    "adapters": "save, load, merge or blend adapters (recurgolf adapters --help)",
}

_EXAMPLES = """\
  recurgolf                                        the default, on the CPU, in four minutes
  recurgolf lora.rank=1 looping=cycle              any override of any key
  recurgolf -m lora.rank=1,2 'seed=range(1,4)'     every combination, then a table over seeds
"""


def help_text(folder: Path | None = None) -> str:
    """Verbs, groups with their options, systems with their groups, and three examples."""
    systems = parts_of_systems(folder)
    verbs = "\n".join(f"  {name:<11}{text}" for name, text in VERBS.items())
    groups = "\n".join(
        f"  {group:<20} {', '.join(name for name in names if name not in systems)}"
        for group, names in options(folder).items()
        if group != "hydra"
    )
    parts = "\n".join(f"  {name:<28} {', '.join(groups)}" for name, groups in systems.items())
    return (
        "recurgolf: depth-recurrent language models within a byte budget\n\n"
        "usage: recurgolf [VERB] [group=option] [key=value] ...\n\n"
        f"verbs\n{verbs}\n\n"
        f"groups and their options (group=option)\n{groups}\n\n"
        "systems (experiment=system), and the groups of which they have an option of their own "
        f"(group=system)\n{parts}\n\n"
        "every key of an option can be set: group.key=value; a wrong one names the nearest right "
        "one\n\n"
        f"examples\n{_EXAMPLES}\n"
        "flags\n"
        "  --help WORD         every option and key of a group, or one key\n"
        "  --version           of recurgolf\n"
        "  -m, --multirun      run every combination of comma-separated values\n"
        "  --config-dir DIR    a folder with YAML of your own (README, 'Adding a component')\n"
        "  --cfg job           print the composed configuration and stop\n"
        "  --hydra-help        what else Hydra can do\n"
    )


def group_help(group: str, folder: Path | None = None) -> str:
    """Every option of a group with what its YAML says of it, and every key that options have."""
    lines: list[str] = []
    if names := options(folder).get(group):
        lines = [f"{group}=OPTION\n"]
        lines += [_line(f"  {name:<28} {about(group, name, folder)}") for name in names]
    return "\n".join([*lines, *_with_headings(_keys(group))]).lstrip("\n")


def help_of(word: str, folder: Path | None = None) -> str:
    """What `--help WORD` says: of a group, of a part of a run, or of one key."""
    groups = {*options(folder), *_parts()} - {"hydra", "name", "seed", "plugins"}
    for name in (word, word.replace(".", "/")):
        if name in groups:
            return group_help(name, folder)
    parts = re.sub(r"\b\d+\b", "N", word).replace("/", ".").split(".")
    whole = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    group = next((name for name in whole if name in groups), "")
    asked = ".".join(parts[group.count("/") + 1 if group else 0 :])
    found = [key for key in _keys(group) if f"{key.path}.".startswith(f"{asked}.")]
    if found:
        return "\n".join(_with_headings(found)).lstrip("\n")
    known = {f"{g}.{key.path}".replace("/", ".") for g in groups for key in _keys(g)}
    named = sorted(key for key in known if key.endswith(f".{asked}"))
    hint = f" (did you mean {' or '.join(named[:4])}?)" if named else ""
    raise ConfigError(f"--help {word}: no such group or key{hint or suggestion(word, groups)}")


def field_keys(group: str) -> list[str]:
    """Keys that any option of a group has."""
    return sorted({f.name for cls in _classes(group).values() for f in dataclasses.fields(cls)})


def _parts() -> Mapping[str, Any]:
    """Part of a run -> its class."""
    from recurgolf.run import Run

    return typing.get_type_hints(Run)


def _classes(group: str) -> Mapping[str, Any]:
    """Kind -> class; where a group has one kind without a name, that is empty. "": of a run."""
    if group in REGISTRY:
        return {k: cls for k, cls in REGISTRY[group].items() if dataclasses.is_dataclass(cls)}
    known = _parts()
    if not group:
        from recurgolf.run import Run

        return {"": Run}
    return {"": known[group]} if dataclasses.is_dataclass(known.get(group)) else {}


@dataclasses.dataclass(frozen=True)
class _Key:
    """A key below its group, the options that have it, and what there is to say of it."""

    path: str
    heading: str
    text: str


def _keys(group: str) -> Iterator[_Key]:
    """Keys of a group's options by the class that brings them."""
    classes, dotted = _classes(group), group.replace("/", ".")
    for owner in dict.fromkeys(o for cls in classes.values() for o in reversed(cls.__mro__)):
        kinds = [kind for kind, cls in classes.items() if issubclass(cls, owner)]
        of = "" if len(kinds) == len(classes) else f" of {', '.join(kinds)}"
        key = f"{dotted}.KEY" if group else "KEY"
        heading = _line(f"keys{of} ({key}=VALUE): type, default, meaning", indent=4)
        for path, text in _own_keys(owner, group):
            yield _Key(path, heading, text)


def _with_headings(keys: Iterable[_Key]) -> Iterator[str]:
    """What is said of keys, under one heading for those that the same options have."""
    heading = ""
    for key in keys:
        if key.heading != heading:
            heading = key.heading
            yield f"\n{heading}\n"
        yield key.text


def _own_keys(owner: Any, group: str, above: str = "") -> Iterator[tuple[str, str]]:
    """Path and text of what a class itself declares, and of what lies below that."""
    fields = {f.name: f for f in dataclasses.fields(owner)} if _is_option(owner) else {}
    for name in vars(owner).get("__annotations__", {}):
        if name not in fields:
            continue
        hint, path = typing.get_type_hints(owner)[name], f"{above}{name}"
        inner, below = _inside(hint)
        nested = f"{group}/{name}" if group else name
        meaning = _meaning(owner, name)
        if inner is hint and (nested in REGISTRY or not group):
            said, inner = f"see recurgolf --help {nested}", None
        elif inner is hint:
            said, meaning = "the keys below", meaning or _first_sentence(inner)
        else:
            limits = "".join(f", {limit}" for limit in limits_of(owner).get(name, ()))
            said = f"{_type_name(hint)}{limits}; {_default(fields[name])}"
        head = _line(f"  {path:<28} {said}")
        yield path, "\n".join([head, *([_line(" " * 8 + meaning, 8)] if meaning else [])])
        # What a subclass only sets otherwise is told where it is declared.
        if inner is not None and not any(name in _annotations(base) for base in owner.__mro__[1:]):
            yield from _own_keys(inner, group, f"{path}{below}.")


def _annotations(owner: type) -> Mapping[str, Any]:
    return vars(owner).get("__annotations__", {})


def _is_option(owner: Any) -> bool:
    return isinstance(owner, type) and dataclasses.is_dataclass(owner)


def _inside(hint: Any) -> tuple[Any, str]:
    """The class of keys that a field holds or has entries of, and how these are written."""
    if _is_option(hint):
        return hint, ""
    inner = (typing.get_args(hint) or (None,))[-1]
    if typing.get_origin(hint) not in (list, dict) or not _is_option(inner):
        return None, ""
    return inner, ".N" if typing.get_origin(hint) is list else ".NAME"


def _line(text: str, indent: int = 31) -> str:
    """Wrapped; what does not fit on the first line stands `indent` further in."""
    return "\n".join(
        textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)
    )


def _type_name(hint: Any) -> str:
    """A type in the words of YAML."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(one) for one in typing.get_args(hint))
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) in (list, dict):
        inner = typing.get_args(hint)[-1]
        return f"{typing.get_origin(hint).__name__} of {_type_name(inner)}"
    if dataclasses.is_dataclass(hint):
        return "keys of its own"
    return {Any: "any value"}.get(hint) or getattr(hint, "__name__", str(hint))


def _default(field: dataclasses.Field[Any]) -> str:
    """What a key has where no YAML says otherwise."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "no default"
    return f"default {quoted(_plain(value))}" if value != "" else "default empty"


def _plain(value: Any) -> Any:
    """With option classes as mappings of what they say."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    told = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    usual = {f.name: f.default for f in dataclasses.fields(value)}
    return {name: own for name, own in told.items() if own != usual[name]}


def _first_sentence(owner: type) -> str:
    return " ".join((owner.__doc__ or "").split("\n\n")[0].split())


def _meaning(owner: type, name: str) -> str:
    """What the class, or the nearest above it that says anything, says of its field."""
    said = (_meanings(base).get(name, "") for base in owner.__mro__ if _is_option(base))
    return next(filter(None, said), "")


@functools.cache
def _meanings(owner: type) -> dict[str, str]:
    """Field -> the docstring under it, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for before, node in zip(body.body, body.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
            said = getattr(getattr(node, "value", None), "value", None)
            if isinstance(node, ast.Expr) and isinstance(said, str):
                found[before.target.id] = " ".join(said.split())
    return found
