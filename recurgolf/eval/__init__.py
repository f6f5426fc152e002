"""Scoring protocols. A protocol says which windows are read and which targets each one scores.

`Eval.windows(targets)` is the whole difference between protocols; `score` runs them. The model is
a callable: token ids [b, t] and the first position to read out -> logits [b, t - first, v].
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recurgolf.config import ConfigError, option


class Window(NamedTuple):
    """Inputs `start` to `stop - 1` (as positions of the token stream); scored are the targets that
    follow inputs `first` to `stop - 1`."""

    start: int
    first: int
    stop: int


class Scorable(Protocol):
    """What a protocol reads of a data set."""

    def count(self, targets: Tensor, previous: Tensor) -> Tensor: ...


@dataclass
class Score:
    """The sums of one evaluation, and the figures that follow from them.

    Attributes:
        nats: sum of the negative log-likelihoods.
        tokens, bytes: targets scored and the bytes they stand for (by the token table).
        seconds: wall time.
    """

    nats: float
    tokens: int
    bytes: int
    seconds: float

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
        }


@dataclass
class Eval:
    """A protocol for scoring validation text."""

    seq_len: int | None = None
    """Tokens per window; null: the training length."""
    batch_tokens: int = 16384
    """Tokens forwarded at once; changes speed and memory, not the score."""
    passes: int | None = None
    """Passes of the looped band when scoring; null: as looping says."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_tokens", "passes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"eval.{name}={value}: at least 1")

    def windows(self, num_targets: int, seq_len: int) -> Iterator[Window]:
        """The windows over a stream of `num_targets` + 1 tokens, in order."""
        raise NotImplementedError

    def check(self, num_targets: int, seq_len: int) -> None:
        """Refuse a text shorter than one window."""
        if num_targets < seq_len:
            raise ConfigError(
                f"validation has {num_targets + 1:,} tokens, less than one window of "
                f"eval.seq_len={seq_len} + 1"
            )


@option("eval", "plain")
@dataclass
class PlainEval(Eval):
    """Windows side by side, as the challenge's script scores them."""

    keep_tail: bool = False
    """Score the ragged rest too; the challenge's script drops it."""

    def windows(self, num_targets: int, seq_len: int) -> Iterator[Window]:
        whole = num_targets - num_targets % seq_len
        for start in range(0, whole, seq_len):
            yield Window(start, start, start + seq_len)
        if self.keep_tail and whole < num_targets:
            yield Window(whole, whole, num_targets)


@option("eval", "sliding")
@dataclass
class SlidingEval(Eval):
    """Overlapping windows: every target once, with at least seq_len - stride tokens before it."""

    stride: int | None = None
    """Targets scored per window behind the first; null: half a window, at twice the cost of plain
    (the challenge's records use 64 of 2,048)."""
    whole_windows: bool = False
    """Cut the text to whole training windows first, as the public systems do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride is not None and self.stride < 1:
            raise ConfigError(f"eval.stride={self.stride}: at least 1")

    def check(self, num_targets: int, seq_len: int) -> None:
        super().check(num_targets, seq_len)
        if self.stride is not None and self.stride > seq_len:
            raise ConfigError(
                f"eval.stride={self.stride} is larger than the window eval.seq_len={seq_len}: "
                "targets between windows would never be scored"
            )

    def windows(self, num_targets: int, seq_len: int) -> Iterator[Window]:
        if self.whole_windows:
            num_targets -= num_targets % seq_len
        stride = self.stride or max(1, seq_len // 2)
        yield Window(0, 0, min(seq_len, num_targets))
        for first in range(seq_len, num_targets, stride):
            yield Window(first - seq_len + stride, first, min(first + stride, num_targets))


Logits = Callable[[Tensor, int], Tensor]
"""(token ids [b, t], first position) -> logits [b, t - first, v]."""


@torch.no_grad()
def score(
    logits: Logits,
    protocol: Eval,
    tokens: np.ndarray,
    byte_count: Scorable,
    *,
    seq_len: int,
    sidecar: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """This rank's share of the score; add up nats, tokens and bytes over ranks.

    Args:
        tokens: the validation stream, uint16 [n].
        seq_len: length of a window where the protocol does not say.
        sidecar: bytes of every token [n] as its exporter counted them; they then count instead.
        progress: called with (windows done, windows in all).
    """
    began = time.perf_counter()
    length = protocol.seq_len or seq_len
    protocol.check(len(tokens) - 1, length)
    windows = list(protocol.windows(len(tokens) - 1, length))
    share = windows[len(windows) * rank // world_size : len(windows) * (rank + 1) // world_size]
    nats, num_tokens, num_bytes, done = 0.0, 0, 0, 0
    for batch in _batches(share, max(1, protocol.batch_tokens // length)):
        first = batch[0].first - batch[0].start
        spans = [tokens[w.start : w.stop + 1].astype(np.int64) for w in batch]
        ids = torch.from_numpy(np.stack(spans)).to(device)
        targets, previous = ids[:, first + 1 :], ids[:, first:-1]
        scores = logits(ids[:, :-1], first).float()
        losses = F.cross_entropy(
            scores.reshape(-1, scores.shape[-1]), targets.reshape(-1), reduction="none"
        )
        nats += losses.double().sum().item()
        num_tokens += targets.numel()
        if sidecar is None:
            num_bytes += int(byte_count.count(targets, previous).sum())
        else:
            num_bytes += sum(int(sidecar[w.first + 1 : w.stop + 1].sum()) for w in batch)
        done += len(batch)
        if progress is not None:
            progress(done, len(share))
    return Score(nats, num_tokens, num_bytes, time.perf_counter() - began)


def _batches(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """Runs of up to `size` windows of one shape."""
    batch: list[Window] = []
    for window in windows:
        if batch and (len(batch) == size or _shape(window) != _shape(batch[0])):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _shape(window: Window) -> tuple[int, int]:
    return window.stop - window.start, window.first - window.start
