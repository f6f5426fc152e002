"""The config group `artifact/codec`: how the payloads of the file are made small.

A payload is a stream of arrays of one type. A transform reorders its bytes, a codec shortens them;
both are named in the header, section by section. The decoding halves are in `decode.py`.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np

from recurgolf.artifact.ans import ans_payload
from recurgolf.artifact.decode import (
    MissingLibrary,
    Segments,
    Shape,
    library,
    segments_of,
)
from recurgolf.config import REGISTRY, Checked, ConfigError, option, suggestion
from recurgolf.limits import at_least, not_empty, one_of


@dataclass(frozen=True)
class Encoded:
    """A section's payload and how it was made; `tried` holds every (codec, transform, bytes)."""

    codec: str
    transform: str
    payload: bytes
    tried: tuple[tuple[str, str, int], ...] = ()


@dataclass
class Codec(Checked):
    """One way to shorten a stream of bytes; equal input gives equal output."""

    transform: Annotated[str, one_of("none", "shuffle", "planes", "transpose", "auto", "best")] = (
        "auto"
    )
    """`none`, `shuffle` (first bytes of all items first), `planes`, `transpose`; `auto` shuffles
    items of several bytes, `best` tries all."""

    def check(self) -> None:
        """Refuse what cannot work on this machine, before anything is packed."""

    def compress(self, data: bytes, segments: Segments) -> bytes:
        """Payload of transformed bytes that `DECODERS[kind]` turns back.

        A codec in a module of its own adds its decoder to that table there (`DECODERS["mine"] =
        ...` at module level), and the packed programs carry the decoder along.
        """
        raise NotImplementedError

    def expected_bits(self, entropy: float) -> float:
        """Bits that a code takes where codes have this entropy (bits), for the plan.

        Measured on Gaussian codes of 3 to 6.7 bits, 262,144 of them.
        """
        return min(entropy + 0.045, 8.0)

    def encode(self, raw: bytes, shapes: list[Shape], itemsize: int) -> Encoded:
        """Transform and compress the arrays of one section.

        Args:
            raw: the arrays, row-major, one after the other.
            shapes: their shapes.
            itemsize: bytes per entry, the same for all.
        """
        choices = {"auto": ["shuffle" if itemsize > 1 else "none"], "best": list(TRANSFORMS)}
        kind, results = type(self).kind, []  # type: ignore[attr-defined]
        for transform in choices.get(self.transform, [self.transform]):
            data = TRANSFORMS[transform](raw, shapes, itemsize)
            payload = self.compress(data, segments_of(transform, shapes, itemsize))
            results.append(Encoded(kind, transform, payload))
        return smallest(results)


def smallest(results: list[Encoded]) -> Encoded:
    """The shortest payload, the first of equals, with the sizes of all."""
    best = min(results, key=lambda result: len(result.payload))
    tried = [
        attempt
        for result in results
        for attempt in result.tried or ((result.codec, result.transform, len(result.payload)),)
    ]
    return Encoded(best.codec, best.transform, best.payload, tuple(tried))


@option("artifact/codec", "none")
@dataclass
class StoreCodec(Codec):
    """The bytes as they are."""

    def expected_bits(self, entropy: float) -> float:
        return 8.0

    def compress(self, data: bytes, segments: Segments) -> bytes:
        return data


@option("artifact/codec", "zlib")
@dataclass
class ZlibCodec(Codec):
    """Deflate, without header or checksum (the container has its own)."""

    level: Annotated[int, at_least(0, at_most=9)] = 9
    """Effort, 9 the most; decoding costs the same."""

    def expected_bits(self, entropy: float) -> float:
        # Its matches of three bytes cost more than they save, least where codes are long.
        return min(entropy + min(0.55, max(0.05, 0.55 - 0.22 * (entropy - 4.4))), 8.0)

    def compress(self, data: bytes, segments: Segments) -> bytes:
        coder = zlib.compressobj(self.level, zlib.DEFLATED, -zlib.MAX_WBITS, 9)
        return coder.compress(data) + coder.flush()


@option("artifact/codec", "lzma")
@dataclass
class LzmaCodec(Codec):
    """LZMA2, without header or checksum."""

    preset: Annotated[int, at_least(0, at_most=9)] = 9
    """Effort, 9 the most."""

    def expected_bits(self, entropy: float) -> float:
        return min(entropy + 0.15, 8.0)

    def compress(self, data: bytes, segments: Segments) -> bytes:
        filters = [
            {
                "id": lzma.FILTER_LZMA2,
                "preset": self.preset | lzma.PRESET_EXTREME,
                "dict_size": 1 << 24,
            }
        ]
        return lzma.compress(data, lzma.FORMAT_RAW, filters=filters)


