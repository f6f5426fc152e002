"""The file that counts: its container, codecs and reader."""

from dataclasses import replace
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
)
from recurgolf.artifact.container import PackTable, SectionBytes, pack, pack_bytes
from recurgolf.artifact.reader import Artifact, ArtifactError
from recurgolf.config import ConfigError, import_modules
from recurgolf.older import modern


def load(path: str | Path) -> Artifact:
    """Read an artifact, also one whose header an earlier version wrote; see `reader.load`."""
    artifact = reader.load(path)
    try:
        return replace(artifact, metadata=modern(artifact.metadata))
    except ConfigError as error:
        raise ArtifactError(f"header: {error}") from None


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
