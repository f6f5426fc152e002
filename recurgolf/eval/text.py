"""What is scored and what comes out: a Text, the ScoreAccumulator of its targets, their Score.

Target i of a text is its token i + 1, predicted from tokens 0 to i. It belongs to the document of
token i: a document is charged for its tokens behind BOS and for the BOS that ends it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from recurgolf.config import ConfigError

_TOKENS_AT_ONCE = 1 << 20


class ByteTable(Protocol):
    """What a text asks of a table of bytes (data.byte_count.ByteCount)."""

    def count(self, targets: Tensor, previous: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Text:
    """Validation text.

    Attributes:
        tokens: uint16 [n], perhaps memory-mapped.
        byte_count: bytes of a target given the token before it.
        sidecar: bytes of every token [n] as its exporter counted them; they then count instead.
        bos: token that begins a document; None: the text is one document.
    """

    tokens: np.ndarray
    byte_count: ByteTable
    sidecar: np.ndarray | None = None
    bos: int | None = None

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - 1

    @cached_property
    def starts(self) -> np.ndarray:
        """First token of every document, ascending; the first of all is 0."""
        found = [np.zeros(1, dtype=np.int64)]
        for place in range(0, self.num_targets if self.bos is not None else 0, _TOKENS_AT_ONCE):
            part = self.tokens[place : min(place + _TOKENS_AT_ONCE, self.num_targets)]
            found.append(np.flatnonzero(part == self.bos) + place)
        return np.unique(np.concatenate(found))

    @property
    def num_documents(self) -> int:
        return len(self.starts)

    def document_of(self, targets: Any) -> Any:
        """Number of the document that a target (or an array of them) belongs to."""
        return np.searchsorted(self.starts, targets, side="right") - 1

    def ids(self, start: int, stop: int) -> Tensor:
        """Tokens `start` to `stop - 1`, int64."""
        return torch.from_numpy(self.tokens[start:stop].astype(np.int64))

    def bytes_of(self, first: int, stop: int) -> np.ndarray:
        """Bytes that each of the targets `first` to `stop - 1` counts for, int64."""
        if self.sidecar is not None:
            return self.sidecar[first + 1 : stop + 1].astype(np.int64)
        ids = self.ids(first, stop + 1)
        return self.byte_count.count(ids[1:], ids[:-1]).numpy()


class ScoreAccumulator:
    """Where a protocol puts what it has scored; the sums are per document and in float64.

    Its size is that of the documents, whatever the length of the text.

    Attributes:
        nats, tokens, bytes: sums per document [num_documents].
        means: further quantities summed over targets, by name; reported per target.
        variants: accumulators of what the protocol measured besides, by name.

    Args:
        repeats: allow a target to be scored again, as some public scripts do.
    """

    def __init__(self, text: Text, *, repeats: bool = False):
        self.text, self.repeats = text, repeats
        self.nats = np.zeros(text.num_documents)
        self.tokens = np.zeros(text.num_documents, dtype=np.int64)
        self.bytes = np.zeros(text.num_documents, dtype=np.int64)
        self.means: dict[str, float] = {}
        self.variants: dict[str, ScoreAccumulator] = {}
        # Targets scored so far as disjoint ranges that do not touch: a handful at any time.
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, first_target: int, nats: Tensor) -> None:
        """Enter the nats [k] of the targets `first_target` to `first_target + k - 1`.

        Raises:
            ConfigError: targets outside the text, or scored before (a protocol that does either
                has no score).
        """
        count = nats.numel()
        first, stop = first_target, first_target + count
        if not count:
            return
        if first < 0 or stop > self.text.num_targets:
            raise ConfigError(
                f"targets {first} to {stop - 1} scored, but there are {self.text.num_targets}"
            )
        if not self.repeats:
            self._cover(first, stop)
        values = nats.detach().cpu().double().numpy().reshape(-1)
        starts = self.text.starts
        document = int(self.text.document_of(first))
        inner = starts[document + 1 : np.searchsorted(starts, stop)]
        cuts = np.concatenate(([first], inner)) - first
        rows = slice(document, document + len(cuts))
        self.nats[rows] += np.add.reduceat(values, cuts)
        self.tokens[rows] += np.diff(cuts, append=count)
        self.bytes[rows] += np.add.reduceat(self.text.bytes_of(first, stop), cuts)

    def add_mean(self, name: str, values: Tensor) -> None:
        """Add a quantity of targets just scored, to be reported as its mean over all targets."""
        self.means[name] = self.means.get(name, 0.0) + values.double().sum().item()

    def variant(self, name: str) -> ScoreAccumulator:
        """The accumulator of the same targets measured in another way."""
        if name not in self.variants:
            self.variants[name] = type(self)(self.text, repeats=self.repeats)
        return self.variants[name]

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Add up over ranks, in float64; every rank then has the whole."""
        parts = [self.nats, self.tokens, self.bytes]
        names = sorted(self.means)
        sums = np.concatenate([*parts, [self.means[name] for name in names]])
        whole = all_reduce(torch.from_numpy(sums)).cpu().numpy()
        place = 0
        for part in parts:
            part[:] = whole[place : place + len(part)]
            place += len(part)
        self.means = dict(zip(names, whole[place:].tolist(), strict=True))
        for name in sorted(self.variants):
            self.variants[name].reduce(all_reduce)

    def _cover(self, first: int, stop: int) -> None:
        place = bisect_right(self._starts, first)
        before = self._stops[place - 1] if place else -1
        after = self._starts[place] if place < len(self._starts) else self.text.num_targets
        if before > first or after < stop:
            again = first if before > first else after
            raise ConfigError(f"target {again} was scored twice")
        joins_before, joins_after = before == first, place < len(self._starts) and after == stop
        if joins_before and joins_after:
            self._stops[place - 1] = self._stops.pop(place)
            del self._starts[place]
        elif joins_before:
            self._stops[place - 1] = stop
        elif joins_after:
            self._starts[place] = first
        else:
            self._starts.insert(place, first)
            self._stops.insert(place, stop)


