"""From documents to a data folder in the challenge's layout, and the cache of such folders.

    manifest.json
    tokenizers/fineweb_<V>_bpe.{model,vocab}
    datasets/<name>/fineweb_{train,val}_%06d.bin

Shards and tokenizer are byte for byte what the challenge's own exporter writes for the same
documents; the manifest has its keys and, besides, the licence and the bytes of the raw text.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from recurgolf.data.byte_count import ByteCount, check_texts
from recurgolf.data.cache import cache_folder
from recurgolf.data.corpus import Corpus, Documents
from recurgolf.data.shard_fingerprints import checksums
from recurgolf.data.shards import MANIFEST, DataError, write_shard
from recurgolf.data.tokenizer import (
    TRAINER_SETTINGS,
    SentencePieceTokenizer,
    Tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from recurgolf.disk import write_file, write_json

CACHE_VERSION = 2
"""To be raised when the same text and settings give another folder than before."""

_DOCUMENTS_AT_ONCE = 1000

Step = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class ExportSettings:
    """What a data folder depends on, besides its documents.

    Attributes:
        vocab_size: pieces of the tokenizer to train.
        tokenizer: a tokenizer file to use instead of training one.
        all_documents: train the tokenizer on the validation documents, too, as the challenge's
            exporter does; else on training documents only.
        shard_tokens: tokens per shard, the last of a split has fewer.
    """

    vocab_size: int
    tokenizer: Path | None = None
    all_documents: bool = False
    shard_tokens: int = 100_000_000


def cached_export(corpus: Corpus, settings: ExportSettings, step: Step, anew: bool = False) -> Path:
    """The data folder for a corpus, made at the first call and found again at later ones.

    It appears under its name only when it is complete, so processes that build it at the same time
    do no harm: the first to finish wins.
    """
    root = cache_folder()
    folder = root / f"{corpus.name}-{_identity(corpus, settings)[:16]}"
    if is_complete(folder) and not anew:
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
    except OSError as error:
        raise DataError(
            f"{root}: cannot write the data cache ({error.strerror}); RECURGOLF_CACHE names another"
        ) from None
    try:
        export(corpus, settings, building / "new", step)
        if folder.exists() and (anew or not is_complete(folder)):
            folder.rename(building / "old")
        (building / "new").rename(folder)
    except OSError:
        if not is_complete(folder):  # else another process was quicker
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether a data folder has a manifest and all files that it lists."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).is_file() for name in manifest.get("files", []))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False


def export(corpus: Corpus, settings: ExportSettings, root: Path, step: Step) -> Path:
    """Write tokenizer, shards and manifest of a corpus under `root`; returns the shards' folder."""
    step("reading the text", 0, 1)
    documents = corpus.read()
    step("reading the text", 1, 1)
    tokenizer = _tokenizer(documents, settings, root / "tokenizers", step)
    ByteCount.of(tokenizer)  # refuses what it cannot count
    name = f"{corpus.name}_{tokenizer.prefix}{tokenizer.vocab_size}"
    folder = root / "datasets" / name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("fineweb_*.bin"):
        old.unlink()
    stats = {
        split: _write_split(folder, split, texts, tokenizer, settings.shard_tokens, step)
        for split, texts in (("val", documents.validation), ("train", documents.train))
    }
    manifest = _manifest(corpus, documents, settings, tokenizer, name, stats)
    # Last, because its presence says that everything else is there.
    write_json(root / MANIFEST, {**manifest, **checksums(manifest, root)})
    return folder


