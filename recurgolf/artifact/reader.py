"""Reading `artifact.bin`: every byte is checked before anything is believed.

Layout, little-endian:

    magic "RGLF" · version u8 · header codec u8 · header stored u32 · header raw u32 · file u32
    header: canonical JSON, compressed
    sections: payloads, one after the other
    BLAKE2b-64 of all bytes before it

The header lists the sections [codec, transform, stored bytes, CRC-32 of the raw bytes], the kinds
of storage, and the tensors [name, kind, shape]; where each tensor lies follows from its shape.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurgolf.artifact.decode import (
    DECODERS,
    Decoder,
    MissingLibrary,
    segments_of,
    transformed_size,
    undo_transform,
)
from recurgolf.quant.quantized_tensor import QuantizedTensor, Stored, code_range, scale_shape

MAGIC = b"RGLF"
VERSION = 1
PREFIX = struct.Struct("<4sBBIII")
DIGEST_BYTES = 8
HEADER_CODECS = ("zlib", "brotli", "none")
MAX_HEADER_BYTES = 2**26
MAX_HEADER_RATIO = 100
"""JSON shrinks tenfold or so; what shrinks more is stored plain, or it is a trap for memory."""
MAX_RAW_BYTES = 2**30
MAX_RAW_RATIO = 2**8
FREE_RAW_BYTES = 2**24
"""Decoded bytes that `load` agrees to: so many times the file's, and some for models of zeros; the
challenge's budget is a sixtieth of the most."""
DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}


class ArtifactError(ValueError):
    """A file that is not a whole, sound artifact; its text names what is wrong."""


@dataclass(frozen=True)
class Artifact:
    """What an artifact holds: JSON metadata, and tensors by name, quantized or plain."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]


@dataclass(frozen=True)
class Piece:
    """One array of a section: whose it is and what part (`codes`, `scales` or `raw`)."""

    name: str
    part: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def load(path: str | Path) -> Artifact:
    """Read an artifact.

    Raises:
        ArtifactError: a file that is damaged, cut short, of another format or version, or whose
            header contradicts itself; or a codec whose library is not installed.
    """
    data = Path(path).read_bytes()
    header, start = _read_header(data)
    kinds = _list(header, "kinds")
    tensors = [_tensor_entry(entry, kinds) for entry in _list(header, "tensors")]
    if len({name for name, _, _ in tensors}) != len(tensors):
        raise ArtifactError("header: two tensors have the same name")
    layout = sections_of(tensors)
    sections = _list(header, "sections")
    if len(sections) != len(layout):
        raise ArtifactError(f"header: {len(sections)} sections for {len(layout)} kinds of payload")
    total = sum(piece.num_bytes for pieces in layout for piece in pieces)
    if total > raw_limit(len(data)):
        raise ArtifactError(
            f"header: tensors of {total} bytes in all; at most {raw_limit(len(data))} are read"
        )
    parts: dict[tuple[str, str], Tensor] = {}
    for index, (entry, pieces) in enumerate(zip(sections, layout, strict=True)):
        codec, transform, stored, crc = _section_entry(entry, index)
        if stored > len(data) - DIGEST_BYTES - start:
            raise ArtifactError(f"section {index}: {stored} bytes, more than the file has left")
        payload = data[start : start + stored]
        start += stored
        if codec not in DECODERS:
            raise ArtifactError(f"section {index}: unknown codec {codec!r}")
        raw = _decode(DECODERS[codec], transform, payload, pieces, f"section {index} ({codec})")
        if zlib.crc32(raw) != crc:
            raise ArtifactError(f"section {index} ({codec}): decoded bytes fail their checksum")
        _cut(bytearray(raw), pieces, parts)
    if start != len(data) - DIGEST_BYTES:
        raise ArtifactError(f"{len(data) - DIGEST_BYTES - start} bytes that no section claims")
    metadata = header.get("metadata")
    if not isinstance(metadata, dict):
        raise ArtifactError("header: metadata is not an object")
    return Artifact(metadata, {n: _assemble(n, kind, parts) for n, kind, _ in tensors})


def raw_limit(size: int) -> int:
    """Decoded bytes that a file of this size may have."""
    return min(MAX_RAW_BYTES, FREE_RAW_BYTES + MAX_RAW_RATIO * size)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a number")
    return float(text)


def sections_of(tensors: list[tuple[str, dict[str, Any], tuple[int, ...]]]) -> list[list[Piece]]:
    """Arrays of like kind in one section, so that a codec sees long inputs of one statistics.

    Codes are apart by their bits, scales are together, plain tensors are apart by type; sections
    are ordered by that kind and arrays inside them by the order of the tensors.
    """
    sections: dict[str, list[Piece]] = {}
    for name, kind, shape in tensors:
        if "bits" not in kind:
            piece = Piece(name, "raw", DTYPES[kind["dtype"]], shape)
            sections.setdefault(f"raw {kind['dtype']}", []).append(piece)
            continue
        codes = Piece(name, "codes", torch.int8, shape)
        sections.setdefault(f"codes {kind['bits']}", []).append(codes)
        scales = scale_shape(shape, kind["group_size"], kind["symmetric"])
        piece = Piece(name, "scales", DTYPES[kind["scales"]], scales)
        sections.setdefault(f"scales {kind['scales']}", []).append(piece)
    return [sections[key] for key in sorted(sections)]


def _read_header(data: bytes) -> tuple[dict[str, Any], int]:
    """The header, and where the sections begin."""
    if len(data) < PREFIX.size + DIGEST_BYTES:
        raise ArtifactError(f"{len(data)} bytes are too few for an artifact: the file is cut short")
    magic, version, codec, stored, raw_size, file_size = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise ArtifactError(f"the file begins with {magic!r} and not with {MAGIC!r}: no artifact")
    if version != VERSION:
        raise ArtifactError(f"format version {version}; this code reads version {VERSION}")
    if file_size != len(data):
        raise ArtifactError(f"the file says {file_size} bytes and has {len(data)}")
    digest = hashlib.blake2b(data[:-DIGEST_BYTES], digest_size=DIGEST_BYTES).digest()
    if digest != data[-DIGEST_BYTES:]:
        raise ArtifactError(
            f"the file is damaged: its checksum is {data[-DIGEST_BYTES:].hex()}, its bytes give "
            f"{digest.hex()}"
        )
    end = PREFIX.size + stored
    most = min(MAX_HEADER_BYTES, MAX_HEADER_RATIO * stored)
    if codec >= len(HEADER_CODECS) or end > len(data) - DIGEST_BYTES or raw_size > most:
        raise ArtifactError(f"header: {stored} bytes stored, {raw_size} raw: not possible")
    payload = data[PREFIX.size : end]
    text = _guarded(DECODERS[HEADER_CODECS[codec]], payload, raw_size, [], "header")
    try:
        header = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"header: not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ArtifactError("header: not a JSON object")
    return header, end


def _guarded(decoder: Decoder, payload: bytes, size: int, segments: Any, where: str) -> bytes:
    try:
        raw = decoder(payload, size, segments)
    except MissingLibrary as error:
        raise ArtifactError(f"{where}: {error}") from None
    except Exception as error:
        # Each codec library has exceptions of its own; the payload is wrong whichever it is.
        raise ArtifactError(f"{where}: cannot be decoded ({error})") from error
    if len(raw) != size:
        told = "more" if len(raw) > size else str(len(raw))
        raise ArtifactError(f"{where}: {size} bytes were announced, the payload gives {told}")
    return raw


def _decode(
    decoder: Decoder, transform: str, payload: bytes, pieces: list[Piece], where: str
) -> bytes:
    shapes = [piece.shape for piece in pieces]
    itemsize = pieces[0].dtype.itemsize
    size = transformed_size(transform, sum(piece.num_bytes for piece in pieces))
    data = _guarded(decoder, payload, size, segments_of(transform, shapes, itemsize), where)
    try:
        return undo_transform(transform, data, shapes, itemsize)
    except ValueError as error:
        raise ArtifactError(f"{where}: {error}") from None


def _cut(raw: bytearray, pieces: list[Piece], parts: dict[tuple[str, str], Tensor]) -> None:
    """Tensors that share the section's memory."""
    start = 0
    for piece in pieces:
        count = math.prod(piece.shape)
        if count == 0:
            tensor = torch.empty(piece.shape, dtype=piece.dtype)
        else:
            tensor = torch.frombuffer(raw, dtype=piece.dtype, count=count, offset=start)
        parts[piece.name, piece.part] = tensor.reshape(piece.shape)
        start += piece.num_bytes


