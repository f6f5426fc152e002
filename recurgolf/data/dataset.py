"""A prepared data set: its shards, tokenizer and byte table, checked against each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recurgolf.data.byte_count import ByteCount, check_texts, decoded
from recurgolf.data.cache import remembered
from recurgolf.data.corpus import read_jsonl
from recurgolf.data.shard_fingerprints import check_checksums, fingerprints
from recurgolf.data.shards import (
    MANIFEST,
    DataError,
    Tokens,
    count_tokens,
    find_shards,
    find_sidecars,
    read_shard,
)
from recurgolf.data.tokenizer import Tokenizer, read_tokenizer

if TYPE_CHECKING:
    from recurgolf.data.shard_fingerprints import Fingerprint


@dataclass(frozen=True, kw_only=True)
class ValidationData:
    """What scoring needs of a data set.

    Attributes:
        folder: where the shards lie.
        val_shards: paths in stream order.
        tokenizer: the one that made them.
        byte_count: table of the bytes that each token counts for, over the tokenizer's vocabulary.
        val_byte_sidecar: bytes of each validation token where the table is not the divisor: as
            the exporter counted them, if it left a sidecar, or with spelled spaces counted as one.
        manifest: the manifest.json that belongs to the folder, {} without one; any key may be
            missing.
        fingerprint: hash of tokenizer, validation tokens and sidecar; figures with equal ones
            compare.
    """

    folder: Path
    val_shards: list[Path]
    tokenizer: Tokenizer
    byte_count: ByteCount
    val_byte_sidecar: Tokens | None = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    fingerprint: str
    tokens: Tokens = field(repr=False)

    def validation_tokens(self) -> Tokens:
        """All validation tokens, 1-D uint16; in memory, so that they stay what was checked."""
        return self.tokens


@dataclass(frozen=True, kw_only=True)
class Dataset(ValidationData):
    """What a run trains and is scored on.

    Attributes:
        name: of the data set, for logs and tags.
        train_shards: paths in stream order.
        val_documents: number of validation documents.
        val_bytes: bytes of the validation text by the table = UTF-8 length of the decoded tokens.
        val_raw_bytes: UTF-8 bytes of the validation text before the tokenizer normalized it; None
            where the text is not known.
        licence: of the text, where known.
        files: every file that was read or is yet to be, as it was when it was checked.
    """

    name: str
    train_shards: list[Path]
    val_documents: int
    val_bytes: int
    val_raw_bytes: int | None
    licence: str | None
    files: dict[Path, Fingerprint] = field(repr=False)

    @property
    def train_tokens(self) -> int:
        """Number of training tokens."""
        return sum(count_tokens(path) for path in self.train_shards)

    @property
    def anchors(self) -> dict[str, float]:
        """Bits per raw byte that well-known compressors reach on the validation text."""
        return dict(_mapping(self.manifest.get("anchors")))

    @property
    def contents(self) -> dict[str, str]:
        """What a checkpoint remembers of the data: shard -> SHA-256."""
        found = {path.name: self.files[path].sha256 for path in self.train_shards}
        return {"validation": self.fingerprint, **found}

    def check_contents(self, before: dict[str, str]) -> None:
        """Refuse to continue on data other than a checkpoint's."""
        now = self.contents
        differing = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        if differing:
            shown = ", ".join(differing[:5]) + (" ..." if len(differing) > 5 else "")
            raise DataError(
                f"{self.folder}: the data is not what this run began with; it differs in {shown}. "
                "Put the old data back, or start anew with trainer.resume=never"
            )


def open_validation(folder: Path, tokenizer_path: Path | None, vocab_size: int) -> ValidationData:
    """Read the validation shards of a folder as the challenge ships them.

    `../../manifest.json` names the tokenizer, unless one is given.
    """
    if not folder.is_dir():
        raise DataError(f"data.path={folder}: no such folder")
    shards = find_shards(folder, "val")
    if not shards:
        raise DataError(f"{folder}: no fineweb_val_*.bin in it{_folders_below(folder)}")
    manifest = _read_manifest(_root(folder) / MANIFEST)
    tokenizer = read_tokenizer(tokenizer_path or _listed_tokenizer(folder, manifest))
    tokenizer.check_vocab(vocab_size)
    tokens, sidecar = _read_all(shards), _read_all(find_sidecars(folder, "val"))
    if len(tokens) < 2:
        raise DataError(f"{shards[0]}: {len(tokens)} validation tokens; at least 2 are needed")
    if tokens[0] != tokenizer.bos_id:
        raise DataError(
            f"{shards[0]}: begins with token {tokens[0]}, expected the BOS {tokenizer.bos_id} of "
            f"{tokenizer.path}: these shards were made with another tokenizer"
        )
    _check_range(int(tokens.max()), shards[0], tokenizer)
    if len(sidecar) not in (0, len(tokens)):
        raise DataError(
            f"{folder}: fineweb_val_bytes_*.bin count the bytes of {len(sidecar)} tokens, but "
            f"there are {len(tokens)} validation tokens"
        )
    byte_count, digest = ByteCount.of(tokenizer), hashlib.sha256(tokenizer.sha256.encode())
    digest.update(tokens.data)
    digest.update(sidecar.data)
    if not len(sidecar) and len(byte_count.spaces_spelled_in(tokens)):
        sidecar = byte_count.per_token(tokens)
    return ValidationData(
        folder=folder,
        val_shards=shards,
        tokenizer=tokenizer,
        byte_count=byte_count,
        val_byte_sidecar=sidecar if len(sidecar) else None,
        manifest=manifest,
        fingerprint=digest.hexdigest(),
        tokens=tokens,
    )


