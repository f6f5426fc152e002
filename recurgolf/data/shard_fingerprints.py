"""Whether the files of a data set are still those that were checked.

Size and times of a file cost one stat and tell that something happened to it; its SHA-256 tells
whether it holds something else. The first are looked at while a run goes on, the second is
remembered in the cache, so that a large shard is read once and not at every start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recurgolf.data.cache import remembered, sha256_of
from recurgolf.data.shards import HEADER_BYTES, MANIFEST, DataChanged, DataError, count_tokens

_BYTES_AT_ONCE = 1 << 22


class Fingerprint(NamedTuple):
    """What is known of a file: its size and times, its contents, the largest token behind the
    header of a shard (nothing, for any other file)."""

    size: int
    modified: int
    changed: int
    sha256: str
    largest: int

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        """The fingerprint of a file; a shard is checked as in `count_tokens`."""
        if path.suffix == ".bin":
            count_tokens(path)
        stat = path.stat()
        times = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        key = [str(path.resolve()), stat.st_ino, *times]
        return cls(*times, *remembered(key, lambda: _contents(path)))


def fingerprints(paths: Iterable[Path]) -> dict[Path, Fingerprint]:
    """The fingerprint of every file."""
    return {path: Fingerprint.of(path) for path in paths}


def check_unchanged(before: Mapping[Path, Fingerprint]) -> None:
    """Refuse to go on with files that no longer hold what they did."""
    for path, known in before.items():
        try:
            now = path.stat()
        except OSError:
            raise DataChanged(path, "is gone") from None
        if (now.st_size, now.st_mtime_ns, now.st_ctime_ns) == known[:3]:
            continue
        if now.st_size != known.size:
            raise DataChanged(path, f"has {now.st_size:,} bytes instead of {known.size:,}")
        if _contents(path)[0] != known.sha256:  # else it was copied or touched
            raise DataChanged(path, "was written again")


def checksums(manifest: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """What to add to a manifest: SHA-256 of every other file below its folder, and of itself."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != MANIFEST)
    listed = {path.relative_to(root).as_posix(): _contents(path)[0] for path in files}
    return {"files": listed, "sha256": sha256_of({**manifest, "files": listed})}


def check_checksums(
    manifest: Mapping[str, Any], root: Path, files: Mapping[Path, Fingerprint]
) -> None:
    """Refuse a manifest or files that are not what the manifest's checksums say, if it has any."""
    whole = {key: value for key, value in manifest.items() if key != "sha256"}
    listed = whole.get("files")
    if "sha256" not in manifest or not isinstance(listed, Mapping):
        return
    if manifest["sha256"] != sha256_of(whole):
        raise DataError(f"{root / MANIFEST}: it does not have the checksum that it states")
    expected_of = {root / name: expected for name, expected in listed.items()}
    for path, known in files.items():
        expected = expected_of.get(path.resolve(), known.sha256)
        if expected != known.sha256:
            raise DataError(
                f"{path}: SHA-256 {known.sha256[:12]}…, but {expected[:12]}… when it was written"
            )


def _contents(path: Path) -> list[Any]:
    """SHA-256 of a file and its largest uint16 behind a shard's header."""
    digest, largest = hashlib.sha256(), 0
    with path.open("rb") as file:
        digest.update(file.read(HEADER_BYTES))
        while part := file.read(_BYTES_AT_ONCE):
            digest.update(part)
            tokens = np.frombuffer(part, dtype="<u2", count=len(part) // 2)
            largest = max(largest, int(tokens.max(initial=0)))
    return [digest.hexdigest(), largest]
