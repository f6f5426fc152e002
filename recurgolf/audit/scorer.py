"""A protocol and its model as the audit sees them: a box that turns tokens into nats per target.

Every trial goes through `eval.score`, the very function that the score came from, with the
protocol object, the lengths, batches and depths of the score and a text of the same length. What a
protocol puts into its accumulator is noted by a subclass that has the same fields. A protocol that
told this from its scoring all the same would have to give itself away: the untouched text is scored
in the same way, and that must give the figure of score.py, which runs in a process without any of
this.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from recurgolf.eval import Eval, ScoreAccumulator, ScoredModel, Text, score
from recurgolf.eval.windows import Overlapping

MOST_EDGES = 4096
"""Edges that are kept of a long text, chosen at random."""
ROWS = 32
"""Windows that are read together for bets."""


@dataclass(frozen=True)
class Hints:
    """What a protocol says of itself; it decides where the audit looks besides random places.

    Attributes:
        length: tokens of a window.
        stride: targets scored per window.
        within_documents: whether nothing crosses the start of a document.
        vocab_size: tokens that the text may have.
        edges: targets at which windows, chunks or documents begin, ascending.
    """

    length: int
    stride: int
    within_documents: bool
    vocab_size: int
    edges: list[int]


@dataclass(frozen=True)
class Scored:
    """One scoring of a text.

    Attributes:
        nats: of every target [n], the last that were entered.
        times: how often every target was entered [n].
        turn: number of the `add` that entered it last, from 1 on [n].
        entry: val_bpb, val_loss, tokens, bytes, seconds.
        error: why there is no score; the arrays are then empty.
    """

    nats: np.ndarray
    times: np.ndarray
    turn: np.ndarray
    entry: dict[str, float] = field(default_factory=dict)
    error: str = ""


class Scorer(Protocol):
    """Scores texts by one protocol."""

    hints: Hints

    def score(self, tokens: np.ndarray) -> Scored:
        """Score a text as long as the real one."""
        ...

    def guess(self, tokens: np.ndarray, starts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """The bare model's shares [w, k, v] behind tokens `starts[i] + offsets[i, j]`, read from
        `starts[i]` on: good bets, nothing more."""
        ...


@dataclass
class Trials:
    """One protocol under trial.

    Attributes:
        tokens: the real text.
        bos: token that begins a document, None where there is none.
        plain: the real text's scoring.
        witness: another text that the tokenizer may have made, and its scoring.
        scorings: how many have been made.
    """

    scorer: Scorer
    tokens: np.ndarray
    bos: int | None
    chance: np.random.Generator
    plain: Scored = field(init=False)
    witness: tuple[np.ndarray, Scored] | None = None
    scorings: int = 0

    def __post_init__(self) -> None:
        self.plain = self.scored(self.tokens)

    def scored(self, tokens: np.ndarray) -> Scored:
        self.scorings += 1
        return self.scorer.score(tokens)

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - 1

    def changed(self, first: int, stop: int) -> np.ndarray:
        """The text with tokens `first` to `stop` - 1 replaced; documents begin where they did."""
        tokens = np.array(self.tokens)
        tokens[first:stop] = self.replaced(tokens[first:stop])
        return tokens

    def replaced(self, part: np.ndarray) -> np.ndarray:
        """Other tokens of the text in the place of these; BOS stays."""
        ordinary = self.ordinary
        drawn = self.chance.choice(ordinary, size=len(part))
        same = drawn == part
        drawn[same] = ordinary[(np.searchsorted(ordinary, part[same]) + 1) % len(ordinary)]
        return drawn if self.bos is None else np.where(part == self.bos, part, drawn)

    @property
    def ordinary(self) -> np.ndarray:
        """Tokens that the text has, BOS left out."""
        found = np.unique(self.tokens)
        return found if self.bos is None else found[found != self.bos]


class Recorder(ScoreAccumulator):
    """An accumulator that also notes every target's nats, beside the fields that all have."""

    def __init__(self, text: Text, **options: Any):
        super().__init__(text, **options)
        self._nats = np.zeros(text.num_targets)
        self._times = np.zeros(text.num_targets, dtype=np.int64)
        self._turn = np.zeros(text.num_targets, dtype=np.int64)
        self._calls = 0

    def add(self, first_target: int, nats: Tensor) -> None:
        super().add(first_target, nats)
        span = slice(first_target, first_target + nats.numel())
        self._calls += 1
        self._nats[span] = nats.detach().cpu().double().numpy().reshape(-1)
        self._times[span] += 1
        self._turn[span] = self._calls

    def recorded(self, entry: dict[str, float]) -> Scored:
        return Scored(self._nats, self._times, self._turn, entry)


