"""What rules would do: to the file, really packed, and to the network's predictions, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from recurgolf.artifact import pack_bytes
from recurgolf.data.calibration_text import CalibrationText
from recurgolf.model.transformer import Transformer
from recurgolf.quant import QuantizedState, dequantize_state, quantize_state
from recurgolf.quant.fill import Rules
from recurgolf.training.packing import metadata

if TYPE_CHECKING:
    from recurgolf.training.job import Job

PROBED_TOKENS = 4096
"""Tokens on which damage is measured; the square root of their number is far below what groups of
layers differ by."""
T = TypeVar("T")


class Probe:
    """Asks what rules would do. Within `by_the_first`, on the first rank.

    Args:
        state: the tensors that go into the file.
        grams: for weights under gptq.
    """

    def __init__(
        self,
        job: Job,
        model: Transformer,
        state: Mapping[str, Tensor],
        grams: Mapping[str, Tensor],
    ):
        self.job, self.model = job, model
        self.state, self.grams = state, grams

    def size(self, rules: Rules) -> int:
        """Bytes of the model file that these rules give."""
        return file_bytes(self.job, quantize_state(self.state, rules, self.grams))

    def damage(self, rules: Rules) -> float:
        """How far predictions move when the tensors of these rules alone are quantized: KL
        divergence in nats per token of the calibration's text. The model stays as it is."""
        state = {name: self.state[name] for name in rules}
        values = dequantize_state(quantize_state(state, rules, self.grams))
        parameters = dict(self.model.named_parameters())
        exact = self._exact
        before = {name: parameters[name].detach().clone() for name in values}
        try:
            for name, value in values.items():
                parameters[name].copy_(value)
            moved = self._predictions()
        finally:
            for name, value in before.items():
                parameters[name].copy_(value)
        pairs = zip(exact, moved, strict=True)
        total = sum(float((p.exp() * (p - q)).sum()) for p, q in pairs)
        return total / self._rows.numel()

    @cached_property
    def _rows(self) -> Tensor:
        return probed_rows(self.job, self.model)

    @cached_property
    def _exact(self) -> list[Tensor]:
        return self._predictions()

    def _predictions(self) -> list[Tensor]:
        """Log probabilities in the plan that is scored."""
        plan, was_training = self.job.run.eval_plan, self.model.training
        self.model.eval()
        try:
            # Row by row: a vocabulary times all tokens need not fit into memory at once.
            return [self.model(row[None], plan).float().log_softmax(-1) for row in self._rows]
        finally:
            self.model.train(was_training)


def by_the_first(job: Job, find: Callable[[], T]) -> T:
    """What the first rank finds, for all of them; its time counts as quantization. Collective."""
    found = None
    if job.ranks.is_first:
        with job.clock.phase("quantization"), torch.no_grad():
            found = find()
    return cast("T", job.ranks.broadcast(found))


def file_bytes(job: Job, stored: QuantizedState) -> int:
    """Bytes of the model file with these tensors."""
    return len(pack_bytes(metadata(job.run, job.dataset), stored, job.run.artifact.codec)[0])


def probed_rows(job: Job, model: Transformer) -> Tensor:
    """Token ids of the calibration's text [rows, length], `PROBED_TOKENS` at most."""
    run, calibration = job.run, job.run.quant.calibration
    length = calibration.seq_len or run.trainer.seq_len
    count = min(max(PROBED_TOKENS // length, 1), calibration.sequences)
    seeds = run.seed_of("data"), run.seed_of("noise")
    text = CalibrationText(job.dataset, model, run.eval_plan, *seeds, run.data.vocab_size)
    return calibration.rows(text, range(count), length).to(model.embed.weight.device)
