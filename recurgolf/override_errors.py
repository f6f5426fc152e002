"""What is wrong with overrides, in their own words: what to quote, and the nearest right name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)

from recurgolf.conf import SYSTEMS, group_names, options
from recurgolf.config import (
    CONFIG_LIBRARY_ERRORS,
    REGISTRY,
    ConfigError,
    key_names,
    suggestion,
)
from recurgolf.overrides import CONFIG_DIR_FLAGS, quoted

COMPOSE_ERRORS = (HydraException, *CONFIG_LIBRARY_ERRORS)
VALUE_FLAGS = (
    *(*CONFIG_DIR_FLAGS, "--config-path", "-cp", "--config-name", "-cn"),
    *("--package", "-p", "--experimental-rerun"),
)
"""Flags of Hydra whose value is the next argument."""
_EXPECTED = {
    r"Value '(.*?)' .*could not be converted to Integer": "a whole number",
    r"Value '(.*?)' .*could not be converted to Float": "a number",
    r"Value '(.*)' is not a valid bool": "true or false",
    r"is not a ListConfig": "a list, as in [a,b]",
}
"""How OmegaConf refuses a type -> what would be right."""


def check_readable(arguments: Sequence[str]) -> None:
    """Refuse overrides that break the grammar, in words that say what to quote."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("-") or "=" not in argument or before in VALUE_FLAGS:
            continue
        if not _is_readable(argument):
            raise ConfigError(unreadable(argument))


def unreadable(override: str) -> str:
    """What is wrong with an override that breaks the grammar."""
    key, _, value = override.partition("=")
    if not _is_readable(f"{key}=0"):
        return f"{override}: {key!r} cannot be a key; a key has letters, digits, _ . / and @"
    for opening, closing in ("[]", "{}", "()"):
        more = value.count(opening) - value.count(closing)
        # A lone one in the middle of a word is part of it, and is quoted.
        if more > 0 and value.startswith(opening) and _is_readable(f"x={value}{closing * more}"):
            return f"{override}: {opening} without {closing}: {key}={value}{closing * more}"
    inner = value[1:-1] if value[:1] + value[-1:] == "[]" else value
    odd = [c for c in dict.fromkeys(inner) if not _is_readable(f"x=a{c}b") and c != ","]
    parts = _quoted_parts(value)
    if not _is_readable(f"{key}={parts}"):
        parts = quoted(value)
    right = f"{key}={parts}"
    shell = f'"{right}"' if not set(right) & set('"$`!\\') else shlex.quote(right)
    named = " ".join(odd) or value
    return f"{override}: {named} in a value needs quotes: {right} (in a shell {shell})"


def _quoted_parts(value: str) -> str:
    """With quotes around those values of a list or sweep that need them."""
    if value.startswith("[") and value.endswith("]"):
        return f"[{_quoted_parts(value[1:-1])}]"
    return ",".join(v if _is_readable(f"x={v}") else quoted(v) for v in value.split(","))


