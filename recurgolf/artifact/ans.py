"""The writing half of the entropy coder: which entries share a table, and the tables.

A payload is a mode, deflated class levels and tables, and the words of the coder. The choice is by
the size that the tables promise; only the winner is coded. The reading half is `decode.decode_ans`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from recurgolf.artifact.decode import (
    MIN_ROWS,
    RANS_BITS,
    RANS_LOW,
    Segments,
    between,
    frequencies,
    num_knots,
    num_lanes,
    read_tables,
    slot_bases,
)

_KNOT_BITS = 6.0
"""About what a stored level takes once deflated."""


@dataclass
class _Plan:
    """One way to share tables: what is stored of it, and the bytes of a payload made with it."""

    mode: int
    info: bytes
    expected_bytes: float

    @classmethod
    def of(cls, mode: int, levels: bytes, counts: np.ndarray) -> _Plan:
        """A plan from the stored class levels and counts [classes, 256]."""
        tables = [_table(row) for row in counts]
        info = levels + b"".join(table for table, _ in tables)
        bits = sum(bits for _, bits in tables)
        return cls(mode, info, len(_deflated(info)) + bits / 8)


def ans_payload(symbols: np.ndarray, segments: Segments) -> bytes:
    """The payload of symbols, uint8 [n], the arrays of a stream one after the other."""
    plan = min(_plans(symbols, segments), key=lambda plan: plan.expected_bytes)
    info = plan.info
    classes, tables = read_tables(plan.mode, info, segments)
    freqs = np.zeros((len(tables), 256), np.uint64)
    for row, (lowest, levels) in zip(freqs, tables, strict=True):
        row[lowest : lowest + len(levels)] = frequencies(levels)
    starts = np.cumsum(freqs, axis=1) - freqs
    lanes = num_lanes(len(symbols))
    state = np.full(lanes, RANS_LOW, np.uint64)
    words, stop = [], len(symbols)
    # The coder is a stack: what is to be read first is written last.
    for (rows, length), labels in zip(reversed(segments), reversed(classes), strict=True):
        part = symbols[stop - rows * length : stop]
        keys = (slot_bases(labels, rows, length) >> (RANS_BITS - 8)) + part
        for first in reversed(range(0, rows * length, lanes)):
            key = keys[first : first + lanes]
            x, f = state[: len(key)], freqs.ravel()[key]
            full = x >= f << np.uint64(32 - RANS_BITS)
            words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
            x = np.where(full, x >> np.uint64(16), x)
            state[: len(key)] = ((x // f) << np.uint64(RANS_BITS)) + x % f + starts.ravel()[key]
        stop -= rows * length
    packed = _deflated(info)
    head = struct.pack("<BI", plan.mode, len(packed)) + packed + state.astype("<u4").tobytes()
    return head + b"".join(word.tobytes() for word in reversed(words))


def _plans(symbols: np.ndarray, segments: Segments) -> Iterator[_Plan]:
    parts, start = [], 0
    for rows, length in segments:
        parts.append(symbols[start : start + rows * length].reshape(rows, length))
        start += rows * length
    yield _planned(0, b"", [np.zeros(1, np.int64) for _ in parts], parts)
    yield _planned(1, b"", [np.full(1, i) for i in range(len(parts))], parts)
    sizes = [_sizes(part) for part in parts]
    for mode, per_octave in ((2, 1), (2, 2), (2, 4), (3, 2), (3, 4)):
        rows = [_levels(by_row, per_octave) for by_row, _ in sizes]
        columns = [
            _levels(by_column, per_octave)
            if mode == 3 and len(part) >= MIN_ROWS
            else np.zeros(1, np.int64)
            for part, (_, by_column) in zip(parts, sizes, strict=True)
        ]
        # One offset for all arrays, so that entries of one size share a table across them.
        lowest = min((int(row.min()) for row in rows if row.size), default=0)
        least = [int(column.min(initial=0)) for column in columns]
        rows = [row - lowest + low - min(least) for row, low in zip(rows, least, strict=True)]
        columns = [column - low for column, low in zip(columns, least, strict=True)]
        stored = [
            np.concatenate([row, column]) if mode == 3 and len(part) >= MIN_ROWS else row
            for part, row, column in zip(parts, rows, columns, strict=True)
        ]
        levels = np.concatenate(stored).astype(np.uint8).tobytes()
        labels = [row[:, None] + column for row, column in zip(rows, columns, strict=True)]
        yield _planned(mode, levels, labels, parts)


def _planned(mode: int, levels: bytes, labels: list[np.ndarray], parts: list[np.ndarray]) -> _Plan:
    num_classes = 1 + max((int(label.max()) for label in labels if label.size), default=0)
    counts = np.zeros(num_classes * 256, np.int64)
    for label, part in zip(labels, parts, strict=True):
        keys = (label * 256 + part).ravel()
        counts += np.bincount(keys, minlength=len(counts))
    return _Plan.of(mode, levels, counts.reshape(-1, 256))


def _sizes(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of rows and columns whose product is about the magnitude of an entry."""
    if part.size == 0:
        return np.ones(part.shape[0]), np.ones(part.shape[1])
    magnitude = np.abs(part.astype(np.float32) - 128)
    by_row = np.maximum(magnitude.mean(axis=1), 1e-2)
    if len(part) < MIN_ROWS:
        return by_row, np.ones(part.shape[1])
    by_column = np.maximum((magnitude / by_row[:, None]).mean(axis=0), 1e-2)
    return np.maximum((magnitude / by_column).mean(axis=1), 1e-2), by_column


