"""What earlier versions wrote (run.json, headers of artifacts), read as this one would write it.

Fields are looked up by the kind of the option that they are in. Only what is read from files comes
through here: an override or a YAML with an old name is refused with the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recurgolf.config import ConfigError

RENAMED: dict[tuple[str, str], str] = {}
"""(kind, old name) -> the field's name today."""

REMOVED: dict[tuple[str, str], Any] = {}
"""(kind, old name) -> the only value that is left of what the field could say."""


def modern(node: Any) -> Any:
    """A tree of options as `config.from_dict` takes it.

    Raises:
        ConfigError: a field that is gone, with a value that nothing stands for any more.
    """
    if isinstance(node, list):
        return [modern(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    kind, fields = str(node.get("kind")), {}
    for name, value in node.items():
        if (kind, name) not in REMOVED:
            fields[RENAMED.get((kind, name), name)] = modern(value)
        elif value != REMOVED[kind, name]:
            raise ConfigError(
                f"{kind}.{name}={value!r} was written by an earlier version; this one has no such "
                f"option, and does what {REMOVED[kind, name]!r} did"
            )
    return fields
