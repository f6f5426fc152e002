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
_LEVELS = np.array([2.0 ** (i / 8) for i in range(8)])
# A symbol that never came still has to be codable.
_NEVER = 2.0**-22
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
    """Asymmetric numeral systems with one table per class of entries (see `codecs.AnsCodec`)."""
    if size == 0:
        return b""
    stream = library("constriction", "constriction").stream
    mode, info_size = struct.unpack_from("<BI", data)
    # Two levels a row or column at most, and tables of 256 symbols for every level.
    most = 2**18 + sum(rows + length for rows, length in segments)
    info = decode_zlib(data[5 : 5 + info_size], most, [])
    classes, tables = read_tables(mode, info, segments)
    models = [categorical(stream, levels) for _, levels in tables]
    words = np.frombuffer(data[5 + info_size :], "<u4").astype(np.uint32)
    coder = stream.stack.AnsCoder(words)
    out, start = np.empty(size, np.uint8), 0
    for (rows, length), labels in zip(segments, classes, strict=True):
        for label, places in places_of(labels, rows, length):
            count = rows * length if isinstance(places, slice) else len(places)
            decoded = np.empty(count, np.uint8)
            for first in range(0, count, _CHUNK):
                part = decoded[first : first + _CHUNK]
                # Signed bytes are coded from -128 up: neighbours in value are neighbours.
                part[:] = coder.decode(models[label], len(part)) + tables[label][0] - 128
            out[start : start + rows * length][places] = decoded
        start += rows * length
    return out.tobytes()


Labels = tuple[np.ndarray, np.ndarray]
"""Levels of the rows and of the columns of an array; the class of an entry is their sum."""


def places_of(labels: Labels, rows: int, length: int) -> list[tuple[int, np.ndarray | slice]]:
    """Classes of an array, ascending, and where their entries are in its flat order."""
    if rows * length == 0:
        return []
    by_row, by_column = labels
    if by_row.min() == by_row.max() and by_column.min() == by_column.max():
        return [(int(by_row[0] + by_column[0]), slice(None))]
    flat = (by_row[:, None] + by_column).astype(np.uint16).ravel()
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat)
    ends = np.cumsum(counts)
    return [
        (int(label), order[ends[label] - counts[label] : ends[label]])
        for label in np.flatnonzero(counts)
    ]


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


def categorical(stream: Any, levels: np.ndarray) -> Any:
    """The model of a table: a level is eight times the binary logarithm of a frequency.

    Powers of two are exact and the eight factors are constants, so that the probabilities, and with
    them the bytes, are the same on every machine.
    """
    frequencies = np.ldexp(_LEVELS[levels % 8], levels // 8 - 31)
    probabilities = np.where(levels == 0, _NEVER * frequencies.max(), frequencies)
    if len(probabilities) == 1:
        # The library wants two symbols; the second never comes.
        probabilities = np.array([1.0, _NEVER])
    return stream.model.Categorical(probabilities, perfect=False)


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
