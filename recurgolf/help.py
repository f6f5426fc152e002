"""The text of `recurgolf --help`, made from the YAML that is there, and of `--help GROUP`, made
from the classes and their docstrings besides; only the latter imports anything heavy."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recurgolf.conf import about, options, parts_of_systems
from recurgolf.config import REGISTRY
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
    """Verbs, groups with their options, systems with their groups, and three examples.

    Args:
        folder: a user's own, whose options are listed as well.
    """
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
        "  --help GROUP        what every option of a group is, and every key\n"
        "  --version           of recurgolf\n"
        "  -m, --multirun      run every combination of comma-separated values\n"
        "  --config-dir DIR    a folder with YAML of your own (README, 'Adding a component')\n"
        "  --cfg job           print the composed configuration and stop\n"
        "  --hydra-help        what else Hydra can do\n"
    )


def group_help(group: str, folder: Path | None = None) -> str:
    """Every option of a group with what its YAML says of it, and every key that options have."""
    lines = [f"{group}=OPTION\n"]
    for name in options(folder)[group]:
        lines.append(f"  {name:<28} {about(group, name, folder)}".rstrip())
    return "\n".join([*lines, *_keys_help(group)])


def field_keys(group: str) -> list[str]:
    """Keys that any option of a group has."""
    return sorted({f.name for cls in _classes(group).values() for f in dataclasses.fields(cls)})


def _classes(group: str) -> Mapping[str, Any]:
    """Kind -> class; where a group has one kind without a name, that is empty."""
    from recurgolf.run import ArtifactConfig, Run

    if group in REGISTRY:
        return {k: cls for k, cls in REGISTRY[group].items() if dataclasses.is_dataclass(cls)}
    known = {**typing.get_type_hints(Run), "artifact": ArtifactConfig}
    return {"": known[group]} if dataclasses.is_dataclass(known.get(group)) else {}


def _keys_help(group: str) -> list[str]:
    """Keys by the class that brings them: type, default and meaning."""
    classes, dotted = _classes(group), group.replace("/", ".")
    lines: list[str] = []
    told: set[tuple[type, str]] = set()
    for owner in dict.fromkeys(o for cls in classes.values() for o in reversed(cls.__mro__)):
        kinds = [kind for kind, cls in classes.items() if issubclass(cls, owner)]
        own = [n for n in vars(owner).get("__annotations__", {}) if _is_field(owner, n)]
        own = [name for name in own if (owner, name) not in told]
        if not own:
            continue
        every = len(kinds) == len(classes)
        of = "" if every else f" of {', '.join(kinds)}"
        lines.append(f"\nkeys{of} ({dotted}.KEY=VALUE): type, default, meaning\n")
        for name in own:
            told.add((owner, name))
            lines += _key_help(owner, name)
    return lines


def _is_field(owner: Any, name: str) -> bool:
    return dataclasses.is_dataclass(owner) and name in {f.name for f in dataclasses.fields(owner)}


def _key_help(owner: Any, name: str) -> list[str]:
    """One key: what it may hold and what it is set to, and under it what it means."""
    field = next(f for f in dataclasses.fields(owner) if f.name == name)
    hint = typing.get_type_hints(owner)[name]
    limits = "".join(f", {limit}" for limit in limits_of(owner).get(name, ()))
    head = f"  {name:<28} {_type_name(hint)}{limits}; {_default(field)}"
    meaning = _meanings(owner).get(name, "")
    return [head, *textwrap.wrap(meaning, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)]


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
    if dataclasses.is_dataclass(value):
        kind = getattr(type(value), "kind", "")
        return f"default {kind}" if kind else "see below it"
    return f"default {quoted(value)}" if value != "" else "default empty"


@functools.cache
def _meanings(owner: type) -> dict[str, str]:
    """Field -> the docstring under it, on one line; else what the class's own says of it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for before, node in zip(body.body, body.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
            said = getattr(getattr(node, "value", None), "value", None)
            if isinstance(node, ast.Expr) and isinstance(said, str):
                found[before.target.id] = " ".join(said.split())
    return found