@dataclass
class Score:
    """The sums of one evaluation, and the figures that follow from them.

    Attributes:
        nats: sum of the negative log-likelihoods.
        tokens, bytes: targets scored and the bytes they stand for.
        seconds: wall time.
        means: further figures per target, as a protocol names them (passes used, say).
        variants: what the protocol measured besides, by name.
        accumulator: the sums per document.
    """

    nats: float
    tokens: int
    bytes: int
    seconds: float
    means: dict[str, float] = field(default_factory=dict)
    variants: dict[str, Score] = field(default_factory=dict)
    accumulator: ScoreAccumulator | None = None

    @classmethod
    def of(cls, accumulator: ScoreAccumulator, seconds: float) -> Score:
        """The score of a finished accumulator.

        Raises:
            ConfigError: no target, or none that stands for a byte.
        """
        tokens, num_bytes = int(accumulator.tokens.sum()), int(accumulator.bytes.sum())
        if not num_bytes:
            raise ConfigError(f"{tokens} targets scored, {num_bytes} bytes of text: no score")
        means = {name: total / tokens for name, total in accumulator.means.items()}
        variants = {name: cls.of(own, seconds) for name, own in accumulator.variants.items()}
        return cls(
            math.fsum(accumulator.nats), tokens, num_bytes, seconds, means, variants, accumulator
        )

    @property
    def val_loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def val_bpb(self) -> float:
        """Bits per byte: the sum of nats / (ln 2 x bytes)."""
        return self.nats / (math.log(2) * self.bytes)

    def to_dict(self) -> dict[str, float]:
        """The entry of this protocol in summary.json's `evals`."""
        return {
            "val_bpb": self.val_bpb,
            "val_loss": self.val_loss,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            **self.means,
        }
