"""Token shards in the challenge's `.bin` format: written, checked, read.

A shard is 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then that
many little-endian uint16 tokens and nothing else. Shards of a split, sorted by name, are one
stream: documents may straddle them.

Files are read and never mapped into memory: reading a mapped file that somebody has cut kills the
process, reading one that is open gives fewer bytes.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recurgolf.config import ConfigError, RunFailed
from recurgolf.disk import write_file

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
MANIFEST = "manifest.json"

Tokens = NDArray[np.uint16]


class DataError(ConfigError):
    """Data that cannot be used as asked; the text names the file, what was found and expected."""


class DataChanged(RunFailed):
    """A file that was changed while a run was reading it."""

    def __init__(self, path: object, what: str) -> None:
        super().__init__(
            f"{path} {what}: the data changed during the run, so its result would mean nothing; "
            "the last checkpoint was made before that was seen. Put the file back and resume"
        )


def write_shard(path: Path, tokens: Tokens) -> None:
    """Write one shard, replacing `path`."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    write_file(path, header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def count_tokens(path: Path) -> int:
    """Number of tokens of a shard, from its header; magic, version and file size are checked."""
    try:
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"{path}: cannot read this shard ({error.strerror})") from None
    if len(header) < HEADER_BYTES:
        raise DataError(f"{path}: {size} bytes, but a shard begins with a header of {HEADER_BYTES}")
    magic, version, num_tokens = (int(word) for word in header.view("<i4")[:3])
    if magic != MAGIC:
        raise DataError(f"{path}: not a token shard: magic number {magic}, expected {MAGIC}")
    if version != VERSION:
        raise DataError(f"{path}: shard format version {version}, expected {VERSION}")
    expected = HEADER_BYTES + 2 * num_tokens
    if num_tokens < 0 or size != expected:
        problem = "truncated" if size < expected else "trailing bytes"
        raise DataError(
            f"{path}: {problem}: {size} bytes, expected {expected} for the {num_tokens} tokens "
            "of its header"
        )
    return num_tokens


def read_shard(path: Path) -> Tokens:
    """All tokens of a shard, 1-D uint16, in memory and read-only; checks as `count_tokens`."""
    num_tokens = count_tokens(path)
    tokens = np.fromfile(path, dtype="<u2", count=num_tokens, offset=HEADER_BYTES)
    if len(tokens) < num_tokens:
        raise DataError(f"{path}: it was cut while it was read")
    tokens.flags.writeable = False
    return tokens


class Shard:
    """The tokens of one open file: `len(shard)`, and `shard[start:stop]` reads just those.

    Raises:
        DataError: as `count_tokens`, when it is made.
        DataChanged: the file was cut after that, when it is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_tokens = count_tokens(path)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self._num_tokens

    def __getitem__(self, window: slice) -> Tokens:
        start, stop, _ = window.indices(self._num_tokens)
        wanted = 2 * max(stop - start, 0)
        data = os.pread(self._file, wanted, HEADER_BYTES + 2 * start)
        if len(data) < wanted:
            size, expected = os.fstat(self._file).st_size, HEADER_BYTES + 2 * len(self)
            raise DataChanged(self.path, f"has {size:,} bytes instead of {expected:,}")
        return np.frombuffer(data, dtype="<u2")


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards `fineweb_<split>_*.bin` of a folder, in stream order.

    The byte sidecars `fineweb_<split>_bytes_*.bin` match the same pattern and are left out.
    """
    sidecars = set(find_sidecars(folder, split))
    return [p for p in sorted(folder.glob(f"fineweb_{split}_*.bin")) if p not in sidecars]


def find_sidecars(folder: Path, split: str) -> list[Path]:
    """Sidecars of a split: shards whose uint16 are the bytes that each token counts for."""
    return sorted(folder.glob(f"fineweb_{split}_bytes_*.bin"))


class TokenStream:
    """Shards read as one sequence of tokens; it has no position.

    Attributes:
        num_tokens: length of the sequence.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = [Shard(path) for path in shards]
        self._ends = np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if self.shards else 0

    def read(self, start: int, count: int) -> Tokens:
        """`count` tokens from position `start` on; behind the last comes the first again."""
        parts = []
        position = start % self.num_tokens if count else 0
        while count:
            index = int(np.searchsorted(self._ends, position, side="right"))
            shard = self.shards[index]
            offset = position - (int(self._ends[index]) - len(shard))
            part = shard[offset : offset + count]
            parts.append(part)
            count -= len(part)
            position = (position + len(part)) % self.num_tokens
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)
