"""Protocols that read a text as one stream, in windows side by side or overlapping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from recurgolf.config import ConfigError, option
from recurgolf.eval.protocol import Eval, Window
from recurgolf.eval.text import Text
from recurgolf.limits import at_least


@option("eval", "plain")
@dataclass
class PlainEval(Eval):
    """Windows side by side, as the challenge's script scores them."""

    keep_tail: bool = False
    """Score the ragged rest too; the challenge's script drops it."""

    def windows(self, text: Text, seq_len: int) -> Iterator[Window]:
        whole = text.num_targets - text.num_targets % seq_len
        for start in range(0, whole, seq_len):
            yield Window(start, start, start + seq_len)
        if self.keep_tail and whole < text.num_targets:
            yield Window(whole, whole, text.num_targets)


@dataclass
class Overlapping(Eval):
    """Windows that overlap, so that every target has at least seq_len - stride tokens before it."""

    stride: Annotated[int | None, at_least(1)] = None
    """Targets scored per window behind the first; null: half a window, at twice the cost of plain
    (the challenge's records use 64 of 2,048)."""

    def check(self, num_targets: int, seq_len: int) -> None:
        super().check(num_targets, seq_len)
        if self.stride is not None and self.stride > seq_len:
            raise ConfigError(
                f"eval.stride={self.stride} is larger than the window eval.seq_len={seq_len}: "
                "targets between windows would never be scored"
            )

    def step(self, seq_len: int) -> int:
        """Targets scored per window of `seq_len` behind the first."""
        return self.stride or max(1, seq_len // 2)

    def overlapping(self, start: int, end: int, seq_len: int) -> Iterator[Window]:
        """Windows that score the targets `start` to `end - 1` once, reading nothing outside."""
        stride = self.step(seq_len)
        yield Window(start, start, min(start + seq_len, end))
        for first in range(start + seq_len, end, stride):
            yield Window(first - seq_len + stride, first, min(first + stride, end))

    def windows(self, text: Text, seq_len: int) -> Iterator[Window]:
        return self.overlapping(0, text.num_targets, seq_len)


@option("eval", "sliding")
@dataclass
class SlidingEval(Overlapping):
    """One stream in overlapping windows: every target once, the ragged tail included."""

    whole_windows: bool = False
    """Cut the text to whole training windows first, as the public systems do."""
    compat_rescore_tail: bool = False
    """Go on with ever shorter windows at the end, which score the last targets again, as
    universal_rank1 does."""
    compat_skip_head: bool = False
    """Never score the first seq_len - stride targets, nor those of the last window, as
    parallel_recurrent does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compat_rescore_tail and self.compat_skip_head:
            raise ConfigError(
                "eval.compat_rescore_tail and eval.compat_skip_head are of two different systems"
            )

    @property
    def repeats(self) -> bool:  # type: ignore[override]
        return self.compat_rescore_tail

    def windows(self, text: Text, seq_len: int) -> Iterator[Window]:
        end = text.num_targets
        if self.whole_windows:
            end -= end % seq_len
        stride = self.step(seq_len)
        if self.compat_skip_head:
            for start in range(0, end - seq_len, stride):
                yield Window(start, start + seq_len - stride, start + seq_len)
            return
        if self.compat_rescore_tail:
            yield Window(0, 0, min(seq_len, end))
            for start in range(stride, end, stride):
                stop = min(start + seq_len, end)
                yield Window(start, max(stop - stride, start), stop)
            return
        yield from self.overlapping(0, end, seq_len)
