"""What happens in front of the first block: token embedding and its optional additions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurgolf.config import Checked
from recurgolf.limits import at_least
from recurgolf.model.linear import Embedding, Linear


@dataclass
class BigramConfig(Checked):
    """Hashed pair embedding added to the token embedding; off while rows is 0."""

    rows: Annotated[int, at_least(0)] = 0
    """Buckets of the hash table; the last one stands for the first position."""
    dim: Annotated[int, at_least(1)] = 128
    """Width of the table, projected to the model's where it differs."""
    scale: float = 0.05
    """Start of the learned factor."""


@dataclass
class ValueEmbedConfig(Checked):
    """Token embedding added to the attention values at chosen visits; off while dim is 0."""

    dim: Annotated[int, at_least(0)] = 0
    """Width of the table, projected to the values' where it differs."""
    scale: float = 0.1
    """Start of the learned factor."""
    visits: Annotated[list[int], at_least(0)] = field(default_factory=list)
    """Positions in the full visit list at which the values receive it."""


def starts(documents: Tensor) -> Tensor:
    """Whether a position is the first of its document; numbers [batch, length] -> bools."""
    return F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)


class BigramHash(nn.Module):
    """An embedding of (previous token, token) through a hash into `rows` buckets."""

    def __init__(self, config: BigramConfig, dim: int):
        super().__init__()
        self.embed = Embedding(config.rows, config.dim)
        self.proj = Linear(config.dim, dim) if config.dim != dim else None
        self.scale = nn.Parameter(torch.tensor(config.scale))

    def bucket(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """[batch, length] token ids -> bucket ids (XOR of two products, in int32 as published).

        With document numbers given, a document's first token has nothing before it either.
        """
        last = self.embed.num_embeddings - 1
        # int32, where the products may wrap: other widths hash to other buckets than published.
        ids = tokens.to(torch.int32)
        mixed = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % last
        buckets = F.pad(mixed, (1, 0), value=last).long()
        return buckets if documents is None else buckets.masked_fill(starts(documents), last)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        vectors = self.embed(self.bucket(tokens, documents))
        if self.proj is not None:
            vectors = self.proj(vectors)
        return vectors * self.scale.to(vectors.dtype)


class Smear(nn.Module):
    """`(1 - g) x_t + g x_(t-1)` per channel, g = sigmoid(gate); nothing precedes position 0.

    With document numbers given, nothing is carried over a document's start.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        gate = torch.sigmoid(self.gate).to(x.dtype)
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))  # (B, T, D), shifted by one position
        if documents is not None:
            previous = previous.masked_fill(starts(documents)[..., None], 0)
        return (1 - gate) * x + gate * previous


class ValueEmbed(nn.Module):
    """One shared table, brought to the width of the values, with a gain per receiving visit."""

    def __init__(self, config: ValueEmbedConfig, vocab_size: int, kv_dim: int):
        super().__init__()
        self.embed = Embedding(vocab_size, config.dim)
        self.proj = Linear(config.dim, kv_dim) if config.dim != kv_dim else None
        self.scale = nn.Parameter(torch.tensor(config.scale))
        self.visit_scale = nn.Parameter(torch.ones(len(config.visits)))
        self.rows = {visit: row for row, visit in enumerate(config.visits)}

    def forward(self, tokens: Tensor) -> Mapping[int, Tensor]:
        """[batch, length] token ids -> position in the visit list -> [batch, length, kv_dim]."""
        vectors = self.embed(tokens)
        if self.proj is not None:
            vectors = self.proj(vectors)
        vectors = vectors * self.scale.to(vectors.dtype)
        scales = self.visit_scale.to(vectors.dtype)
        return {visit: vectors * scales[row] for visit, row in self.rows.items()}
