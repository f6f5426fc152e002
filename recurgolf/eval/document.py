"""Every document by itself: nothing of another one is seen, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from recurgolf.config import ConfigError, option
from recurgolf.eval.protocol import Window
from recurgolf.eval.text import Text
from recurgolf.eval.windows import Overlapping

ROOM = 512
"""Tokens of short documents read together at least; attention masks grow with its square."""


@option("eval", "document")
@dataclass
class DocumentEval(Overlapping):
    """No attention, smear gate, bigram or memory crosses the start of a document.

    Every target once: a document's tokens behind BOS and the BOS that ends it. A document longer
    than a window is read in overlapping windows, each with only itself; shorter ones that stand
    side by side are read together, behind masks, without padding.
    """

    within_documents: ClassVar[bool] = True

    def check(self, num_targets: int, seq_len: int) -> None:
        """Refuse a stride beyond the window; the text may well be shorter than one."""
        if num_targets < 1:
            raise ConfigError("validation has no target to score: at least 2 tokens are needed")
        super().check(max(num_targets, seq_len), seq_len)

    def windows(self, text: Text, seq_len: int) -> Iterator[Window]:
        if text.bos is None:
            raise ConfigError("eval=document: this text has no token that begins a document")
        room = max(seq_len, ROOM)
        begun = 0  # of the short documents that are read together next
        ends = [*text.starts[1:].tolist(), text.num_targets]
        start = 0
        for end in ends:
            if end - begun > room and begun < start:
                yield Window(begun, begun, start)
                begun = start
            if end - start > seq_len:
                if begun < start:
                    yield Window(begun, begun, start)
                yield from self.overlapping(start, end, seq_len)
                begun = end
            start = end
        if begun < text.num_targets:
            yield Window(begun, begun, text.num_targets)
