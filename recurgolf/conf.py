"""What can be chosen: options that are files, and the options on the pages of systems.

`group=name` is either the file `<group>/<name>.yaml`, or the block `<group>` of the page
`systems/<name>.yaml`, which holds a whole system:

    like: per_iteration_lora        # optional: the system that this one is a variant of
    looping:                        # a block makes the option looping=<name of the page>; without
      passes: 3                     #   defaults it changes the option of the system named above
    optimizer/schedule: wallclock   # a word selects an option that exists
    experiment:                     # values of the experiment that selects all of the above
      trainer: {devices: 8}

The option of a nested group belongs to its parent: `model/mixer` is selected by the page's `model`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recurgolf.config import ConfigError

SYSTEMS = "systems"
"""The folder of the pages; every other folder is a group."""


def conf_folder() -> Path:
    """The YAML: beside the modules in an installed package, beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    inside = here / "conf"
    return inside if inside.is_dir() else here.parent / "conf"


def group_names() -> list[str]:
    """The config groups of the package, `model/mixer` where nested."""
    conf = conf_folder()
    folders = (p.relative_to(conf).as_posix() for p in conf.rglob("*") if p.is_dir())
    return sorted(folder for folder in folders if folder != SYSTEMS)


def options(folder: Path | None = None) -> dict[str, list[str]]:
    """Group -> the names of its options."""
    found: dict[str, set[str]] = {}
    for conf in filter(None, (conf_folder(), folder)):
        for path in conf.glob("*/**/*.yaml"):
            found.setdefault(path.parent.relative_to(conf).as_posix(), set()).add(path.stem)
    found.pop(SYSTEMS, None)
    for option in system_options(folder):
        found.setdefault(option.group, set()).add(option.name)
    return {group: sorted(names) for group, names in sorted(found.items())}


def parts_of_systems(folder: Path | None = None) -> dict[str, list[str]]:
    """System -> the groups of which its page has an option."""
    found: dict[str, list[str]] = {}
    for option in system_options(folder):
        found.setdefault(option.name, []).append(option.group)
    return {name: [g for g in groups if g != "experiment"] for name, groups in found.items()}


def about(group: str, name: str, folder: Path | None = None) -> str:
    """The first sentence of the comment on an option: at its file's head, or above its block."""
    for conf in filter(None, (folder, conf_folder())):
        if (path := conf / group / f"{name}.yaml").is_file():
            return _comments(path)[""]
        if (path := conf / SYSTEMS / f"{name}.yaml").is_file():
            said = _comments(path)
            return (
                said[""]
                if group == "experiment"
                else said.get(group, "") or f"part of experiment={name}"
            )
    return ""


def _comments(path: Path) -> dict[str, str]:
    """First sentences of the comments at a file's head (under "") and above its blocks."""
    found: dict[str, str] = {}
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            sentence = re.split(r"\.(?:\s|$)", " ".join(lines))[0]
            found.setdefault("", sentence)
            if line[:1].isalpha():
                found[line.partition(":")[0]] = sentence
            lines = []
        elif re.match(r"# (?!recurgolf|@package)\S", line):
            lines.append(line[2:])
    return found


@dataclasses.dataclass(frozen=True)
class PageOption:
    """An option that a page makes: what a file `<group>/<name>.yaml` would hold."""

    group: str
    name: str
    content: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Page:
    """A system: blocks and words by group, in the order of the file."""

    path: Path
    like: str | None
    parts: Mapping[str, Any]
    experiment: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path.stem

    def makes(self, group: str) -> bool:
        """Whether the page has a block for this group."""
        return isinstance(self.parts.get(group), dict)

    def selected(self, group: str) -> str | None:
        """The option of a group on this page that the system has."""
        return self.name if self.makes(group) else self.parts[group]


def system_options(folder: Path | None = None) -> Sequence[PageOption]:
    """The options on the pages of the package and of a user's folder; the same object for as long
    as no page changes.
    """
    return _made(_stamps(conf_folder()), folder, _stamps(folder))