def _levels(sizes: np.ndarray, per_octave: int) -> np.ndarray:
    return np.round(per_octave * np.log2(sizes)).astype(np.int64)


def _deflated(info: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9)
    return coder.compress(info) + coder.flush()


def _table(counts: np.ndarray) -> tuple[bytes, float]:
    """A table as it is stored, and the bits that its entries will take.

    Stored are the lowest and the highest symbol, a stride, and levels as differences: all of them,
    or every second to sixteenth where straight lines between them cost less than they save.
    """
    present = np.flatnonzero(counts)
    if not len(present):
        return bytes([0, 0, 1, 0]), 0.0
    lowest, highest = int(present[0]), int(present[-1])
    used = counts[lowest : highest + 1]
    tries = []
    for stride in (1, 2, 4, 8, 16):
        if stride > 1 and len(used) < 4 * stride:
            break
        knots = _knots(used, stride)
        bits = _coded_bits(used, between(knots, len(used), stride))
        table = (
            bytes([lowest, highest, stride]) + np.diff(knots, prepend=0).astype(np.uint8).tobytes()
        )
        tries.append((bits + _KNOT_BITS * len(knots), table, bits))
    _, table, bits = min(tries)
    return table, bits


def _knots(used: np.ndarray, stride: int) -> np.ndarray:
    """Levels of the symbols at every stride, from counts averaged over their surroundings."""
    places = stride * np.arange(num_knots(len(used), stride))
    reach = stride // 2
    sums = np.concatenate([[0], np.cumsum(used)])
    first = np.clip(places - reach, 0, len(used) - 1)
    last = np.clip(places + reach + 1, first + 1, len(used))
    means = (sums[last] - sums[first]) / (last - first)
    if stride > 1:
        means = np.maximum(means, 0.05)
    relative = np.log2(np.maximum(means, 1e-9) / means.max())
    return np.where(means > 0, np.maximum(np.round(8 * relative) + 248, 1), 0).astype(np.int64)


def _coded_bits(used: np.ndarray, levels: np.ndarray) -> float:
    weights = np.where(levels > 0, np.exp2(levels / 8 - 31), 1e-12)
    return float((used * (np.log2(weights.sum()) - np.log2(weights))).sum())
