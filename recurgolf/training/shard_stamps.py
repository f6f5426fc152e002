"""Whether the training shards are still those that a run began with.

While a run goes on a shard's size and time of change tell; they cost one stat each. A run that is
continued later, perhaps on another machine, compares lengths and samples of the contents instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recurgolf.data import Dataset
from recurgolf.data.shards import DataError, Tokens
from recurgolf.training.faults import RunFailed

SAMPLE_BYTES = 4096
SAMPLES = 8

Stamp = tuple[int, int]


def stamps(paths: list[Path]) -> dict[Path, Stamp]:
    """Size and time of change of every shard."""
    return {path: _stamp(path) for path in paths}


def check_unchanged(before: dict[Path, Stamp]) -> None:
    """Refuse to go on with shards that are no longer the same files.

    Raises:
        RunFailed: the first one that changed or is gone, with what was and what is.
    """
    for path, (size, changed) in before.items():
        now = _stamp(path)
        if now == (size, changed):
            continue
        if now[0] < 0:
            what = "is gone"
        elif now[0] != size:
            what = f"has {now[0]:,} bytes instead of {size:,}"
        else:
            what = "was written again"
        raise _changed(path, what)


def check_uncut(shards: Sequence[Tokens]) -> None:
    """Refuse to read from a file that was cut, which would end the process with SIGBUS.

    Raises:
        RunFailed: the first one that has fewer bytes than when it was opened.
    """
    for shard in shards:
        if isinstance(shard, np.memmap):
            now, opened = shard._mmap.size(), shard.offset + shard.nbytes  # type: ignore[attr-defined]
            if now < opened:
                raise _changed(shard.filename, f"has {now:,} bytes instead of {opened:,}")


def contents(dataset: Dataset) -> dict[str, str]:
    """What a checkpoint remembers of the data: shard -> hash of its length and of samples."""
    found = {path.name: _sampled(path) for path in dataset.train_shards}
    return {"validation": dataset.fingerprint, **found}


def check_contents(before: dict[str, str], dataset: Dataset) -> None:
    """Refuse to continue on other data.

    Raises:
        DataError: the shards that are new, gone or different.
    """
    now = contents(dataset)
    differing = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if differing:
        shown = ", ".join(differing[:5]) + (" ..." if len(differing) > 5 else "")
        raise DataError(
            f"{dataset.folder}: the data is not what this run began with; it differs in {shown}. "
            "Put the old data back, or start anew with trainer.resume=never"
        )


def _changed(path: object, what: str) -> RunFailed:
    return RunFailed(
        f"{path} {what}: the data changed during the run, so its result would mean nothing; "
        "the last checkpoint was made before that was seen. Put the file back and resume"
    )


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb", buffering=0) as file:
        for number in range(SAMPLES):
            file.seek(max(size - SAMPLE_BYTES, 0) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


__all__ = ["check_contents", "check_unchanged", "check_uncut", "contents", "stamps"]
