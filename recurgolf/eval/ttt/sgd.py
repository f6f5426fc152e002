"""SGD over chunks, score first: score the windows of a chunk, then train on that chunk.

The protocol of the golf records since March 2026. A window belongs to the chunk in which its first
scored target lies; training rows lie side by side, as long as a window, and end inside the chunk,
so that what they teach has been scored. Nothing is trained behind the last chunk.

Ranks share the windows of a chunk and the rows of a step; gradients are summed, so any number of
ranks takes the steps that one takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Annotated, Any

import torch

from recurgolf.config import ConfigError, option
from recurgolf.eval.protocol import ALONE, Progress, ScoredModel, Share, Window, batches
from recurgolf.eval.text import ScoreAccumulator, Text
from recurgolf.eval.ttt.descent import Descent, Learner, borrowed
from recurgolf.eval.windows import SlidingEval
from recurgolf.limits import at_least
from recurgolf.looping import Looping


@option("eval", "ttt_sgd")
@dataclass
class SgdEval(SlidingEval):
    """Sliding windows by a model that trains on every chunk behind its scores."""

    chunk_tokens: Annotated[int, at_least(1)] = 32768
    """Targets between two trainings."""
    sgd: Descent = field(default_factory=Descent)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compat_skip_head:
            raise ConfigError(
                "eval.compat_skip_head leaves targets unscored that test-time training would learn"
            )

    def check(self, num_targets: int, seq_len: int) -> None:
        super().check(num_targets, seq_len)
        if self.chunk_tokens < seq_len:
            raise ConfigError(
                f"eval.chunk_tokens={self.chunk_tokens} holds no training row of "
                f"eval.seq_len={seq_len} tokens: at least that many"
            )

    def check_model(self, model: Any, looping: Looping) -> None:
        super().check_model(model, looping)
        self.sgd.check_model(model, looping)

    def run(
        self,
        scored_model: ScoredModel,
        text: Text,
        accumulator: ScoreAccumulator,
        *,
        share: Share = ALONE,
        progress: Progress | None = None,
    ) -> None:
        length = self.seq_len or scored_model.seq_len
        plan, base = scored_model.plan(self.passes), self.base(scored_model)
        rows = max(1, self.batch_tokens // length)
        end = text.num_targets - (text.num_targets % length if self.whole_windows else 0)
        num_chunks = -(-end // self.chunk_tokens)
        names = self.sgd.chosen(name for name, _ in scored_model.model.named_parameters())
        with borrowed(scored_model.model, names) as parameters:
            learner = Learner(
                self.sgd,
                scored_model,
                plan,
                parameters,
                base=base,
                rows_at_once=rows,
                share=share,
            )
            for chunk, windows in self.chunks(text, length):
                mine = islice(windows, *share.of(len(windows)))
                with torch.no_grad():
                    for batch in batches(mine, rows):
                        ids = torch.stack([text.ids(w.start, w.stop + 1) for w in batch])
                        first = batch[0].first - batch[0].start
                        nats = scored_model.nats(
                            ids.to(scored_model.device), first, plan, base=base
                        )
                        for window, row in zip(batch, nats.cpu(), strict=True):
                            accumulator.add(window.first, row)
                if chunk < num_chunks - 1:
                    start = chunk * self.chunk_tokens
                    stop = min(start + self.chunk_tokens, end)
                    learner.learn(text, start, stop, length, self.sgd.rate(chunk, num_chunks))
                if progress is not None:
                    progress(chunk + 1, num_chunks)

    def windows(self, text: Text, seq_len: int) -> Iterator[Window]:
        """As when nothing learns; but here universal_rank1 drops windows shorter than a stride."""
        stride = self.step(seq_len)
        for window in super().windows(text, seq_len):
            dropped = self.compat_rescore_tail and window.stop - window.start < stride
            if not dropped or window.start == 0:
                yield window

    def chunks(self, text: Text, seq_len: int) -> Iterator[tuple[int, list[Window]]]:
        """Number and windows of every chunk, in order."""
        for chunk, windows in groupby(
            self.windows(text, seq_len), lambda window: window.first // self.chunk_tokens
        ):
            yield chunk, list(windows)
