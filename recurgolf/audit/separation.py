"""How much of the validation text stands in the training text, whole, in parts or with words left
out; and in the rows that the quantizer was calibrated on.

Both sides are tokens of one tokenizer. Every run of `SHINGLE` tokens is a shingle (Broder 1997).
Validation is cut into blocks of `BLOCK` tokens; a block has been seen in training where a good part
of its shingles stands together in one place there. So documents need not be whole, and need not be
documents: halves, thirds, pieces in the middle of other text and text with every tenth token left
out are found as well, while set phrases, which share a shingle here and there, are not.

Training is streamed past the validation shingles shard by shard: time grows with the length of the
text, memory with the validation set and one shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recurgolf.data.shards import Tokens, read_shard

SHINGLE = 8
"""Tokens of a shingle: a tenth of all tokens dropped leaves two in five of them whole."""
BLOCK = 128
"""Tokens of validation text that are judged together."""
SEEN = 0.3
"""Share of a block's shingles in one place of training that makes it seen."""
COMMON = 8
"""A shingle that validation itself has more often is a set phrase and says nothing."""
MOST = 1 << 23
"""Shingles that are kept of a validation text; of a longer one a random part, in longer blocks."""
_FILTER_BITS = 24

Hashes = NDArray[np.uint64]


@dataclass
class Overlap:
    """What was found.

    Attributes:
        seen: of every validation token, whether it lies in a block that was seen.
        examples: (block of validation, token of training near which it stands).
        train_tokens: tokens looked at.
        whole: documents of validation that are documents of training, too.
    """

    seen: NDArray[np.bool_]
    examples: list[tuple[int, int]]
    train_tokens: int = 0
    whole: int = 0


class Sketch:
    """The shingles of a validation text, ready to be looked up."""

    def __init__(self, tokens: Tokens, bos_id: int):
        hashes, places = _shingles(np.asarray(tokens), bos_id)
        # Of a long text a part of the shingles, chosen by their hashes: the same part everywhere.
        self.part = -(-max(len(tokens), 1) // MOST)
        self.block = BLOCK * self.part
        hashes, places = self._thinned(hashes, places)
        values, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        telling = counts[inverse] <= COMMON
        order = np.argsort(hashes[telling], kind="stable")
        self._hashes, self._places = hashes[telling][order], places[telling][order]
        blocks = -(-len(tokens) // self.block)
        self._size = np.bincount(self._places // self.block, minlength=blocks)
        self._filter = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._filter[_low(values)] = True
        self.bos_id = bos_id
        self._whole = np.unique(_documents(np.asarray(tokens), bos_id))
        self.overlap = Overlap(np.zeros(len(tokens), dtype=bool), [])

    def compare(self, tokens: Tokens) -> None:
        """Mark the blocks of validation that stand in a piece of other text."""
        offset = self.overlap.train_tokens
        self.overlap.train_tokens += len(tokens)
        ours = np.unique(_documents(np.asarray(tokens), self.bos_id))
        self.overlap.whole += int(np.isin(ours, self._whole).sum())
        hashes, places = self._thinned(*_shingles(np.asarray(tokens), self.bos_id))
        likely = self._filter[_low(hashes)]
        hashes, places = hashes[likely], places[likely]
        first = np.searchsorted(self._hashes, hashes, side="left")
        times = np.searchsorted(self._hashes, hashes, side="right") - first
        there = np.repeat(places, times)
        # Positions first, first + 1, ... of every hit.
        steps = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        here = self._places[np.repeat(first, times) + steps]
        block = here // self.block
        # Two grids of places, half a cell apart: what lies together lies in one cell of one grid.
        for shift in (0, self.block):
            cell = (there + shift) // (2 * self.block)
            triples = np.unique(np.stack((block, cell, here)), axis=1)
            pairs, count = np.unique(triples[:2], axis=1, return_counts=True)
            enough = count >= np.maximum(SEEN * self._size[pairs[0]], 4)
            for number, where in pairs[:, enough].T.tolist():
                start = number * self.block
                if not self.overlap.seen[start]:
                    self.overlap.examples.append((number, offset + where * 2 * self.block))
                self.overlap.seen[start : start + self.block] = True

    def _thinned(
        self, hashes: Hashes, places: NDArray[np.int64]
    ) -> tuple[Hashes, NDArray[np.int64]]:
        if self.part == 1:
            return hashes, places
        kept = (hashes >> np.uint64(40)) % np.uint64(self.part) == 0
        return hashes[kept], places[kept]


def overlap_with_training(val_tokens: Tokens, train_shards: Iterable[Path], bos_id: int) -> Overlap:
    """Compare all training text with all validation text."""
    sketch = Sketch(val_tokens, bos_id)
    for path in train_shards:
        tokens = read_shard(path)
        # Cut anywhere: a block that straddles two pieces is found by the half that is larger.
        for start in range(0, len(tokens), 1 << 22):
            sketch.compare(tokens[start : start + (1 << 22) + 2 * BLOCK])
    return sketch.overlap


def overlap_with_rows(rows: Sequence[Tokens], val_tokens: Tokens, bos_id: int) -> int:
    """How many rows of tokens stand in validation, in whole or in a good part."""
    found = 0
    for row in rows:
        sketch = Sketch(np.asarray(row), bos_id)
        sketch.compare(val_tokens)
        found += bool(sketch.overlap.seen.any())
    return found


def _mixed(values: Hashes) -> Hashes:
    """Every bit of the input spread over 64 (the finaliser of SplitMix64; Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _low(hashes: Hashes) -> NDArray[np.int64]:
    return (hashes & np.uint64((1 << _FILTER_BITS) - 1)).astype(np.int64)


def _documents(tokens: Tokens, bos_id: int) -> Hashes:
    """A hash of every document that begins in `tokens` and is no shorter than a shingle: the sum of
    the hashes of (token, place in the document)."""
    starts = np.flatnonzero(tokens == bos_id)
    if not len(starts):
        return np.empty(0, dtype=np.uint64)
    lengths = np.diff(np.append(starts, len(tokens)))
    own = tokens[starts[0] :]
    place = (np.arange(starts[0], len(tokens)) - np.repeat(starts, lengths)).astype(np.uint64)
    parts = _mixed((place << np.uint64(16)) + own.astype(np.uint64) + np.uint64(1))
    hashes = np.add.reduceat(parts, starts - starts[0]) + _mixed(lengths.astype(np.uint64))
    return hashes[lengths >= SHINGLE]


def _shingles(tokens: Tokens, bos_id: int) -> tuple[Hashes, NDArray[np.int64]]:
    """Hash and first token of every shingle without a BOS in it."""
    count = len(tokens) - SHINGLE + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE):
        hashes = _mixed(hashes + tokens[offset : offset + count].astype(np.uint64) + np.uint64(1))
    begins = np.cumsum(np.concatenate(([0], tokens == bos_id)))
    inside = begins[SHINGLE:] == begins[:count]
    return hashes[inside], np.flatnonzero(inside)
