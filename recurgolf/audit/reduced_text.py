"""A short stretch of validation text, and a protocol in proportion to it.

The audit runs a protocol dozens of times on changed text, so the stretch has to be short and still
hold several documents, windows and chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from recurgolf.config import ConfigError
from recurgolf.eval import Eval, ScoreAccumulator, ScoredModel, Text

LENGTH = 48
"""Tokens of a window in the audit; a shorter training length is kept."""
WINDOWS = 5
"""Windows that a stretch is long."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A protocol, a model and a stretch: `scored(tokens)` runs it on changed tokens.

    Attributes:
        protocol: in proportion to the stretch.
        scored_model: with the windows' length as its own.
        text: the stretch, unchanged.
    """

    protocol: Eval
    scored_model: ScoredModel
    text: Text

    @torch.no_grad()
    def scored(self, tokens: np.ndarray) -> ScoreAccumulator:
        """The accumulator of a stretch of the same or another length, with what every target cost.

        A target that is scored again is counted, not refused.
        """
        text = dataclasses.replace(self.text, tokens=tokens)
        accumulator = ScoreAccumulator(text, per_target=True, repeats=True)
        self.protocol.run(self.scored_model, text, accumulator)
        return accumulator

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.protocol.seq_len or self.scored_model.seq_len

    def edges(self) -> list[int]:
        """Targets at which a window scores its first one or a chunk begins, ascending."""
        found = {0}
        try:
            found |= {w.first for w in self.protocol.windows(self.text, self.length)}
        except NotImplementedError:
            found |= {int(start) for start in self.text.starts}
        for size in chunk_sizes(self.protocol):
            found |= set(range(0, self.text.num_targets, size))
            for start in self.text.starts:
                found |= set(range(int(start), self.text.num_targets, size))
        return sorted(edge for edge in found if edge < self.text.num_targets)


def trial(protocol: Eval, scored_model: ScoredModel, text: Text, length: int = LENGTH) -> Trial:
    """Cut text and protocol down to windows of `length` tokens, or the model's if shorter."""
    before = protocol.seq_len or scored_model.seq_len
    length = min(length, before)
    small = dataclasses.replace(scored_model, seq_len=length)
    cut = Text(short(text, length), text.byte_count, bos=text.bos)
    reduced = in_proportion(protocol.alone, length / before, length)
    # Documents of the stretch are few; a protocol may want more of them than there are.
    if getattr(reduced, "phases", 0) > cut.num_documents:
        reduced = dataclasses.replace(reduced, phases=cut.num_documents)  # type: ignore[call-arg]
    reduced.check(cut.num_targets, length)
    return Trial(reduced, small, cut)


def short(text: Text, length: int) -> np.ndarray:
    """The beginnings of the first documents, one after the other, `WINDOWS` windows long.

    Raises:
        ConfigError: the text is shorter than that.
    """
    wanted, parts, held = WINDOWS * length + length // 3, [], 0
    starts = [*text.starts[: 64 * WINDOWS].tolist(), text.num_targets + 1]
    # A document gets a window and a half at most, so that the stretch crosses into others.
    share = length + length // 2 if len(starts) > WINDOWS else wanted + 1
    for start, stop in pairwise(starts):
        part = np.asarray(text.tokens[start : min(stop, start + share)])
        parts.append(part)
        held += len(part)
        if held > wanted:
            break
    tokens = np.concatenate(parts)[: wanted + 1]
    if len(tokens) <= 2 * length:
        raise ConfigError(
            f"the audit needs {2 * length} tokens of validation text at least, not {len(tokens)}"
        )
    return tokens


def in_proportion(option: Any, factor: float, length: int) -> Any:
    """A protocol's settings for windows of `length`, which is `factor` times what they were."""
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(option):
        value = getattr(option, item.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes[item.name] = in_proportion(value, factor, length)
        elif item.name == "seq_len" and value is not None:
            changes[item.name] = length
        elif item.name == "stride" and isinstance(value, int):
            changes[item.name] = min(max(1, round(value * factor)), length)
        elif item.name.endswith("chunk_tokens") and isinstance(value, int):
            # Several chunks in the stretch, even where one is longer than many windows.
            scaled = max(1, round(value * factor))
            changes[item.name] = length if scaled >= length else scaled
    return dataclasses.replace(option, **changes)


def chunk_sizes(option: Any) -> Iterator[int]:
    """Every chunk length among a protocol's settings."""
    for item in dataclasses.fields(option):
        value = getattr(option, item.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from chunk_sizes(value)
        elif item.name.endswith("chunk_tokens") and isinstance(value, int):
            yield value
