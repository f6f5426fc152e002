"""From stored bytes back to raw ones: inverse transforms and bounded decoders.

The half of the codecs that a scored artifact needs; nothing here writes. Every decoder is told how
many bytes to expect and stops one byte beyond, so a lying file cannot make it allocate more.
"""

from __future__ import annotations

import importlib
import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Segments = list[tuple[int, int]]
"""(rows, bytes per row) of every array of a stream after its transform; the order of the bytes."""

_CHUNK = 2**16
# 2^(i/8) in units of 2^-20: whole numbers, since a frequency must be the same on every machine.
_EIGHTHS = np.array([1048576, 1143480, 1246974, 1359835, 1482910, 1617125, 1763487, 1923097])
RANS_BITS = 14
"""Frequencies of a table add up to 2^14."""
RANS_LOW = 2**16
"""A coder's state is at least this and below 2^32; it takes in and gives off 16 bits at a time."""
MIN_ROWS = 16
"""Arrays of fewer rows have no classes of columns: their mean over rows says too little."""


class MissingLibrary(ValueError):
    """An optional codec library is not installed."""


def library(name: str, package: str) -> Any:
    """An optional module, or an error that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingLibrary(
            f"this codec needs the library {package}: pip install {package}"
        ) from None


def unshuffle(data: bytes, itemsize: int) -> bytes:
    """Inverse of grouping the first bytes of all items, then the second bytes, and so on.

    A tail shorter than an item belongs to the first groups, as strided slicing leaves it.
    """
    out = np.empty(len(data), np.uint8)
    source, start = np.frombuffer(data, np.uint8), 0
    for i in range(itemsize):
        part = out[i::itemsize]
        part[:] = source[start : start + len(part)]
        start += len(part)
    return out.tobytes()


def unplane(data: bytes, size: int) -> bytes:
    """Inverse of writing bit 7 of all bytes, then bit 6, …; every plane padded to whole bytes."""
    planes = np.frombuffer(data, np.uint8).reshape(8, -1)
    bits = np.unpackbits(planes, axis=1)[:, :size]
    return np.packbits(bits, axis=0).tobytes()


def untranspose(data: bytes, shapes: list[Shape], itemsize: int) -> bytes:
    """Inverse of storing every matrix column by column."""
    out, start = [], 0
    for shape in shapes:
        size = itemsize * int(np.prod(shape, dtype=np.int64))
        part = np.frombuffer(data[start : start + size], np.dtype((np.void, itemsize)))
        out.append((part.reshape(shape[::-1]).T if len(shape) == 2 else part).tobytes())
        start += size
    return b"".join(out)


def transformed_size(transform: str, size: int) -> int:
    """Bytes after a transform of `size` bytes."""
    return 8 * -(-size // 8) if transform == "planes" else size


def undo_transform(transform: str, data: bytes, shapes: list[Shape], itemsize: int) -> bytes:
    """Raw bytes of arrays of these shapes, in row-major order one after the other."""
    size = itemsize * sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)
    if transform == "none":
        return data
    if transform == "shuffle":
        return unshuffle(data, itemsize)
    if transform == "planes":
        return unplane(data, size)
    if transform == "transpose":
        return untranspose(data, shapes, itemsize)
    raise ValueError(f"unknown transform {transform!r}")


def segments_of(transform: str, shapes: list[Shape], itemsize: int) -> Segments:
    """Where the bytes of a transformed stream come from; models of entropy coders follow it."""
    size = itemsize * sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)
    if transform == "planes":
        return [(1, -(-size // 8))] * 8
    if itemsize > 1 and transform == "shuffle":
        return [(1, size // itemsize)] * itemsize
    rows = []
    for shape in shapes:
        count, length = shape if len(shape) == 2 else (1, int(np.prod(shape, dtype=np.int64)))
        if transform == "transpose" and len(shape) == 2:
            count, length = length, count
        rows.append((count, length * itemsize))
    return rows


def decode_none(data: bytes, size: int, segments: Segments) -> bytes:
    return data[: size + 1]


def decode_zlib(data: bytes, size: int, segments: Segments) -> bytes:
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)


def decode_lzma(data: bytes, size: int, segments: Segments) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 24}]
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(data, size + 1)


def decode_brotli(data: bytes, size: int, segments: Segments) -> bytes:
    decoder, parts, left, feed = library("brotli", "brotli").Decompressor(), [], size + 1, data
    while left > 0:
        part = decoder.process(feed, output_buffer_limit=min(left, _CHUNK))
        if not part:
            break
        parts.append(part)
        left, feed = left - len(part), b""
    return b"".join(parts)


def decode_zstd(data: bytes, size: int, segments: Segments) -> bytes:
    zstandard = library("zstandard", "zstandard")
    # The frame's own window is bounded too: 2^27 is the library's widest without long mode.
    return zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(data).read(size + 1)


def decode_ans(data: bytes, size: int, segments: Segments) -> bytes:
    """Range asymmetric numeral systems, many coders side by side (Duda, arXiv 1311.2540, rANS).

    Entry i of an array belongs to coder i modulo their number; each step decodes one entry of every
    coder. States and words of a step lie in the order of the coders.
    """
    if size == 0:
        return b""
    mode, info_size = struct.unpack_from("<BI", data)
    # Two levels a row or column at most, and tables of 256 symbols for every level.
    most = 2**18 + sum(rows + length for rows, length in segments)
    info = decode_zlib(data[5 : 5 + info_size], most, [])
    classes, tables = read_tables(mode, info, segments)
    # What a slot of a class stands for: its symbol, the frequency, the place within the symbol.
    slots = np.arange(len(tables) << RANS_BITS, dtype=np.uint32) & (2**RANS_BITS - 1)
    counts = [frequencies(levels) for _, levels in tables]
    symbols = np.concatenate(
        [np.repeat(np.arange(len(f)) + low, f) for f, (low, _) in zip(counts, tables, strict=True)]
    )
    freqs = np.concatenate([np.repeat(f, f) for f in counts]).astype(np.uint32)
    starts = np.concatenate([np.repeat(np.cumsum(f) - f, f) for f in counts]).astype(np.uint32)
    # Signed bytes are coded from -128 up: neighbours in value are neighbours.
    symbols, within = (symbols - 128).astype(np.uint8), slots - starts
    lanes = num_lanes(size)
    head = 5 + info_size + 4 * lanes
    state = np.frombuffer(data[5 + info_size : head], "<u4").astype(np.uint32)
    words = np.frombuffer(data[head : head + (len(data) - head) // 2 * 2], "<u2").astype(np.uint32)
    out, start, at = np.empty(size, np.uint8), 0, 0
    for (rows, length), labels in zip(segments, classes, strict=True):
        base = slot_bases(labels, rows, length)
        for first in range(0, rows * length, lanes):
            stop = min(first + lanes, rows * length)
            x = state[: stop - first]
            slot = (x & (2**RANS_BITS - 1)) + base[first:stop]
            out[start + first : start + stop] = symbols[slot]
            x = freqs[slot] * (x >> RANS_BITS) + within[slot]
            low = np.flatnonzero(x < RANS_LOW)
            x[low] = (x[low] << 16) | words[at : at + len(low)]
            at += len(low)
            state[: stop - first] = x
        start += rows * length
    if at != len(words) or (state != RANS_LOW).any():
        raise ValueError("the words of an ans payload do not end where its entries do")
    return out.tobytes()


def num_lanes(size: int) -> int:
    """Coders side by side: some 8,192 steps, and states that cost a few bytes in ten thousand."""
    return min(max(size >> 13, 1), 2**13)


def slot_bases(labels: Labels, rows: int, length: int) -> np.ndarray:
    """First slot of the class of every entry of an array, in its flat order."""
    by_row, by_column = (part.astype(np.uint32) << RANS_BITS for part in labels)
    if len(set(by_row.tolist())) == len(set(by_column.tolist())) == 1:
        return np.broadcast_to(by_row[0] + by_column[0], (rows * length,))
    return (by_row[:, None] + by_column).ravel()


Labels = tuple[np.ndarray, np.ndarray]
"""Levels of the rows and of the columns of an array; the class of an entry is their sum."""


def read_tables(
    mode: int, info: bytes, segments: Segments
) -> tuple[list[Labels], list[tuple[int, np.ndarray]]]:
    """Labels of every array, and lowest symbol and levels of every class, from an ANS payload.

    Modes: 0 one class for all, 1 one per array, 2 a stored level per row, 3 per row and column
    (columns only of arrays of at least `MIN_ROWS`).
    """
    if mode not in (0, 1, 2, 3):
        raise ValueError(f"unknown mode {mode} of an ans payload")
    data, at = np.frombuffer(info, np.uint8).astype(np.int64), 0
    classes = []
    for index, (rows, length) in enumerate(segments):
        # Broadcast views: a constant costs no memory.
        by_row = np.broadcast_to(np.int64(index if mode == 1 else 0), (rows,))
        by_column = np.broadcast_to(np.int64(0), (length,))
        if mode >= 2:
            by_row, at = data[at : at + rows], at + rows
        if mode == 3 and rows >= MIN_ROWS:
            by_column, at = data[at : at + length], at + length
        if len(by_row) != rows or len(by_column) != length:
            raise ValueError("the classes of an ans payload are cut short")
        classes.append((by_row, by_column))
    tables = []
    while at < len(data):
        if at + 3 > len(data) or data[at] > data[at + 1] or data[at + 2] == 0:
            raise ValueError("an ans table is cut short or broken")
        lowest, width, stride = int(data[at]), int(data[at + 1] - data[at] + 1), int(data[at + 2])
        stop = at + 3 + num_knots(width, stride)
        if stop > len(data):
            raise ValueError("an ans table is cut short")
        # Levels are stored as differences: neighbours in value are alike in frequency.
        knots = np.cumsum(data[at + 3 : stop]) % 256
        tables.append((lowest, between(knots, width, stride)))
        at = stop
    return classes, tables


def num_knots(width: int, stride: int) -> int:
    """Levels that are stored of a table: every `stride`-th, and one at or beyond the end."""
    return 1 + -(-(width - 1) // stride)


def between(knots: np.ndarray, width: int, stride: int) -> np.ndarray:
    """Levels of all symbols: straight lines between the stored ones, in whole numbers."""
    place = np.arange(width)
    left, part = place // stride, place % stride
    right = np.minimum(left + 1, len(knots) - 1)
    return (knots[left] * (stride - part) + knots[right] * part) // stride


def frequencies(levels: np.ndarray) -> np.ndarray:
    """How many of a class's 2^14 slots each symbol has; none where the level is 0.

    A level is eight times the binary logarithm of a frequency. All in whole numbers.
    """
    octaves, eighths = np.divmod(levels, 8)
    weights = (_EIGHTHS[eighths] << 16) >> np.minimum(octaves.max(initial=0) - octaves, 60)
    weights = np.where(levels > 0, np.maximum(weights, 1), 0)
    if not weights.any():  # a class that no entry is in
        weights[0] = 1
    slots = np.where(weights > 0, np.maximum((weights << RANS_BITS) // weights.sum(), 1), 0)
    while (excess := int(slots.sum()) - 2**RANS_BITS) > 0:
        largest = int(slots.argmax())
        slots[largest] -= min(excess, max(int(slots[largest]) // 2, 1))
    slots[int(slots.argmax())] -= excess
    return slots


Decoder = Callable[[bytes, int, Segments], bytes]

DECODERS: dict[str, Decoder] = {
    "none": decode_none,
    "zlib": decode_zlib,
    "lzma": decode_lzma,
    "brotli": decode_brotli,
    "zstd": decode_zstd,
    "ans": decode_ans,
}
"""Kind → decoder(payload, bytes expected, segments), which gives at most one byte too many."""