def _identity(corpus: Corpus, settings: ExportSettings) -> str:
    parts = {
        "version": CACHE_VERSION,
        "corpus": [corpus.name, corpus.identity],
        # Other versions of the library write other models for the same text.
        "tokenizer": read_tokenizer(settings.tokenizer).sha256
        if settings.tokenizer
        else [TRAINER_SETTINGS, version("sentencepiece")],
        "settings": [settings.vocab_size, settings.all_documents, settings.shard_tokens],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenizer(
    documents: Documents, settings: ExportSettings, folder: Path, step: Step
) -> Tokenizer:
    """Copy the given tokenizer to `folder`, or train one there."""
    folder.mkdir(parents=True, exist_ok=True)
    if settings.tokenizer:
        read_tokenizer(settings.tokenizer).check_vocab(settings.vocab_size)
        write_file(folder / settings.tokenizer.name, settings.tokenizer.read_bytes())
        return read_tokenizer(folder / settings.tokenizer.name)
    step(f"training a tokenizer of {settings.vocab_size} pieces", 0, 1)
    texts = (*documents.validation, *documents.train) if settings.all_documents else documents.train
    model = train_tokenizer(texts, settings.vocab_size)
    path = folder / f"fineweb_{settings.vocab_size}_bpe.model"
    write_file(path, model)
    tokenizer = SentencePieceTokenizer(path)
    tokenizer.check_vocab(settings.vocab_size)
    write_file(path.with_suffix(".vocab"), tokenizer.vocab_lines())
    step(f"training a tokenizer of {settings.vocab_size} pieces", 1, 1)
    return tokenizer


def _write_split(
    folder: Path, split: str, texts: list[str], tokenizer: Tokenizer, shard_tokens: int, step: Step
) -> dict[str, int]:
    """Write the shards of a split; returns documents, files, tokens and raw bytes."""
    pending = np.empty(0, dtype=np.uint16)
    files = tokens = 0
    for first in range(0, len(texts), _DOCUMENTS_AT_ONCE):
        batch = texts[first : first + _DOCUMENTS_AT_ONCE]
        encoded = tokenizer.encode(batch)
        if split == "val":
            check_texts(zip(encoded, tokenizer.decode(encoded), strict=True), batch, tokenizer)
        pending = np.concatenate([pending, *encoded])
        last = first + len(batch) == len(texts)
        while len(pending) >= shard_tokens or (last and len(pending)):
            shard, pending = pending[:shard_tokens], pending[shard_tokens:]
            write_shard(folder / f"fineweb_{split}_{files:06d}.bin", shard)
            files += 1
            tokens += len(shard)
        step(f"tokenizing documents ({split})", first + len(batch), len(texts))
    raw_bytes = sum(len(text.encode()) for text in texts)
    return {"docs": len(texts), "files": files, "tokens": tokens, "raw_bytes": raw_bytes}


def _manifest(
    corpus: Corpus,
    documents: Documents,
    settings: ExportSettings,
    tokenizer: Tokenizer,
    name: str,
    stats: dict[str, dict[str, int]],
) -> dict[str, Any]:
    ids = {
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "recommended_bigram_vocab_size": math.ceil(tokenizer.vocab_size / 128) * 128 * 5,
    }
    path = f"tokenizers/{tokenizer.path.name}"
    paths = {
        ".model": {"model_path": path, "vocab_path": path.removesuffix(".model") + ".vocab"},
        ".json": {"path": path},
    }
    tokenizer_name = f"{tokenizer.prefix}_{tokenizer.vocab_size}"
    counts = {f"{key}_{split}": n for split, s in stats.items() for key, n in s.items()}
    totals = {f"{key}_total": sum(s[key] for s in stats.values()) for key in stats["val"]}
    return {
        "version": corpus.name,
        "num_docs": totals["docs_total"],
        "num_val_docs": counts["docs_val"],
        "shard_size": settings.shard_tokens,
        "append_eos": False,
        "licence": corpus.licence,
        "source": corpus.source,
        "anchors": corpus.anchors,
        "tokenizer_sees_validation": settings.all_documents,
        "docs_meta": {
            "num_docs": totals["docs_total"],
            "docs_sha256": docs_sha256((*documents.validation, *documents.train)),
        },
        "tokenizers": [
            {
                "name": tokenizer_name,
                "kind": tokenizer.kind,
                "sha256": tokenizer.sha256,
                **ids,
                **paths[tokenizer.path.suffix],
            }
        ],
        "datasets": [
            {
                "name": name,
                "tokenizer_name": tokenizer_name,
                "tokenizer_kind": tokenizer.kind,
                "path": f"datasets/{name}",
                "train_glob": f"datasets/{name}/fineweb_train_*.bin",
                "val_glob": f"datasets/{name}/fineweb_val_*.bin",
                **ids,
                "stats": {**totals, **counts},
            }
        ],
    }


def docs_sha256(texts: Iterable[str]) -> str:
    """SHA-256 of a docs_selected.jsonl (one {"text": ...} a line) with these texts."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode())
    return digest.hexdigest()
