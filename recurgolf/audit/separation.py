"""Documents that training and validation share: the same ones, and nearly the same ones.

Both sides are read as tokens of one tokenizer. Equal documents are found by a hash of all their
tokens. Nearly equal ones share shingles, runs of `SHINGLE` tokens: of every validation document
those with the smallest hashes are kept (bottom-k sketches; Broder 1997), and training is streamed
past them shard by shard, so that time grows with the length of the text and not with the number of
pairs, and memory with the validation set and one shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recurgolf.data.shards import Tokens, read_shard

SHINGLE = 8
"""Tokens per shingle: long enough that chance and set phrases share few."""
SKETCH = 64
"""Shingles kept of every validation document."""
NEAR = 0.7
"""Share of a validation document's shingles in one training document that makes them near."""
MIN_SHARED = 8
"""Shingles that must be shared at least; documents with fewer are compared as wholes alone."""
COMMON = 50
"""A shingle of more validation documents than this is a set phrase and says nothing."""

Hashes = NDArray[np.uint64]
_FILTER_BITS = 22


@dataclass
class Shared:
    """What was found.

    Attributes:
        exact: training documents equal to a validation document, as number in the stream ->
            number of the validation document.
        near: the same for near-duplicates that are not equal, with the share of the validation
            document's shingles that was found.
    """

    train_documents: int = 0
    val_documents: int = 0
    exact: dict[int, int] = field(default_factory=dict)
    near: dict[int, tuple[int, float]] = field(default_factory=dict)


def shared_documents(
    val_tokens: Tokens,
    train_shards: Iterable[Path],
    bos_id: int,
    progress: Callable[[int], None] = lambda shards: None,
) -> Shared:
    """Compare all training documents with all validation documents.

    Args:
        val_tokens: the validation stream; every document begins with BOS.
        train_shards: in the order of the stream; documents may straddle them.
        progress: called with the number of shards done.
    """
    sketch = Sketch(val_tokens, bos_id)
    found = Shared(val_documents=len(sketch.starts))
    for documents in _whole_documents(train_shards, bos_id, progress):
        sketch.compare(documents, found)
    return found


