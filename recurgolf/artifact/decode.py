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
    """Asymmetric numeral systems with one table per class of rows (see `codecs.AnsCodec`)."""
    if size == 0:
        return b""
    stream = library("constriction", "constriction").stream
    mode, tables_size = struct.unpack_from("<BI", data)
    info = decode_zlib(data[5 : 5 + tables_size], 2**20, [])
    classes, tables = read_tables(mode, info, segments)
    words = np.frombuffer(data[5 + tables_size :], "<u4").astype(np.uint32)
    coder = stream.stack.AnsCoder(words)
    lengths = np.repeat([n for _, n in segments], [rows for rows, _ in segments])
    # Neighbouring rows of one class are one run of symbols.
    firsts = np.flatnonzero(np.diff(classes, prepend=-1))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    stops = starts[np.append(firsts[1:], len(classes))]
    out = np.empty(size, np.uint8)
    for label, (lowest, levels) in enumerate(tables):
        model = categorical(stream, levels)
        for run in np.flatnonzero(classes[firsts] == label):
            for start in range(int(starts[firsts[run]]), int(stops[run]), _CHUNK):
                stop = min(start + _CHUNK, int(stops[run]))
                # Signed bytes are coded from -128 up, so that neighbours in value are neighbours.
                out[start:stop] = coder.decode(model, stop - start) + lowest - 128
    return out.tobytes()


def read_tables(
    mode: int, info: bytes, segments: Segments
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Class of every row, and lowest symbol and levels of every class, from an ANS payload.

    Modes: 0 one class for all, 1 one per array, 2 classes stored row by row.
    """
    rows = [rows for rows, _ in segments]
    data, start = np.frombuffer(info, np.uint8), 0
    if mode == 0:
        classes = np.zeros(sum(rows), np.int64)
    elif mode == 1:
        classes = np.repeat(np.arange(len(rows)), rows)
    elif mode == 2:
        start = sum(rows)
        classes = data[:start].astype(np.int64)
    else:
        raise ValueError(f"unknown mode {mode} of an ans payload")
    tables = []
    for _ in range(int(classes.max(initial=-1)) + 1):
        lowest, highest = int(data[start]), int(data[start + 1])
        stop = start + 3 + highest - lowest
        # Levels are stored as differences: neighbours in value are alike in frequency.
        levels = np.cumsum(data[start + 2 : stop], dtype=np.uint8)
        if len(levels) != highest - lowest + 1:
            raise ValueError("an ans table is cut short")
        tables.append((lowest, levels))
        start = stop
    return classes, tables


def categorical(stream: Any, levels: np.ndarray) -> Any:
    """The model of a table: a level is eight times the binary logarithm of a frequency.

    Powers of two are exact and the eight factors are constants, so that the probabilities, and with
    them the bytes, are the same on every machine.
    """
    frequencies = np.ldexp(_LEVELS[levels % 8], (levels // 8).astype(np.int64) - 31)
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
