"""The divisor of bits per byte: how many bytes of text each target token stands for.

The challenge's table: a byte piece counts 1; a text piece the UTF-8 length of its text without a
leading space sign, and that space counts 1 unless the token before it is a special one (a document
does not begin with a space); special pieces count 0. Over whole documents the sum is the UTF-8
length of the decoded text, which `check` proves on the validation tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
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
            a leading space behind them is not counted.
    """

    base_bytes: Tensor
    has_leading_space: Tensor
    is_boundary: Tensor

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
        is_boundary = np.ones(size, dtype=bool)
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
        return cls(*map(torch.from_numpy, (base_bytes, has_leading_space, is_boundary)))

    def to(self, device: torch.device | str) -> ByteCount:
        """The same table on another device."""
        return ByteCount(
            self.base_bytes.to(device),
            self.has_leading_space.to(device),
            self.is_boundary.to(device),
        )

    def count(self, targets: Tensor, previous: Tensor) -> Tensor:
        """Bytes of each target.

        Args:
            targets: int64 ids of any shape, on the table's device.
            previous: the token before each target (the model's input at that position), same shape.

        Returns:
            int64, same shape. Its sum is the divisor of bits per byte.
        """
        spaces = self.has_leading_space[targets] & ~self.is_boundary[previous]
        return self.base_bytes[targets].to(torch.int64) + spaces

    def total(self, tokens: Tokens) -> int:
        """Bytes of a stream of tokens, its first one taken as the beginning of a document."""
        total = int(self.base_bytes[tokens[:1].astype(np.int64)].sum())
        for first in range(0, len(tokens) - 1, _TOKENS_AT_ONCE):
            ids = torch.from_numpy(tokens[first : first + _TOKENS_AT_ONCE + 1].astype(np.int64))
            total += int(self.count(ids[1:], ids[:-1]).sum())
        return total

    def check(self, tokens: Tokens, tokenizer: Tokenizer) -> int:
        """Refuse a table whose total differs from the UTF-8 length of the decoded documents.

        Args:
            tokens: whole documents, each beginning with BOS.

        Returns:
            The total in bytes.
        """
        total, decoded = self.total(tokens), decoded_bytes(tokens, tokenizer)
        if total != decoded:
            raise DataError(
                f"{tokenizer.path}: the byte table counts {total} bytes for the validation tokens, "
                f"but their decoded text has {decoded}: the tokens are not whole documents of this "
                "tokenizer, or it writes spaces in another way"
            )
        return total


def split_documents(tokens: Tokens, bos_id: int) -> list[Tokens]:
    """The documents of a stream, BOS included; tokens before the first BOS are one, too."""
    starts = np.flatnonzero(tokens == bos_id)
    parts = np.split(tokens, starts)
    return parts if len(parts[0]) else parts[1:]


def decoded_bytes(tokens: Tokens, tokenizer: Tokenizer) -> int:
    """UTF-8 length of the text that the documents of a stream decode to."""
    documents = split_documents(tokens, tokenizer.bos_id)
    total = 0
    for first in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        texts = tokenizer.decode(documents[first : first + _DOCUMENTS_AT_ONCE])
        total += sum(len(text.encode()) for text in texts)
    return total