def _is_readable(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def is_bug(error: BaseException) -> bool:
    """Whether a component's own code broke: so OmegaConf words a TypeError in `__post_init__`."""
    return "Could not create instance" in str(error)


def explain(error: BaseException, folder: Path | None, config: Callable[[], Any]) -> str:
    """What Hydra or OmegaConf refused, in one or two lines, with the nearest right name.

    Args:
        folder: a user's own, whose options are known as well.
        config: composes the options that the user chose; their keys are the known ones.
    """
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    if any(isinstance(e, ConfigError) for e in chain):
        return str(next(e for e in chain if isinstance(e, ConfigError)))
    texts = [str(e) for e in chain]
    whole = "\n".join(texts)
    if isinstance(error, MissingConfigException):
        return _unknown_option(whole, error.options or (), folder)
    several = re.search(r"Ambiguous value for argument '([^']+)'", whole)
    if several:
        key, _, values = several.group(1).partition("=")
        return f"{key}={values} is several values: -m runs each of them, [{values}] is one list"
    if isinstance(error, OverrideParseException):
        return f"cannot read an override: {texts[0].splitlines()[0]}"
    unknown = re.search(r"Key '([^']+)' (?:is )?not in '?(\w+)'?", whole)
    key = re.search(r"full_key: (\S+)", whole)
    override = re.search(r"[Cc]ould not override '([^']+)'", whole)
    if override and (unknown or isinstance(error, ConfigCompositionException)):
        return _unknown_key(override.group(1), config, folder)
    if unknown and key:
        return _unknown_key(key.group(1), config, folder)
    for said, expected in _EXPECTED.items():
        if key and (value := re.search(said, whole)):
            return f"{key[1]}{f'={value[1]}' if value.groups() else ''}: expected {expected}"
    if key:
        return f"{key.group(1)}: {texts[-1].splitlines()[0]}"
    lines = [line.strip() for line in texts[0].splitlines() if line.strip()]
    return " ".join(lines[:2])


def _unknown_option(text: str, found: Sequence[str], folder: Path | None) -> str:
    match = re.search(r"[Cc]ould not (?:find|load) '([^']+)'", text)
    if match is None:
        return text.splitlines()[0]
    group, _, name = match.group(1).rpartition("/")
    # Hydra knows the launchers that are installed beside ours.
    known = [*options(folder).get(group, []), *found]
    return f"{group}={name}: no such option{suggestion(name, known)}"


def _unknown_key(key: str, composed: Callable[[], Any], folder: Path | None) -> str:
    if key == SYSTEMS:
        return "the pages in conf/systems are chosen by experiment=NAME, their parts by group=NAME"
    if key.startswith("hydra."):
        return f"Hydra has no key {key!r}"
    groups = group_names()
    parent, _, name = key.rpartition(".")
    config = composed()
    # The first part that is not there is the wrong one: `modle.dim` has no key at all.
    while "." in parent and not key_names(config, parent):
        parent, _, name = parent.rpartition(".")
    top = key_names(config, "")
    if "/" in key or not parent or (parent not in top and "." not in parent):
        wrong = key if "/" in key or not parent else parent
        hint = _elsewhere(wrong, config, folder)
        if not hint and not get_close_matches(wrong, [*top, *groups]):
            deeper = {re.split(r"[./]", path)[-1] for path in (*groups, *_paths(config, ""))}
            near = get_close_matches(wrong, deeper, n=1, cutoff=0.75)
            hint = _elsewhere(near[0], config, folder) if near else ""
        hint = hint or suggestion(wrong, [*top, *groups])
        return f"there is no key or group {wrong!r}{hint}"
    known = key_names(config, parent)
    if not known:
        return f"{parent} has no key {name!r}: the chosen option of {parent} has none"
    return f"{parent} has no key {name!r}{suggestion(name, known)}"


def _elsewhere(word: str, config: Any, folder: Path | None) -> str:
    """Where a word that stands alone belongs: `codec` to artifact/codec, `bits` into every rule of
    quant, `stride` to eval=sliding, `zstd` to artifact/codec=zstd."""
    if "." in word or "/" in word:
        return ""
    known = options(folder)
    paths = [path for path in _paths(config, "") if path.replace(".", "/") not in known]
    named = [path for path in (*known, *paths) if re.split(r"[./]", path)[-1] == word]
    near = [path for path in paths if path.endswith(f"_{word}")]
    having = {group: _kinds_with(word, kinds) for group, kinds in REGISTRY.items()}
    others = [
        f"{group.replace('/', '.')}.{word} with {group}={'|'.join(kinds)}"
        for group, kinds in having.items()
        if kinds
    ]
    options_called = [f"{group}={word}" for group, names in known.items() if word in names]
    for some in (named, near, others, options_called):
        found = [path for path in some if not path.startswith("hydra")][:4]
        if found:
            return f" (did you mean {' or '.join(map(repr, found))}?)"
    return ""


def _kinds_with(key: str, kinds: Mapping[str, type]) -> list[str]:
    return [kind for kind, cls in kinds.items() if key in getattr(cls, "__dataclass_fields__", ())]


def _paths(config: Any, parent: str) -> Iterator[str]:
    """Every key of a composed config, dotted, the shortest first where they are siblings."""
    for name in key_names(config, parent):
        path = f"{parent}.{name}" if parent else name
        yield path
        if path != "hydra":
            yield from _paths(config, path)
