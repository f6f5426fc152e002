"""A prepared data set: its shards, tokenizer and byte table, checked against each other."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from recurgolf.data.byte_count import ByteCount
from recurgolf.data.corpus import read_jsonl
from recurgolf.data.export import MANIFEST, cache_folder
from recurgolf.data.shards import (
    DataError,
    Tokens,
    count_tokens,
    find_shards,
    find_sidecars,
    read_shard,
)
from recurgolf.data.tokenizer import Tokenizer, read_tokenizer

_TRAIN_TOKENS_LOOKED_AT = 1_000_000


@dataclass(frozen=True)
class Dataset:
    """What a run trains and is scored on.

    Attributes:
        name: of the data set, for logs and tags.
        folder: where its shards lie.
        train_shards, val_shards: paths in stream order.
        tokenizer: the one that made them.
        byte_count: table of the bytes that each token counts for, over the tokenizer's vocabulary.
        val_documents: number of validation documents.
        val_bytes: bytes of the validation text by the table = UTF-8 length of the decoded tokens.
        val_raw_bytes: UTF-8 bytes of the validation text before the tokenizer normalised it; None
            where the text is not known.
        licence: of the text, where known.
        manifest: the folder's manifest.json, {} without one; any key may be missing.
        fingerprint: hash of validation tokens and tokenizer; figures with equal ones compare.
    """

    name: str
    folder: Path
    train_shards: list[Path]
    val_shards: list[Path]
    tokenizer: Tokenizer
    byte_count: ByteCount
    val_documents: int
    val_bytes: int
    val_raw_bytes: int | None
    licence: str | None
    manifest: dict[str, Any]
    fingerprint: str

    def validation_tokens(self) -> Tokens:
        """All validation tokens, 1-D uint16; memory-mapped where they are one shard."""
        return _read_all(self.val_shards)

    @property
    def train_tokens(self) -> int:
        """Number of training tokens."""
        return sum(count_tokens(path) for path in self.train_shards)

    @cached_property
    def val_byte_sidecar(self) -> Tokens | None:
        """Bytes of each validation token as its exporter counted them, where it left a sidecar.

        They are then the divisor instead of `byte_count`'s.
        """
        sidecars = find_sidecars(self.folder, "val")
        return _read_all(sidecars) if sidecars else None

    @property
    def anchors(self) -> dict[str, float]:
        """Bits per raw byte that well-known compressors reach on the validation text."""
        return dict(_mapping(self.manifest.get("anchors")))


def open_dataset(folder: Path, tokenizer_path: Path | None, vocab_size: int) -> Dataset:
    """Read and check a folder of shards as the challenge ships them.

    `../../manifest.json` is used where it is there: for the tokenizer, unless one is given, the
    name, the licence and the bytes of the raw text.

    Raises:
        DataError: something is missing or does not fit together.
    """
    if not folder.is_dir():
        raise DataError(f"data.path={folder}: no such folder")
    val_shards, train_shards = find_shards(folder, "val"), find_shards(folder, "train")
    if not val_shards:
        raise DataError(f"{folder}: no fineweb_val_*.bin in it{_folders_below(folder)}")
    root = folder.resolve().parent.parent
    manifest = _read_manifest(root / MANIFEST)
    entry = _named(manifest.get("datasets"), folder.resolve().name)
    tokenizer = read_tokenizer(tokenizer_path or _listed_tokenizer(folder, root, manifest, entry))
    tokenizer.check_vocab(vocab_size)
    tokens = _read_all(val_shards)
    _check_tokens(tokens, val_shards[0], tokenizer)
    for shard in train_shards:
        count_tokens(shard)
    for shard in train_shards[:1]:
        _check_range(read_shard(shard)[:_TRAIN_TOKENS_LOOKED_AT], shard, tokenizer)
    byte_count = ByteCount.of(tokenizer)
    fingerprint = _fingerprint(tokens, tokenizer)
    num_documents = int(np.count_nonzero(tokens == tokenizer.bos_id))
    raw_text = _raw_text(root, manifest, num_documents)
    val_bytes, val_raw_bytes = _measure(
        tokens, tokenizer, byte_count, fingerprint, raw_text, num_documents
    )
    stats = _mapping(entry.get("stats"))
    dataset = Dataset(
        name=str(entry.get("name") or folder.resolve().name),
        folder=folder,
        train_shards=train_shards,
        val_shards=val_shards,
        tokenizer=tokenizer,
        byte_count=byte_count,
        val_documents=num_documents,
        val_bytes=val_bytes,
        val_raw_bytes=stats.get("raw_bytes_val") or val_raw_bytes,
        licence=manifest.get("licence"),
        manifest=manifest,
        fingerprint=fingerprint,
    )
    sidecar = dataset.val_byte_sidecar
    if sidecar is not None and len(sidecar) != len(tokens):
        raise DataError(
            f"{folder}: fineweb_val_bytes_*.bin count the bytes of {len(sidecar)} tokens, but "
            f"there are {len(tokens)} validation tokens"
        )
    return dataset


def _check_tokens(tokens: Tokens, first_shard: Path, tokenizer: Tokenizer) -> None:
    if len(tokens) < 2:
        raise DataError(f"{first_shard}: {len(tokens)} validation tokens; at least 2 are needed")
    if tokens[0] != tokenizer.bos_id:
        raise DataError(
            f"{first_shard}: begins with token {tokens[0]}, expected the BOS {tokenizer.bos_id} of "
            f"{tokenizer.path}: these shards were made with another tokenizer"
        )
    _check_range(tokens, first_shard, tokenizer)


def _check_range(tokens: Tokens, shard: Path, tokenizer: Tokenizer) -> None:
    largest = int(tokens.max()) if len(tokens) else 0
    if largest >= tokenizer.vocab_size:
        raise DataError(
            f"{shard}: token {largest}, but the tokenizer {tokenizer.path} has only "
            f"{tokenizer.vocab_size} pieces (wrong vocabulary)"
        )


def _measure(
    tokens: Tokens,
    tokenizer: Tokenizer,
    byte_count: ByteCount,
    fingerprint: str,
    raw_text: Path | None,
    num_documents: int,
) -> tuple[int, int | None]:
    """Checked table bytes and raw bytes of the validation text.

    Large sets take half a minute to decode, so what was proven once is noted in the cache under
    the hash of everything it depends on.
    """
    stamp = [fingerprint, _file_stamp(raw_text)]
    key = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:32]
    note = cache_folder() / "checked" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        known = json.loads(note.read_text(encoding="utf-8"))
        return known["val_bytes"], known["val_raw_bytes"]
    measured = {
        "val_bytes": byte_count.check(tokens, tokenizer),
        "val_raw_bytes": _raw_bytes(raw_text, num_documents) if raw_text else None,
    }
    with contextlib.suppress(OSError):  # without a note it is checked again next time
        note.parent.mkdir(parents=True, exist_ok=True)
        unfinished = note.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(measured), encoding="utf-8")
        unfinished.replace(note)
    return measured["val_bytes"], measured["val_raw_bytes"]


def _file_stamp(path: Path | None) -> list[Any] | None:
    return [str(path), path.stat().st_size, path.stat().st_mtime_ns] if path else None


def _raw_text(root: Path, manifest: Mapping[str, Any], num_documents: int) -> Path | None:
    """The file whose first `num_documents` lines are the validation text, if it is there."""
    path = root / str(manifest.get("docs_jsonl") or "docs_selected.jsonl")
    return path if path.is_file() and manifest.get("num_val_docs") == num_documents else None


def _raw_bytes(path: Path, num_documents: int) -> int:
    with path.open("rb") as file:
        texts = islice(read_jsonl(file, path, "text"), num_documents)
        return sum(len(text.encode()) for text in texts)


def _fingerprint(tokens: Tokens, tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(tokenizer.sha256.encode())
    digest.update(np.ascontiguousarray(tokens).data)
    return digest.hexdigest()


def _read_all(shards: list[Path]) -> Tokens:
    parts = [read_shard(path) for path in shards]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(_mapping(json.loads(path.read_text(encoding="utf-8"))))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None


def _listed_tokenizer(
    folder: Path, root: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any]
) -> Path:
    """The tokenizer that the manifest names for this data set."""
    listed = _named(manifest.get("tokenizers"), entry.get("tokenizer_name"))
    path = listed.get("model_path") or listed.get("path")
    if not path:
        raise DataError(
            f"{folder}: {root / MANIFEST} names no tokenizer for it; say data.tokenizer=FILE "
            "(a .model of SentencePiece, or the .json of pure bytes)"
        )
    return root / str(path)


def _named(entries: Any, name: Any) -> Mapping[str, Any]:
    """The entry of a manifest's list that has this name, {} where there is none."""
    found = [_mapping(e) for e in entries or [] if _mapping(e).get("name") == name]
    return found[0] if found else {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _folders_below(folder: Path) -> str:
    below = sorted({str(path.parent) for path in folder.glob("**/fineweb_val_*.bin")})
    return f"; there are some in {', '.join(below)}" if below else ""