def _assemble(name: str, kind: dict[str, Any], parts: dict[tuple[str, str], Tensor]) -> Stored:
    if "bits" not in kind:
        return parts[name, "raw"]
    codes, scales = parts[name, "codes"], parts[name, "scales"]
    low, high = code_range(kind["bits"], kind["symmetric"])
    if codes.numel() and not (low <= int(codes.min()) and int(codes.max()) <= high):
        raise ArtifactError(f"{name}: codes outside {low} to {high}, the range of its bits")
    return QuantizedTensor(
        codes,
        scales,
        kind["bits"],
        kind["group_size"],
        kind["symmetric"],
        str(kind.get("method", "")),
        str(kind.get("clip", "")),
    )


def _list(header: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(header.get(key), list):
        raise ArtifactError(f"header: {key} is not a list")
    return header[key]


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= 2**40


def _tensor_entry(entry: Any, kinds: list[Any]) -> tuple[str, dict[str, Any], tuple[int, ...]]:
    """Name, kind and shape of a tensor, all of the right types and within bounds."""
    if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], str):
        raise ArtifactError(f"header: {str(entry)[:80]} is no tensor")
    name, index, shape = entry
    if not _is_count(index) or index >= len(kinds):
        raise ArtifactError(f"{name}: kind {str(index)[:20]}, but there are {len(kinds)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_count(n) for n in shape):
        raise ArtifactError(f"{name}: shape {str(shape)[:80]} is not possible")
    kind = kinds[index]
    sound = isinstance(kind, dict) and (
        kind.get("dtype") in DTYPES
        if "bits" not in kind
        else _is_count(kind["bits"], 1)
        and kind["bits"] <= 8
        and kind.get("scales") in ("float16", "float32")
        and isinstance(kind.get("symmetric"), bool)
        and (kind.get("group_size", 0) is None or _is_count(kind.get("group_size"), 1))
    )
    if not sound:
        raise ArtifactError(f"{name}: {str(kind)[:120]} is no kind of storage")
    return name, kind, tuple(shape)


def _section_entry(entry: Any, index: int) -> tuple[str, str, int, int]:
    if not isinstance(entry, list) or len(entry) != 4:
        raise ArtifactError(f"section {index}: {str(entry)[:80]} is no section")
    codec, transform, stored, crc = entry
    texts = isinstance(codec, str) and isinstance(transform, str)
    if not (texts and _is_count(stored) and _is_count(crc)):
        raise ArtifactError(f"section {index}: {str(entry)[:80]} is no section")
    return codec, transform, stored, crc
