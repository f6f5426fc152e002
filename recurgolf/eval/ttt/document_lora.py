"""Per-document test-time training as a protocol: `row_adapters` over the documents of a text.

Ranks share the documents of a batch. With `adapter.warm` the A they end with is averaged over
ranks in float64 behind every batch, so that any number of ranks goes on from the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch

from recurgolf.config import ConfigError, option
from recurgolf.eval.protocol import ALONE, Eval, Progress, ScoredModel, Share
from recurgolf.eval.text import ScoreAccumulator, Text
from recurgolf.eval.ttt.descent import borrowed
from recurgolf.eval.ttt.row_adapters import DocumentLora, Readers, row_adapters
from recurgolf.limits import at_least
from recurgolf.looping import Looping


@option("eval", "ttt_document_lora")
@dataclass
class DocumentLoraEval(Eval):
    """Every document by itself, with an adapter that learns from what it has scored of it."""

    batch_documents: Annotated[int, at_least(1)] = 64
    """Documents read side by side; changes speed and memory alone, unless adapter.warm."""
    adapter: DocumentLora = field(default_factory=DocumentLora)

    within_documents: ClassVar[bool] = True

    def check(self, num_targets: int, seq_len: int) -> None:
        if num_targets < 1:
            raise ConfigError("validation has no target")
        if self.adapter.chunk_tokens > seq_len:
            raise ConfigError(
                f"eval.adapter.chunk_tokens={self.adapter.chunk_tokens} does not fit into a window "
                f"of eval.seq_len={seq_len}"
            )

    def check_model(self, model: Any, looping: Looping) -> None:
        super().check_model(model, looping)
        self.adapter.sites(model)

    def run(
        self,
        scored_model: ScoredModel,
        text: Text,
        accumulator: ScoreAccumulator,
        *,
        share: Share = ALONE,
        progress: Progress | None = None,
    ) -> None:
        reading = Reading(self, scored_model, text, accumulator, share, progress)
        with borrowed(scored_model.model):
            reading.documents(0, text.num_documents)


class Reading:
    """One pass over a text; A is carried from batch to batch where it is warm."""

    def __init__(
        self,
        how: DocumentLoraEval,
        scored_model: ScoredModel,
        text: Text,
        accumulator: ScoreAccumulator,
        share: Share,
        progress: Progress | None,
    ):
        self.how, self.scored_model, self.text = how, scored_model, text
        self.accumulator, self.share, self.progress = accumulator, share, progress
        self.sites = how.adapter.sites(scored_model.model.config)
        self.start_a = how.adapter.first_a(self.sites)

    def documents(self, first: int, stop: int) -> None:
        """Score the documents `first` to `stop` - 1."""
        how, scored_model = self.how, self.scored_model
        length = how.seq_len or scored_model.seq_len
        plan, base = scored_model.plan(how.passes), how.base(scored_model)
        with row_adapters(scored_model.model, how.adapter.scale) as adapters:
            for batch in self.batches(first, stop):
                spans = [self.span(document) for document in batch]
                mine = slice(*self.share.of(len(spans)))
                readers = Readers(
                    how.adapter, scored_model, plan, base, adapters, self.start_a, self.sites
                )
                ended = readers.read(self.text, self.accumulator, spans[mine], length)
                if how.adapter.warm:
                    self.start_a = {
                        site: (self.summed(total) / len(spans)).float()
                        for site, total in ended.items()
                    }
                if self.progress is not None:
                    self.progress(batch.stop, self.text.num_documents)

    def batches(self, first: int, stop: int) -> Iterator[range]:
        for start in range(first, stop, self.how.batch_documents):
            yield range(start, min(start + self.how.batch_documents, stop))

    def span(self, document: int) -> tuple[int, int]:
        """First target of a document and the first behind it."""
        starts = self.text.starts
        last = document + 1 == len(starts)
        return int(starts[document]), self.text.num_targets if last else int(starts[document + 1])

    def summed(self, total: torch.Tensor) -> torch.Tensor:
        """A sum over documents, over those of the other ranks as well."""
        add_up = self.share.all_reduce
        return total if add_up is None else add_up(total)
