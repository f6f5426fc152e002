"""The file that counts: its container, codecs and reader."""

from recurgolf.artifact.codecs import (
    AnsCodec,
    BestCodec,
    BrotliCodec,
    Codec,
    LzmaCodec,
    StoreCodec,
    ZlibCodec,
    ZstdCodec,
)
from recurgolf.artifact.container import PackTable, SectionBytes, pack, pack_bytes
from recurgolf.artifact.reader import Artifact, ArtifactError, load
from recurgolf.config import import_modules

MODULES = import_modules(__name__)

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
