"""The divisor of bits per byte: how many bytes of text each target token stands for.

The challenge's table: a byte piece counts 1; a text piece the UTF-8 length of its text without a
leading space sign, and that space counts 1 unless the token before it is a special one (a document
does not begin with a space, unless its tokenizer keeps them); special pieces count 0. Where a
vocabulary has no piece for a lone space sign, three byte pieces spell it: together they count the
one byte of the space. Over whole documents the sum is the UTF-8 length of the decoded text, which
`check` proves document by document on the validation tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recurgolf.data.shards import DataError, Tokens
from recurgolf.data.tokenizer import SPACE, PieceKind, Tokenizer

_TOKENS_AT_ONCE = 1_000_000
_DOCUMENTS_AT_ONCE = 2048
"""How much is counted or decoded together: bounds the memory for long validation sets."""


@dataclass(frozen=True)
class ByteCount:
    """The table over a model's vocabulary.

    Attributes:
        base_bytes: int16 [V], bytes of each piece, its leading space left out.
        has_leading_space: bool [V].
        is_boundary: bool [V], special pieces and ids that only the model has: they end a text, so
            a leading space behind them is not counted. None, where the tokenizer keeps such spaces.
        spelled_space: the three byte pieces that spell the space sign, or () where they would be
            three bytes of text.
    """

    base_bytes: Tensor
    has_leading_space: Tensor
    is_boundary: Tensor
    spelled_space: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer, model_vocab: int | None = None) -> ByteCount:
        """The table of a tokenizer, padded to a model's vocabulary where that is larger.

        Raises:
            DataError: a piece has a space inside, which the challenge's rule would count as three
                bytes, so that the score would come out too low.
        """
        pieces = tokenizer.pieces()
        size = max(len(pieces), model_vocab or 0)
        base_bytes = np.zeros(size, dtype=np.int16)
        has_leading_space = np.zeros(size, dtype=bool)
        is_boundary = np.full(size, not tokenizer.keeps_leading_space)
        for index, piece in enumerate(pieces):
            if piece.kind is PieceKind.SPECIAL:
                continue
            is_boundary[index] = False
            if piece.kind is PieceKind.BYTE:
                base_bytes[index] = 1
                continue
            text = piece.text.removeprefix(SPACE)
            if SPACE in text:
                raise DataError(
                    f"{tokenizer.path}: piece {index} {piece.text!r} has a space ({SPACE}) inside; "
                    "bits per byte are defined for pieces with at most one, at their beginning "
                    "(train with split_by_whitespace and remove_extra_whitespaces)"
                )
            has_leading_space[index] = text != piece.text
            base_bytes[index] = len(text.encode())
        base, leading, boundary = map(
            torch.from_numpy, (base_bytes, has_leading_space, is_boundary)
        )
        return cls(base, leading, boundary, tokenizer.spelled_space)

    def to(self, device: torch.device | str) -> ByteCount:
        """The same table on another device."""
        return ByteCount(
            self.base_bytes.to(device),
            self.has_leading_space.to(device),
            self.is_boundary.to(device),
            self.spelled_space,
        )

    def count(self, targets: Tensor, previous: Tensor) -> Tensor:
        """Bytes of each target.

        Args:
            targets: int64 ids of any shape, on the table's device.
            previous: the token before each target (the model's input at that position), same shape.

        Returns:
            int64, same shape. Its sum is the divisor of bits per byte, unless spaces are spelled.
        """
        spaces = self.has_leading_space[targets] & ~self.is_boundary[previous]
        return self.base_bytes[targets].to(torch.int64) + spaces

    def spaces_spelled_in(self, tokens: Tokens) -> NDArray[np.int64]:
        """Positions of the first of the three byte pieces of every spelled space."""
        if not self.spelled_space:
            return np.empty(0, dtype=np.int64)
        first, second, third = self.spelled_space
        return np.flatnonzero(
            (tokens[:-2] == first) & (tokens[1:-1] == second) & (tokens[2:] == third)
        )

    def per_token(self, tokens: Tokens) -> NDArray[np.uint16]:
        """Bytes of every token [n] of a stream, its first one taken as the beginning of a text."""
        counts = np.empty(len(tokens), dtype=np.uint16)
        counts[:1] = self.base_bytes[tokens[:1].astype(np.int64)]
        for first in range(0, len(tokens) - 1, _TOKENS_AT_ONCE):
            ids = torch.from_numpy(tokens[first : first + _TOKENS_AT_ONCE + 1].astype(np.int64))
            counts[first + 1 : first + len(ids)] = self.count(ids[1:], ids[:-1])
        spaces = self.spaces_spelled_in(tokens)
        before = tokens[np.maximum(spaces - 1, 0)].astype(np.int64)
        counts[spaces] = counts[spaces + 1] = 0
        counts[spaces + 2] = ~self.is_boundary[before]
        return counts

    def total(self, tokens: Tokens) -> int:
        """Bytes of a stream of tokens, its first one taken as the beginning of a document."""
        return int(self.per_token(tokens).sum(dtype=np.int64))

    def check(self, tokens: Tokens, tokenizer: Tokenizer) -> int:
        """Refuse a table that disagrees with the UTF-8 length of any decoded document.

        Args:
            tokens: whole documents, each beginning with BOS.

        Returns:
            The total in bytes.
        """
        counts, stop = self.per_token(tokens), 0
        for number, (document, text) in enumerate(decoded(tokens, tokenizer)):
            start, stop = stop, stop + len(document)
            counted, length = int(counts[start:stop].sum(dtype=np.int64)), len(text.encode())
            if counted != length:
                raise DataError(
                    f"{tokenizer.path}: the byte table counts {counted} bytes for validation "
                    f"document {number}, but its decoded text has {length}: the tokens are not "
                    "whole documents of this tokenizer, or it writes spaces in another way"
                )
        return int(counts.sum(dtype=np.int64))


def split_documents(tokens: Tokens, bos_id: int) -> list[Tokens]:
    """The documents of a stream, BOS included; tokens before the first BOS are one, too."""
    starts = np.flatnonzero(tokens == bos_id)
    parts = np.split(tokens, starts)
    return parts if len(parts[0]) else parts[1:]


def decoded(tokens: Tokens, tokenizer: Tokenizer) -> Iterator[tuple[Tokens, str]]:
    """The documents of a stream with their text."""
    documents = split_documents(tokens, tokenizer.bos_id)
    for first in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        batch = documents[first : first + _DOCUMENTS_AT_ONCE]
        yield from zip(batch, tokenizer.decode(batch), strict=True)


def check_texts(
    documents: Iterable[tuple[Tokens, str]], texts: Iterable[str], tokenizer: Tokenizer
) -> None:
    """Refuse documents that do not decode to the texts they were made from.

    Args:
        documents: tokens and what they decode to; one for each text.
        texts: as they were before the tokenizer normalized them.
    """
    for number, ((_, found), text) in enumerate(zip(documents, texts, strict=True)):
        expected = tokenizer.normalized([text])[0]
        if found != expected:
            same = takewhile(lambda pair: pair[0] == pair[1], zip(found, expected, strict=False))
            at = sum(1 for _ in same)
            raise DataError(
                f"{tokenizer.path}: validation document {number} does not come back from its "
                f"tokens: {expected[at : at + 20]!r} became {found[at : at + 20]!r}, so its bytes "
                "cannot be counted. Use a tokenizer that knows every character, as one with "
                "byte_fallback does"
            )