def tokenizer_of(folder: Path, tokenizer_path: Path | None) -> Tokenizer:
    """The tokenizer of a folder of shards: the one given, or that of its manifest."""
    manifest = _read_manifest(_root(folder) / MANIFEST)
    return read_tokenizer(tokenizer_path or _listed_tokenizer(folder, manifest))


def open_dataset(folder: Path, tokenizer_path: Path | None, vocab_size: int) -> Dataset:
    """Read and check a folder of shards as the challenge ships them.

    The manifest, where there is one, also gives the name, the licence, the bytes of the raw text
    and checksums. Shards are read once; what was found is remembered in the cache.
    """
    found = open_validation(folder, tokenizer_path, vocab_size)
    root, entry = _root(folder), _entry(folder, found.manifest)
    train_shards, listed = find_shards(folder, "train"), root / MANIFEST
    others = [found.tokenizer.path, *([listed] if listed.is_file() else [])]
    sidecars = find_sidecars(folder, "val")
    files = fingerprints([*found.val_shards, *sidecars, *train_shards, *others])
    check_checksums(found.manifest, root, files)
    _check_tokens(train_shards, files, found.tokenizer)
    num_documents = int(np.count_nonzero(found.tokens == found.tokenizer.bos_id))
    val_bytes = found.byte_count.total(found.tokens)
    raw_text = _raw_text(root, found.manifest, num_documents)
    # Large sets take half a minute to decode, so that it was proven is remembered.
    stat = raw_text.stat() if raw_text else None
    key = [found.fingerprint, val_bytes, stat and [str(raw_text), stat.st_size, stat.st_mtime_ns]]
    raw_bytes = remembered(key, lambda: _proven(found, raw_text, num_documents))
    if not val_bytes:
        raise DataError(
            f"{found.val_shards[0]}: {len(found.tokens)} validation tokens, but none stands for "
            "any text: there is nothing to predict"
        )
    stated = _mapping(entry.get("stats")).get("raw_bytes_val")
    if None not in (stated, raw_bytes) and stated != raw_bytes:
        raise DataError(f"{listed}: raw_bytes_val={stated}, but {raw_text} has {raw_bytes} bytes")
    return Dataset(
        **vars(found),
        name=str(entry.get("name") or folder.resolve().name),
        train_shards=train_shards,
        val_documents=num_documents,
        val_bytes=val_bytes,
        val_raw_bytes=raw_bytes or (stated if type(stated) is int and stated > 0 else None),
        licence=found.manifest.get("licence"),
        files=files,
    )


def _check_tokens(
    shards: list[Path], files: Mapping[Path, Fingerprint], tokenizer: Tokenizer
) -> None:
    for path in shards:
        _check_range(files[path].largest, path, tokenizer)


def _check_range(largest: int, shard: Path, tokenizer: Tokenizer) -> None:
    """Refuse a shard with a token that its tokenizer does not have."""
    if largest >= tokenizer.vocab_size:
        raise DataError(
            f"{shard}: token {largest}, but the tokenizer {tokenizer.path} has only "
            f"{tokenizer.vocab_size} pieces (wrong vocabulary)"
        )


def _proven(found: ValidationData, raw_text: Path | None, num_documents: int) -> int | None:
    """Check the byte table against the decoded text, and that against the raw text where it is
    there; the bytes of the latter.
    """
    found.byte_count.check(found.tokens, found.tokenizer)
    if raw_text is None:
        return None
    with raw_text.open("rb") as file:
        texts = list(islice(read_jsonl(file, raw_text, "text"), num_documents))
    check_texts(decoded(found.tokens, found.tokenizer), texts, found.tokenizer)
    return sum(len(text.encode()) for text in texts)


def _raw_text(root: Path, manifest: Mapping[str, Any], num_documents: int) -> Path | None:
    """The file whose first `num_documents` lines are the validation text, if it is there."""
    path = root / str(manifest.get("docs_jsonl") or "docs_selected.jsonl")
    return path if path.is_file() and manifest.get("num_val_docs") == num_documents else None


def raw_texts(dataset: Dataset) -> list[str] | None:
    """A data set's raw validation documents; None where they are not there."""
    path = _raw_text(_root(dataset.folder), dataset.manifest, dataset.val_documents)
    if path is None:
        return None
    with path.open("rb") as file:
        return list(islice(read_jsonl(file, path, "text"), dataset.val_documents))


def _read_all(shards: list[Path]) -> Tokens:
    parts = [read_shard(path) for path in shards]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint16), *parts])


def _root(folder: Path) -> Path:
    """Where the manifest of a folder of shards lies."""
    return folder.resolve().parent.parent


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(_mapping(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None


def _entry(folder: Path, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a manifest says about a folder of shards."""
    return _named(manifest.get("datasets"), folder.resolve().name)


def _listed_tokenizer(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """The tokenizer that the manifest names for this data set."""
    root, name = _root(folder), _entry(folder, manifest).get("tokenizer_name")
    listed = _named(manifest.get("tokenizers"), name)
    path = listed.get("model_path") or listed.get("path")
    if not path:
        raise DataError(
            f"{folder}: {root / MANIFEST} names no tokenizer for it; say data.tokenizer=FILE "
            "(a .model of SentencePiece, or the .json of pure bytes)"
        )
    return root / str(path)


def _named(entries: Any, name: Any) -> Mapping[str, Any]:
    """The entry of a manifest's list that has this name, {} where there is none."""
    entries = entries if isinstance(entries, list) else []
    found = [_mapping(entry) for entry in entries if _mapping(entry).get("name") == name]
    return found[0] if found else {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _folders_below(folder: Path) -> str:
    below = sorted({str(path.parent) for path in folder.glob("**/fineweb_val_*.bin")})
    return f"; there are some in {', '.join(below)}" if below else ""