@option("artifact/codec", "brotli")
@dataclass
class BrotliCodec(Codec):
    """Brotli: within about 1.5 % of the entropy of Gaussian codes, decoded by a small library."""

    quality: Annotated[int, at_least(0, at_most=11)] = 11
    """Effort, 11 the most; decoding costs the same."""

    def check(self) -> None:
        _require("brotli", "brotli")

    def compress(self, data: bytes, segments: Segments) -> bytes:
        return library("brotli", "brotli").compress(data, quality=self.quality, lgwin=24)


@option("artifact/codec", "zstd")
@dataclass
class ZstdCodec(Codec):
    """Zstandard."""

    level: Annotated[int, at_least(1, at_most=22)] = 22
    """Effort, 22 the most."""

    def check(self) -> None:
        _require("zstandard", "zstandard")

    def compress(self, data: bytes, segments: Segments) -> bytes:
        zstandard = library("zstandard", "zstandard")
        parameters = zstandard.ZstdCompressionParameters.from_level(
            self.level, source_size=len(data), write_checksum=False, write_content_size=False
        )
        return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


@option("artifact/codec", "ans")
@dataclass
class AnsCodec(Codec):
    """Entropy coding of single bytes by interleaved rANS in numpy, the tables in the payload.

    Tried in turn: one table for all, one per array, classes of rows, and classes of rows and
    columns together. Rows and columns differ in how large their codes are, so that an entry's
    class, the sum of two levels on a logarithmic scale, says how wide its table must be.
    """

    def expected_bits(self, entropy: float) -> float:
        return entropy + 0.004

    def compress(self, data: bytes, segments: Segments) -> bytes:
        if not data:
            return b""
        # Offset by 128: -1 and 0 become neighbours, and a table covers one range of symbols.
        symbols = np.frombuffer(data, np.uint8) + np.uint8(128)
        return ans_payload(symbols, segments)


@option("artifact/codec", "best")
@dataclass
class BestCodec(Codec):
    """Every listed codec with every transform; each section keeps its smallest."""

    transform: str = "best"
    codecs: Annotated[list[str], not_empty] = field(
        default_factory=lambda: ["ans", "brotli", "lzma", "zlib", "none"]
    )
    """Kinds to try. `zstd` needs an optional library, here and where the file is read."""

    def check(self) -> None:
        for codec in self._candidates():
            codec.check()

    def expected_bits(self, entropy: float) -> float:
        return min(codec.expected_bits(entropy) for codec in self._candidates())

    def encode(self, raw: bytes, shapes: list[Shape], itemsize: int) -> Encoded:
        return smallest([codec.encode(raw, shapes, itemsize) for codec in self._candidates()])

    def _candidates(self) -> list[Codec]:
        known = {kind: cls for kind, cls in REGISTRY["artifact/codec"].items() if kind != "best"}
        for kind in self.codecs:
            if kind not in known:
                raise ConfigError(f"no codec of kind {kind!r}{suggestion(kind, known)}")
        return [known[kind](transform=self.transform) for kind in self.codecs]


def shuffle(raw: bytes, shapes: list[Shape], itemsize: int) -> bytes:
    """First bytes of all items, then the second bytes, and so on."""
    return b"".join(raw[i::itemsize] for i in range(itemsize))


def planes(raw: bytes, shapes: list[Shape], itemsize: int) -> bytes:
    """Bit 7 of all bytes, then bit 6, …"""
    bits = np.unpackbits(np.frombuffer(raw, np.uint8)[None], axis=0)
    return np.packbits(bits, axis=1).tobytes()


def transpose(raw: bytes, shapes: list[Shape], itemsize: int) -> bytes:
    """Every matrix column by column."""
    out, start = [], 0
    for shape in shapes:
        size = itemsize * int(np.prod(shape, dtype=np.int64))
        part = np.frombuffer(raw[start : start + size], np.dtype((np.void, itemsize)))
        out.append((part.reshape(shape).T if len(shape) == 2 else part).tobytes())
        start += size
    return b"".join(out)


TRANSFORMS: dict[str, Callable[[bytes, list[Shape], int], bytes]] = {
    "none": lambda raw, shapes, itemsize: raw,
    "shuffle": shuffle,
    "planes": planes,
    "transpose": transpose,
}


def _require(module: str, package: str) -> None:
    try:
        library(module, package)
    except MissingLibrary as error:
        raise ConfigError(f"artifact.codec: {error}") from None
