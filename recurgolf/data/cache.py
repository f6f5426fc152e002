"""The cache folder, and notes in it of what has been found out about large files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where prepared data lies: RECURGOLF_CACHE, or ~/.cache/recurgolf."""
    return Path(os.path.expanduser(os.environ.get("RECURGOLF_CACHE") or "~/.cache/recurgolf"))


def remembered(key: Any, find: Callable[[], Any]) -> Any:
    """What `find` gives, or what it gave for the same key before; both JSON-ready.

    A note whose checksum is wrong is ignored, and one that cannot be written is done without.
    """
    note = cache_folder() / "checked" / f"{sha256_of(key)[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["sha256"] == sha256_of([key, known["found"]]):
            return known["found"]
    found = find()
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        unfinished = note.with_suffix(f".{os.getpid()}")
        text = json.dumps({"found": found, "sha256": sha256_of([key, found])})
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(note)
    return found


def sha256_of(value: Any) -> str:
    """SHA-256 of a JSON-ready value, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