class LocalScorer:
    """A protocol in this process."""

    def __init__(self, how: Eval, scored_model: ScoredModel, text: Text):
        self.how, self.scored_model, self.text = how, scored_model, text

    @cached_property
    def hints(self) -> Hints:  # type: ignore[override]
        how, length = self.how, self.how.seq_len or self.scored_model.seq_len
        stride = how.step(length) if isinstance(how, Overlapping) else length
        return Hints(
            length,
            stride,
            how.within_documents,
            self.vocab_size,
            edges(how, self.text, length),
        )

    @property
    def vocab_size(self) -> int:
        """Tokens that the model predicts and the tokenizer has."""
        table = getattr(self.text.byte_count, "base_bytes", None)
        size = self.scored_model.model.config.vocab_size
        return size if table is None else min(size, len(table))

    def score(self, tokens: np.ndarray) -> Scored:
        text = dataclasses.replace(self.text, tokens=tokens)
        try:
            result = score(self.how, self.scored_model, text, accumulate=Recorder)
        except (ValueError, RuntimeError, IndexError) as error:
            none = np.zeros(0)
            return Scored(none, none, none, {}, str(error) or type(error).__name__)
        assert isinstance(result.accumulator, Recorder)
        return result.accumulator.recorded(result.to_dict())

    @torch.no_grad()
    def guess(self, tokens: np.ndarray, starts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        seen, found = self.scored_model, []
        plan, reach = seen.plan(self.how.passes), int(offsets.max()) + 1
        was_training = seen.model.training
        seen.model.eval()
        for part in range(0, len(starts), ROWS):
            rows, wanted = starts[part : part + ROWS], offsets[part : part + ROWS]
            ids = np.stack([tokens[start : start + reach] for start in rows]).astype(np.int64)
            hidden = seen.model.hidden(torch.from_numpy(ids).to(seen.device), plan)
            hidden = hidden[torch.arange(len(rows))[:, None], torch.from_numpy(wanted)]
            logits = seen.model.logits(hidden.flatten(0, 1)).double()[:, : self.vocab_size]
            shares = torch.softmax(logits, dim=-1).float().cpu().numpy()
            found.append(shares.reshape(*wanted.shape, -1))
        seen.model.train(was_training)
        return np.concatenate(found)


def edges(how: Eval, text: Text, length: int) -> list[int]:
    """Targets at which a window scores its first one, or a chunk or a document begins."""
    found = set(text.starts.tolist())
    with contextlib.suppress(NotImplementedError, ValueError):
        found |= {window.first for window in how.windows(text, length)}
    for size in _chunk_sizes(how):
        found |= set(range(0, text.num_targets, size))
        for start in text.starts[:MOST_EDGES]:
            found |= set(range(int(start), min(int(start) + 8 * size, text.num_targets), size))
    inside = np.array(sorted(edge for edge in found if 0 <= edge < text.num_targets))
    if len(inside) > MOST_EDGES:
        inside = np.sort(np.random.default_rng().choice(inside, MOST_EDGES, replace=False))
    return inside.tolist()


def _chunk_sizes(option: Any) -> Iterator[int]:
    """Every chunk length among a protocol's settings."""
    for item in dataclasses.fields(option):
        value = getattr(option, item.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _chunk_sizes(value)
        elif item.name.endswith("chunk_tokens") and isinstance(value, int):
            yield value