Stamps = tuple[tuple[Path, int], ...]


def _stamps(conf: Path | None) -> Stamps:
    """The pages of a folder, each with the time of its last change."""
    paths = sorted((conf / SYSTEMS).glob("*.yaml")) if conf else []
    return tuple((path, path.stat().st_mtime_ns) for path in paths)


@functools.lru_cache(maxsize=8)
def _made(package: Stamps, folder: Path | None, own: Stamps) -> Sequence[PageOption]:
    ours = {path.stem: _page(path, changed) for path, changed in package}
    users = {path.stem: _page(path, changed) for path, changed in own}
    found = [option for option in _options_of(ours, ours) if option.name not in users]
    for option in _options_of(users, {**ours, **users}):
        for conf in filter(None, (conf_folder(), folder)):
            path = conf / option.group / f"{option.name}.yaml"
            if path.is_file():
                raise ConfigError(
                    f"{users[option.name].path}: {option.group}={option.name} is also the file "
                    f"{path}; give the page another name"
                )
        found.append(option)
    return tuple(found)


@functools.cache
def _page(path: Path, changed: int) -> Page:
    """A page as it stands in the file; `changed` (its time) tells an edited one apart."""
    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a page has one block for each group")
    like = content.pop("like", None)
    experiment = content.pop("experiment", None) or {}
    content.pop("plugins", None)  # which composing has read before, as in any YAML
    for part, value in content.items():
        if value is not None and not isinstance(value, (str, dict)):
            raise ConfigError(f"{path}: {part}: {value!r} is neither a block nor an option's name")
    return Page(path, like, content, experiment)


def _with_parents(page: Page, pages: Mapping[str, Page]) -> Page:
    """A variant with another mixer has another model, be it without a block of its own for it."""
    line = _ancestors(page, pages)
    parents = {part.rpartition("/")[0] for part in page.parts} - page.parts.keys()
    changed = [p for p in parents if any(other.makes(p) for other in line)]
    return dataclasses.replace(page, parts={**page.parts, **{p: {} for p in sorted(changed)}})


def _ancestors(page: Page, pages: Mapping[str, Page]) -> list[Page]:
    """The systems that a page is a variant of, nearest first."""
    found: list[Page] = []
    like = page.like
    while like is not None and like in pages:
        if like in (page.name, *(other.name for other in found)):
            raise ConfigError(f"{page.path}: like: {like} leads back to itself")
        found.append(pages[like])
        like = pages[like].like
    return found


def _options_of(pages: Mapping[str, Page], known: Mapping[str, Page]) -> Iterator[PageOption]:
    """What pages make, in sight of the systems that `like:` may name."""
    known = {name: _with_parents(page, known) for name, page in known.items()}
    for page in (known[name] for name in pages):
        for group in filter(page.makes, page.parts):
            content = dict(page.parts[group])
            first = content.pop("defaults", None) or [_changed(page, group, known)]
            nested = [part for part in page.parts if part.startswith(f"{group}/")]
            last = [{f"override {p.removeprefix(f'{group}/')}": page.selected(p)} for p in nested]
            yield PageOption(group, page.name, {"defaults": [*first, *last, "_self_"], **content})
        chosen = [part for part in page.parts if not page.makes(part.rpartition("/")[0])]
        defaults = [page.like] if page.like else []
        defaults += [{f"override /{part}": page.selected(part)} for part in chosen]
        content = {"defaults": [*defaults, "_self_"], "name": page.name, **page.experiment}
        yield PageOption("experiment", page.name, content)


def _changed(page: Page, group: str, pages: Mapping[str, Page]) -> str | None:
    """The option that a block without defaults changes."""
    for other in _ancestors(page, pages):
        if group in other.parts:
            return other.selected(group)
    raise ConfigError(
        f"{page.path}: {group} says no `defaults: [OPTION]`, and there is no option of a system "
        "named by `like:` that it could change"
    )


def read_yaml(path: Path) -> Any:
    """What is in a file."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
