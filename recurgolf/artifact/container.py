"""Writing `artifact.bin`, and the table of where its bytes went.

The same tensors and metadata give the same bytes: names are sorted, JSON is canonical, codecs carry
no time stamps. Format: see `reader.py`.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurgolf.artifact.codecs import BrotliCodec, Codec
from recurgolf.artifact.decode import library
from recurgolf.artifact.reader import (
    DIGEST_BYTES,
    DTYPES,
    HEADER_CODECS,
    MAGIC,
    MAX_HEADER_BYTES,
    MAX_HEADER_RATIO,
    PREFIX,
    VERSION,
    Piece,
    raw_limit,
    sections_of,
)
from recurgolf.disk import write_file
from recurgolf.quant.entropy import code_entropy
from recurgolf.quant.quantized_tensor import QuantizedTensor, Stored

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class SectionBytes:
    """One line of the table: arrays of one kind and what became of them.

    Attributes:
        title: `codes 6`, `scales float16`, `raw float16`: part, then bits or type.
        entropy_bytes: zeroth-order entropy of every array's codes on its own, without tables; None
            for what is not codes.
        tried: (codec, transform, bytes) of every attempt.
    """

    title: str
    num_tensors: int
    num_entries: int
    raw_bytes: int
    stored_bytes: int
    codec: str
    transform: str
    entropy_bytes: float | None
    tried: tuple[tuple[str, str, int], ...] = ()


@dataclass(frozen=True)
class PackTable:
    """Where the bytes of an artifact went.

    Attributes:
        total_bytes: of the file on disk.
        header_bytes: prefix, header and checksum.
        tensors: stored bytes by tensor name; a section is shared out by the entropy of its codes,
            or by size where there are none.
    """

    total_bytes: int
    header_bytes: int
    sections: list[SectionBytes]
    tensors: dict[str, float] = field(default_factory=dict)

    def render(self) -> str:
        """The table for people, one line per section, aligned; under it what else was tried."""
        lines = [
            f"{'section':<18}{'tensors':>8}{'entries':>12}{'raw':>12}{'stored':>12}{'entropy':>12}"
            "  codec"
        ]
        for row in self.sections:
            bound = "" if row.entropy_bytes is None else f"{row.entropy_bytes:,.0f}"
            lines.append(
                f"{row.title:<18}{row.num_tensors:>8}{row.num_entries:>12,}{row.raw_bytes:>12,}"
                f"{row.stored_bytes:>12,}{bound:>12}  {row.codec} {row.transform}"
            )
            for codec, transform, size in sorted(row.tried, key=lambda one: one[2]):
                if len(row.tried) > 1:
                    lines.append(f"{'':<50}{size:>12,}{'':>12}  {codec} {transform}")
        lines.append(f"{'header':<50}{self.header_bytes:>12,}")
        lines.append(f"{'artifact.bin':<50}{self.total_bytes:>12,}")
        return "\n".join(lines)


def pack(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    codec: Codec | None = None,
) -> PackTable:
    """Write an artifact.

    Args:
        metadata: anything that JSON holds; floats must be finite.
        tensors: plain or quantized tensors by name.
        codec: how payloads are compressed; brotli where not given.

    Raises:
        ConfigError: a codec whose library is missing.
        ValueError: metadata or tensors that the format cannot hold.
    """
    data, table = pack_bytes(metadata, tensors, codec)
    write_file(Path(path), data)
    return table


def pack_bytes(
    metadata: Mapping[str, Any], tensors: Mapping[str, Stored], codec: Codec | None = None
) -> tuple[bytes, PackTable]:
    """`pack` into memory: the bytes of the file and their table."""
    codec = codec or BrotliCodec()
    codec.check()
    kinds: list[dict[str, Any]] = []
    entries = [_entry(name, tensors[name], kinds) for name in sorted(tensors)]
    layout = sections_of([(name, kinds[kind], shape) for name, kind, shape in entries])
    total = sum(piece.num_bytes for pieces in layout for piece in pieces)
    sections, payloads, rows = [], [], []
    shares: dict[str, float] = {}
    for pieces in layout:
        arrays = [_array(tensors[piece.name], piece) for piece in pieces]
        raw = b"".join(map(_raw_bytes, arrays))
        shapes = [piece.shape for piece in pieces]
        encoded = codec.encode(raw, shapes, pieces[0].dtype.itemsize)
        sections.append([encoded.codec, encoded.transform, len(encoded.payload), zlib.crc32(raw)])
        payloads.append(encoded.payload)
        weights, entropy = _weigh(pieces, arrays)
        for piece, weight in zip(pieces, weights, strict=True):
            share = len(encoded.payload) * weight / max(sum(weights), 1e-9)
            shares[piece.name] = shares.get(piece.name, 0.0) + share
        rows.append(
            SectionBytes(
                title=_title(pieces[0], tensors[pieces[0].name]),
                num_tensors=len(pieces),
                num_entries=sum(array.numel() for array in arrays),
                raw_bytes=len(raw),
                stored_bytes=len(encoded.payload),
                codec=encoded.codec,
                transform=encoded.transform,
                entropy_bytes=entropy,
                tried=encoded.tried,
            )
        )
    header = {"kinds": kinds, "metadata": metadata, "sections": sections, "tensors": entries}
    data = _file(_canonical(header), payloads)
    if total > raw_limit(len(data)):
        raise ValueError(
            f"artifact: tensors of {total} bytes in a file of {len(data)}; it holds at most "
            f"{raw_limit(len(data))}"
        )
    header_bytes = len(data) - sum(map(len, payloads))
    return data, PackTable(len(data), header_bytes, rows, shares)


def _entry(
    name: str, value: Stored, kinds: list[dict[str, Any]]
) -> tuple[str, int, tuple[int, ...]]:
    """Header entry of a tensor; adds its kind of storage where it is new."""
    if isinstance(value, QuantizedTensor):
        kind = {
            "bits": value.bits,
            "clip": value.clip,
            "group_size": value.group_size,
            "method": value.method,
            "scales": _DTYPE_NAMES[value.scales.dtype],
            "symmetric": value.symmetric,
        }
        shape = tuple(value.codes.shape)
    else:
        if value.dtype not in _DTYPE_NAMES:
            raise ValueError(f"artifact: {name} is {value.dtype}, which the format does not hold")
        kind, shape = {"dtype": _DTYPE_NAMES[value.dtype]}, tuple(value.shape)
    if kind not in kinds:
        kinds.append(kind)
    return name, kinds.index(kind), shape


def _array(value: Stored, piece: Piece) -> Tensor:
    if isinstance(value, QuantizedTensor):
        tensor = value.codes if piece.part == "codes" else value.scales
    else:
        tensor = value
    tensor = tensor.detach().cpu().contiguous()
    if tuple(tensor.shape) != piece.shape or tensor.dtype != piece.dtype:
        raise ValueError(
            f"artifact: {piece.part} of {piece.name} are {tensor.dtype} {tuple(tensor.shape)}; "
            f"{piece.dtype} {piece.shape} is what its kind needs"
        )
    return tensor


def _raw_bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _weigh(pieces: list[Piece], arrays: list[Tensor]) -> tuple[list[float], float | None]:
    """Relative size of every array in its section, and their entropy in bytes if they are codes."""
    if pieces[0].part != "codes":
        return [float(piece.num_bytes) for piece in pieces], None
    bits = [code_entropy(array) * array.numel() / 8 for array in arrays]
    # A constant array has no entropy and still a share.
    return [max(size, 1e-3) for size in bits], sum(bits)


def _title(piece: Piece, value: Stored) -> str:
    if piece.part == "codes" and isinstance(value, QuantizedTensor):
        return f"codes {value.bits}"
    return f"{piece.part} {_DTYPE_NAMES[piece.dtype]}"


def _canonical(header: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(
            header, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"artifact: metadata is not JSON ({error})") from None
    return text.encode()


def _file(header: bytes, payloads: list[bytes]) -> bytes:
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"artifact: {len(header)} bytes of header; at most {MAX_HEADER_BYTES}")
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9)
    stored = {
        "zlib": deflate.compress(header) + deflate.flush(),
        # Brotli knows words of English beforehand, but not every machine has it.
        "brotli": library("brotli", "brotli").compress(header, quality=11, lgwin=24),
        "none": header,
    }
    sound = [kind for kind in stored if len(header) <= MAX_HEADER_RATIO * len(stored[kind])]
    kind = min(sound, key=lambda kind: len(stored[kind]))
    payload = stored[kind]
    size = PREFIX.size + len(payload) + sum(map(len, payloads)) + DIGEST_BYTES
    codec = HEADER_CODECS.index(kind)
    prefix = PREFIX.pack(MAGIC, VERSION, codec, len(payload), len(header), size)
    body = b"".join([prefix, payload, *payloads])
    return body + hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()
