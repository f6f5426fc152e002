"""Tokenizers: the challenge's SentencePiece BPE and its plain bytes, read, trained and applied.

Every document becomes BOS and the pieces of its text; there is no EOS. Ids are uint16.
"""

from __future__ import annotations

import hashlib
import io
import json
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import sentencepiece

from recurgolf.data.shards import DataError, Tokens

SPACE = "\u2581"
"""SentencePiece's sign for a space inside a piece."""

MAX_VOCAB = 65_536
"""Ids are stored as uint16."""

TRAINER_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "character_coverage": 0.999,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": False,
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 3,
    "hard_vocab_limit": False,
}
"""The challenge's (data/download_hf_docs_and_tokenize.py of openai/parameter-golf)."""

# The trainer silently skips longer inputs (its default `max_sentence_length`, in bytes); those are
# cut into chunks that stay below. Shorter ones must stay whole: the challenge feeds documents.
LONGEST_INPUT = 4192
CHUNK_BYTES = 4000


class PieceKind(Enum):
    """What a piece stands for: text, one byte, or nothing (control, unknown, unused)."""

    TEXT = 0
    BYTE = 1
    SPECIAL = 2


@dataclass(frozen=True)
class Piece:
    """One entry of a vocabulary; `text` has `SPACE` for spaces."""

    kind: PieceKind
    text: str