class Sketch:
    """The validation documents, ready to be looked up."""

    def __init__(self, tokens: Tokens, bos_id: int):
        self.bos_id = bos_id
        self.tokens = tokens
        self.starts = _starts(tokens, bos_id)
        whole = _whole_hashes(tokens, self.starts)
        self._whole_order = np.argsort(whole, kind="stable")
        self._whole = whole[self._whole_order]
        hashes, documents = _smallest(*_shingles(tokens, self.starts))
        values, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        telling = counts[inverse] <= COMMON
        order = np.argsort(hashes[telling], kind="stable")
        self._hashes = hashes[telling][order]
        self._documents = documents[telling][order]
        self._kept = np.bincount(documents[telling], minlength=len(self.starts))
        self._filter = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._filter[_low(values)] = True

    def compare(self, tokens: Tokens, found: Shared) -> None:
        """Add what the whole documents of `tokens` share with validation to `found`."""
        starts = _starts(tokens, self.bos_id)
        offset = found.train_documents
        found.train_documents += len(starts)
        for mine, theirs in self._equal(tokens, starts):
            found.exact[offset + mine] = theirs
        for mine, theirs, share in self._near(tokens, starts):
            if offset + mine not in found.exact:
                found.near[offset + mine] = (theirs, share)

    def _equal(self, tokens: Tokens, starts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        whole = _whole_hashes(tokens, starts)
        at = np.searchsorted(self._whole, whole)
        at[at == len(self._whole)] = 0
        for mine in np.flatnonzero(self._whole[at] == whole):
            theirs = int(self._whole_order[at[mine]])
            ours = _document(tokens, starts, int(mine))
            # A document without any text is in every set.
            if len(ours) > 1 and np.array_equal(ours, _document(self.tokens, self.starts, theirs)):
                yield int(mine), theirs

    def _near(self, tokens: Tokens, starts: NDArray[np.int64]) -> Iterator[tuple[int, int, float]]:
        hashes, documents = _shingles(tokens, starts)
        likely = self._filter[_low(hashes)]
        hashes, documents = hashes[likely], documents[likely]
        first = np.searchsorted(self._hashes, hashes, side="left")
        times = np.searchsorted(self._hashes, hashes, side="right") - first
        mine = np.repeat(documents, times)
        # Positions first, first + 1, ... of every hit.
        steps = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        hits = np.repeat(first, times) + steps
        # A shingle counts once per pair of documents, however often the text repeats it.
        pairs = np.unique(np.stack((mine, self._documents[hits], hits)), axis=1)
        both, shared = np.unique(pairs[:2], axis=1, return_counts=True)
        share = shared / np.maximum(self._kept[both[1]], 1)
        for place in np.flatnonzero((share >= NEAR) & (shared >= MIN_SHARED)):
            yield int(both[0, place]), int(both[1, place]), float(share[place])


def shingle_share(rows: Sequence[Tokens], val_tokens: Tokens, bos_id: int) -> list[float]:
    """Of every row of tokens, the share of its shingles that stand in validation."""
    if not len(rows):
        return []
    known = np.unique(_shingles(val_tokens, _starts(val_tokens, bos_id))[0])
    shares = []
    for row in rows:
        hashes = _shingles(row, _starts(row, bos_id))[0]
        shares.append(float(np.isin(hashes, known).mean()) if len(hashes) else 0.0)
    return shares


def _whole_documents(
    shards: Iterable[Path], bos_id: int, progress: Callable[[int], None]
) -> Iterator[Tokens]:
    """The stream in pieces of whole documents, about a shard each."""
    rest: Tokens = np.empty(0, dtype=np.uint16)
    for done, path in enumerate(shards, start=1):
        tokens = np.concatenate((rest, read_shard(path)))
        starts = np.flatnonzero(tokens == bos_id)
        cut = int(starts[-1]) if len(starts) else 0
        rest = tokens[cut:]
        if cut:
            yield tokens[:cut]
        progress(done)
    if len(rest):
        yield rest


def _starts(tokens: Tokens, bos_id: int) -> NDArray[np.int64]:
    """First position of every document; tokens before the first BOS are a document, too."""
    starts = np.flatnonzero(tokens == bos_id)
    if len(tokens) and (not len(starts) or starts[0] > 0):
        starts = np.concatenate(([0], starts))
    return starts.astype(np.int64)


def _document(tokens: Tokens, starts: NDArray[np.int64], number: int) -> Tokens:
    stop = starts[number + 1] if number + 1 < len(starts) else len(tokens)
    return tokens[starts[number] : stop]


def _mixed(values: Hashes) -> Hashes:
    """Every bit of the input spread over 64 (the finaliser of SplitMix64; Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _low(hashes: Hashes) -> NDArray[np.int64]:
    return (hashes & np.uint64((1 << _FILTER_BITS) - 1)).astype(np.int64)


def _whole_hashes(tokens: Tokens, starts: NDArray[np.int64]) -> Hashes:
    """One hash per document: the sum of the hashes of (token, place in the document)."""
    if not len(starts):
        return np.empty(0, dtype=np.uint64)
    lengths = np.diff(np.append(starts, len(tokens)))
    place = (np.arange(len(tokens)) - np.repeat(starts, lengths)).astype(np.uint64)
    parts = _mixed((place << np.uint64(16)) + tokens.astype(np.uint64) + np.uint64(1))
    return np.add.reduceat(parts, starts) + _mixed(lengths.astype(np.uint64))


def _shingles(tokens: Tokens, starts: NDArray[np.int64]) -> tuple[Hashes, NDArray[np.int64]]:
    """Hash and document of every shingle that lies inside one document, its BOS left out."""
    count = len(tokens) - SHINGLE + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE):
        hashes = _mixed(hashes + tokens[offset : offset + count].astype(np.uint64) + np.uint64(1))
    lengths = np.diff(np.append(starts, len(tokens)))
    documents = np.repeat(np.arange(len(starts)), lengths)
    inside = documents[:count] == documents[SHINGLE - 1 :]
    inside[starts[starts < count]] = False
    return hashes[inside], documents[:count][inside]


def _smallest(hashes: Hashes, documents: NDArray[np.int64]) -> tuple[Hashes, NDArray[np.int64]]:
    """Of every document the `SKETCH` smallest distinct hashes."""
    order = np.lexsort((hashes, documents))
    hashes, documents = hashes[order], documents[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (documents[1:] != documents[:-1])
    hashes, documents = hashes[new], documents[new]
    counts = np.bincount(documents) if len(documents) else np.empty(0, dtype=np.int64)
    rank = np.arange(len(hashes)) - np.repeat(np.cumsum(counts) - counts, counts)
    return hashes[rank < SKETCH], documents[rank < SKETCH]
