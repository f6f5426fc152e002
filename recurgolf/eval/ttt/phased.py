"""Phased test-time training: per-document adapters, and between phases SGD on what was scored.

The documents are cut into phases, in order. A phase is scored with an adapter per document on top
of the weights as they are; then these weights themselves train on the documents of the phase,
which have all been scored, and the next phase begins. Momentum is kept; behind the last phase
nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from recurgolf.config import ConfigError, option
from recurgolf.eval.protocol import ALONE, Progress, ScoredModel, Share
from recurgolf.eval.text import ScoreAccumulator, Text
from recurgolf.eval.ttt.descent import Descent, Learner, borrowed
from recurgolf.eval.ttt.document_lora import DocumentLoraEval, Reading
from recurgolf.limits import at_least
from recurgolf.looping import Looping


@option("eval", "ttt_phased")
@dataclass
class PhasedEval(DocumentLoraEval):
    """An adapter per document, and SGD on all weights after every phase of documents."""

    phases: Annotated[int, at_least(1)] = 3
    """Runs of as equally many documents as possible."""
    sgd: Descent = field(default_factory=Descent)

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
        if text.num_documents < self.phases:
            raise ConfigError(
                f"eval.phases={self.phases}, but validation has {text.num_documents} documents"
            )
        length = self.seq_len or scored_model.seq_len
        # Named before the documents' adapters stand in: those are no weights of the model.
        names = self.sgd.chosen(name for name, _ in scored_model.model.named_parameters())
        with borrowed(scored_model.model, names) as parameters:
            learner = Learner(
                self.sgd,
                scored_model,
                scored_model.plan(self.passes),
                parameters,
                base=self.base(scored_model),
                rows_at_once=self.batch_tokens // length,
                share=share,
            )
            reading = Reading(self, scored_model, text, accumulator, share, progress)
            for phase in range(self.phases):
                first = text.num_documents * phase // self.phases
                stop = text.num_documents * (phase + 1) // self.phases
                reading.documents(first, stop)
                if phase < self.phases - 1:
                    begin, end = reading.span(first)[0], reading.span(stop - 1)[1]
                    rate = self.sgd.rate(phase, self.phases)
                    learner.learn(text, begin, end, min(length, end - begin), rate)
