"""Files written whole or not at all, strict JSON, and disk errors that name the file.

Python says which file could not be opened, but not which one could not grow.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recurgolf.config import ConfigError

DEEPEST = 100
"""Levels of nesting in any JSON file that this program writes, and many more."""


class DamagedFile(ConfigError):
    """A file that is not what a run writes there. The text names it and says why."""


@contextlib.contextmanager
def writing(path: Path, size: int = 0) -> Iterator[None]:
    """Inside, a file or folder is written; an error of the disk then tells which and how much.

    Args:
        size: bytes that are to be written; 0: not known.

    Raises:
        OSError: the disk's own, with `filename`.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        needed = f" (it needs {size:,} bytes)" if size else ""
        raise OSError(error.errno, f"{error.strerror or error}{needed}", str(path)) from None


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, have the disk hold it, and rename it.

    Whatever goes wrong, what was there under the name before is still there, whole.
    """
    data = content.encode() if isinstance(content, str) else content
    draft = path.with_name(f".{path.name}.draft")
    with writing(path, len(data)):
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    flush(path.parent)


def json_text(data: Any, indent: int | None = None) -> str:
    """Strict JSON: a number that is not finite is null, for there is no other word for it there."""
    return json.dumps(json.loads(json.dumps(data), parse_constant=lambda _: None), indent=indent)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file as `write_file` does."""
    write_file(path, json_text(data, 1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a run has written; what stood for a NaN is None.

    Raises:
        FileNotFoundError: there is none.
        DamagedFile: it cannot be read, is not JSON, is no object, or is nested beyond reason.
    """
    try:
        data = json.loads(path.read_bytes(), parse_constant=lambda name: None)
        deep = _deeper(data, DEEPEST)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DamagedFile(f"{path} is damaged: {why}") from None
    if deep:
        raise DamagedFile(f"{path} is damaged: nested more than {DEEPEST} deep")
    if not isinstance(data, dict):
        raise DamagedFile(f"{path} is damaged: it holds no JSON object")
    return data


def _deeper(data: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper than that."""
    layer = [data]
    for _ in range(levels):
        layer = [
            item
            for node in layer
            if isinstance(node, (dict, list))
            for item in (node.values() if isinstance(node, dict) else node)
        ]
    return bool(layer)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
