"""The file that counts: its container, codecs and reader."""

from pathlib import Path

from recurgolf.artifact import reader
from recurgolf.artifact.codecs import (
    AnsCodec,
    BestCodec,
    BrotliCodec,
    Codec,
    LzmaCodec,
    StoreCodec,
    ZlibCodec,
    ZstdCodec,
    all_decoders,
)
from recurgolf.artifact.container import PackTable, SectionBytes, pack, pack_bytes
from recurgolf.artifact.reader import Artifact, ArtifactError


def load(path: str | Path) -> Artifact:
    """Read an artifact, with the codecs of plugins as well; see `reader.load`."""
    return reader.load(path, all_decoders())


__all__ = [
    "AnsCodec",
    "Artifact",
    "ArtifactError",
    "BestCodec",
    "BrotliCodec",
    "Codec",
    "LzmaCodec",
    "PackTable",
    "SectionBytes",
    "StoreCodec",
    "ZlibCodec",
    "ZstdCodec",
    "load",
    "pack",
    "pack_bytes",
]