class Tokenizer:
    """A vocabulary that turns documents into ids and back.

    Attributes:
        path: the file it was read from.
        vocab_size: number of pieces; every id is below.
        bos_id: the id that begins every document.
        kind: its name in a manifest.
        prefix: what names of data sets made with it put before the vocabulary size.
        spelled_space: ids of the byte pieces that spell a space where no piece stands for one.
        keeps_leading_space: a space at the beginning of a document is part of its text.
    """

    kind: ClassVar[str]
    prefix: ClassVar[str]
    path: Path
    vocab_size: int
    bos_id: int
    spelled_space: tuple[int, ...] = ()
    keeps_leading_space = False

    @cached_property
    def sha256(self) -> str:
        """Of the file, in hex."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def check_vocab(self, vocab_size: int) -> None:
        """Refuse a configured vocabulary size that is not this tokenizer's."""
        if vocab_size != self.vocab_size:
            raise DataError(
                f"data.vocab_size={vocab_size}, but the tokenizer {self.path.name} has "
                f"{self.vocab_size} pieces; set data.vocab_size={self.vocab_size}"
            )

    def pieces(self) -> list[Piece]:
        """Every piece, by id."""
        raise NotImplementedError

    def encode(self, documents: Sequence[str]) -> list[Tokens]:
        """The ids of each document, BOS first, as 1-D uint16."""
        raise NotImplementedError

    def decode(self, documents: Sequence[Tokens]) -> list[str]:
        """The text of each sequence of ids; special pieces stand for nothing."""
        raise NotImplementedError

    def normalized(self, documents: Sequence[str]) -> list[str]:
        """What is left of each text in front of its encoding, and what decoding must bring back."""
        return list(documents)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file of any kind that has a BOS."""

    kind = "sentencepiece_bpe"
    prefix = "sp"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError:
            raise DataError(f"{path}: not a SentencePiece model") from None
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._model.bos_id()
        if self.bos_id < 0:
            raise DataError(f"{path}: the model has no BOS piece, which must begin every document")
        if self.vocab_size > MAX_VOCAB:
            raise DataError(f"{path}: {self.vocab_size} pieces; shards hold at most {MAX_VOCAB}")
        spelling = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        if all(map(self._model.is_byte, spelling)):
            self.spelled_space = tuple(spelling)
        self.keeps_leading_space = self._model.normalize(" ") == SPACE

    def pieces(self) -> list[Piece]:
        return [Piece(self._kind(i), self._model.id_to_piece(i)) for i in range(self.vocab_size)]

    def encode(self, documents: Sequence[str]) -> list[Tokens]:
        ids = self._model.encode(list(documents), out_type=int, num_threads=1)
        return [np.array([self.bos_id, *document], dtype=np.uint16) for document in ids]

    def decode(self, documents: Sequence[Tokens]) -> list[str]:
        ids = [document.tolist() for document in documents]
        return self._plain(self._model.decode(ids, num_threads=1)) if ids else []

    def normalized(self, documents: Sequence[str]) -> list[str]:
        return self._plain(self._model.normalize(list(documents)))

    def _plain(self, texts: list[str]) -> list[str]:
        """With spaces for their signs, which decoding leaves where byte pieces spell them."""
        if not self.keeps_leading_space:  # the first is the model's own
            texts = [text.removeprefix(SPACE) for text in texts]
        return [text.replace(SPACE, " ") for text in texts]

    def vocab_lines(self) -> str:
        """The `.vocab` file that belongs to the model: a piece, a tab and its score per line."""
        model = self._model
        return "".join(
            f"{model.id_to_piece(i)}\t{model.get_score(i):g}\n" for i in range(self.vocab_size)
        )

    def _kind(self, index: int) -> PieceKind:
        model = self._model
        if model.is_control(index) or model.is_unknown(index) or model.is_unused(index):
            return PieceKind.SPECIAL
        return PieceKind.BYTE if model.is_byte(index) else PieceKind.TEXT


class PureByteTokenizer(Tokenizer):
    """The challenge's byte260: an id is a byte plus an offset; special pieces lie below it."""

    kind = "byte"
    prefix = "byte"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            self.vocab_size = int(description["vocab_size"])
            self.bos_id = int(description["config"]["bos_id"])
            self._offset = int(description["config"]["byte_offset"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(
                f"{path}: not a pure-byte tokenizer: expected JSON with vocab_size, config.bos_id "
                "and config.byte_offset"
            ) from None
        if self.vocab_size != self._offset + 256 or not 0 <= self.bos_id < self._offset:
            raise DataError(
                f"{path}: vocab_size={self.vocab_size}, bos_id={self.bos_id} do not fit "
                f"byte_offset={self._offset} (256 bytes above it, BOS below)"
            )

    def pieces(self) -> list[Piece]:
        special = [Piece(PieceKind.SPECIAL, f"<{i}>") for i in range(self._offset)]
        return special + [Piece(PieceKind.BYTE, f"<0x{byte:02X}>") for byte in range(256)]

    def encode(self, documents: Sequence[str]) -> list[Tokens]:
        encoded = []
        for document in documents:
            ids = np.frombuffer(document.encode(), dtype=np.uint8).astype(np.uint16) + self._offset
            encoded.append(np.concatenate([[self.bos_id], ids]).astype(np.uint16))
        return encoded

    def decode(self, documents: Sequence[Tokens]) -> list[str]:
        data = [(ids[ids >= self._offset] - self._offset).astype(np.uint8) for ids in documents]
        return [array.tobytes().decode("utf-8", "replace") for array in data]


READERS: dict[str, type[SentencePieceTokenizer] | type[PureByteTokenizer]] = {
    ".model": SentencePieceTokenizer,
    ".json": PureByteTokenizer,
}
"""File ending -> reader of such a tokenizer."""


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `.model` (SentencePiece) or `.json` (pure bytes) file."""
    # An empty file is to SentencePiece a model without pieces.
    if not path.is_file() or not path.stat().st_size:
        raise DataError(f"{path.absolute()}: no such tokenizer file, or an empty one")
    if path.suffix not in READERS:
        raise DataError(f"{path}: a tokenizer file ends in {' or '.join(READERS)}")
    return READERS[path.suffix](path)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """Train a SentencePiece BPE model with the challenge's settings.

    The same documents, settings and sentencepiece version give the same bytes.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=trainer_inputs(documents),
            model_writer=model,
            vocab_size=vocab_size,
            minloglevel=2,
            **TRAINER_SETTINGS,
        )
    except RuntimeError as error:
        # "INTERNAL: file(line) [condition] Reason. Advice on options that are fixed here."
        reason = str(error).splitlines()[0].rpartition("] ")[2].partition(" Increase")[0]
        raise DataError(
            f"no tokenizer of {vocab_size} pieces can be trained on this text: {reason} "
            "(260 pieces are bytes and specials, the others hold its characters and then its words)"
        ) from None
    return model.getvalue()


def trainer_inputs(documents: Iterable[str]) -> Iterator[str]:
    """The documents as the trainer is to see them: whole, or in chunks where they are too long."""
    for document in documents:
        text = document.replace("\0", " ").strip()
        if len(text) * 4 <= LONGEST_INPUT or len(text.encode()) <= LONGEST_INPUT:
            yield text
        else:
            yield from chunks(text, CHUNK_BYTES)


def chunks(text: str, longest: int) -> Iterator[str]:
    """Cut text into parts of at most `longest` UTF-8 bytes, at white space where there is any."""
    data = text.encode()
    start = 0
    while start < len(data):
        stop = start + longest
        if stop < len(data):
            space = max(data.rfind(blank, start, stop + 1) for blank in (b" ", b"\n", b"\t"))
            if space > start:
                stop = space
            else:
                while data[stop] & 0xC0 == 0x80:  # not between the bytes of one character
                    stop -= 1
        yield data[start:stop].decode().strip()
        start = stop


STANDARD_NORMALIZERS = ("identity", "nmt_nfkc")
PROBES = (*string.ascii_letters, *string.digits, *string.punctuation, *"äéñßøçа日本の中한ا")


def normalizer_of(path: Path) -> str:
    """What a tokenizer's file replaces that no standard normalizer does: `'e' becomes 'eeee'`;
    empty where it does nothing of the kind.

    The challenge's tokenizers normalize by NFKC, which leaves nearly all bytes as they are. A file
    can hold any table, and one that lengthens the text lowers every score per byte of it.
    """
    if path.suffix != ".model":
        return ""
    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    standard = [
        sentencepiece.SentencePieceNormalizer(rule_name=name) for name in STANDARD_NORMALIZERS
    ]
    for probe in PROBES:
        text = f"x{probe}x"
        got = model.normalize(text).replace(SPACE, "")
        if got not in {one.normalize(text).replace(SPACE, "") for one in standard}:
            return f"{probe!r} becomes {got[1:-1]!r}"
    return ""
