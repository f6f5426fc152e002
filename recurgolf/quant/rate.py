"""Training with the bytes in the loss: `quant/qat=rate`.

Every tensor of the file that is not tiny has learned steps, one per row unless asked otherwise. The
forward pass sees `step * round(w / step)`; the gradient passes straight through to w (arXiv
1308.3432) and reaches the step as in learned step size quantization (arXiv 1902.08153). The loss is

    nats per token + λ * bits per weight

where the bits of a code come from a table fitted to the tensor's present codes (`rate_models.py`),
read between its entries at `w / step + u`, u uniform in [-1/2, 1/2): noise stands in for rounding,
so that the rate has a gradient (arXiv 1611.01704, 1906.06624). One factor on all steps keeps the
bytes of the file at their target, λ follows what it has to do (dual ascent), and the codes of the
file are those that training saw: nothing is fitted afterwards.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from recurgolf.config import REGISTRY, ConfigError, option, suggestion
from recurgolf.limits import above, at_least, one_of
from recurgolf.quant.learned_steps import PER_OCTAVE, LearnedSteps
from recurgolf.quant.qat import FileSize, Qat, QuantAware
from recurgolf.quant.quantized_tensor import QuantizedTensor
from recurgolf.quant.quantizer_grid import QuantizerGrid

EVERY = 8
"""Optimizer steps between two looks at the codes; tables and λ change only there."""
AIM = 0.9975
"""Share of the target that is aimed at: the middle of the half percent below it."""
MEASURED_AT = (0.05, 0.25, 0.5, 0.8, 0.9, 0.97)
"""Shares of the active part at which the file is really packed, to learn what it takes besides the
entropy of its codes."""
FASTEST = 0.25
"""Octaves that all steps may move together at one look."""
ASCENT = 4.0
"""log λ moves by so many times what all steps had to move to keep the bytes at their target."""
START_RATE = 0.01
"""λ to begin with, in nats per token for a bit per weight; it soon is where the bytes want it."""
REACH = 25.0
"""Octaves that Adam could move a quantizer's step in all of training: how far they have to go does
not depend on how long it takes."""
FASTEST_LR = 0.15
"""Rate of the steps in a training of few steps: 0.3 was worse than 0.1 in 400 (LOG.md)."""
FINEST = 7.0
"""Bits per weight beyond which steps get no finer; a budget with more room does not bind."""


@option("quant/qat", "rate")
@dataclass
class Rate(Qat):
    """The loss counts the bytes of the weights, whose quantizer steps are learned with them.

    Replaces the rules of `quant` for every tensor that they do not keep as floats by name.
    """

    start_fraction: Annotated[float, at_least(0, below=1)] = 0.5
    """Fraction of training from which on layers see their file's values and bytes count."""
    artifact_bytes: Annotated[int | None, at_least(1)] = None
    """Bytes of model and code together that λ follows; null: budget.artifact_bytes."""
    price: Annotated[float | None, above(0)] = None
    """A fixed λ in nats per token for a bit per weight; null: λ follows the bytes."""
    per: Annotated[str, one_of("row", "group", "tensor")] = "row"
    """What shares a step: a row, `group_size` columns of a row, or the whole tensor."""
    group_size: Annotated[int | None, at_least(1)] = None
    """Columns of a group, with per=group."""
    step_lr: Annotated[float | None, at_least(0)] = None
    """Rate of log2 of the steps, under AdamW and the run's schedule, without decay; null: 25
    octaves over the optimizer steps that have bytes in their loss, at most 0.15."""
    min_numel: Annotated[int, at_least(1)] = 64
    """Tensors with fewer entries stay floats."""
    model: str = "histogram"
    """How many bits a code is taken to cost: `histogram`, `laplace`, `logistic` or `gaussian`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model not in REGISTRY["quant/rate_model"]:
            near = suggestion(self.model, REGISTRY["quant/rate_model"])
            raise ConfigError(f"quant.qat.model={self.model!r}{near}")
        if self.price is not None and self.artifact_bytes is not None:
            raise ConfigError(
                f"quant.qat.price={self.price} and quant.qat.artifact_bytes="
                f"{self.artifact_bytes}: a fixed price ends at whatever bytes it buys; give one"
            )
        if (self.per == "group") != (self.group_size is not None):
            raise ConfigError(
                f"quant.qat.per={self.per}, quant.qat.group_size={self.group_size}: per=group "
                "needs a group_size, and only that has one"
            )
        if self.snap.strength:
            raise ConfigError(
                f"quant.qat.snap.strength={self.snap.strength}: under quant/qat=rate layers see "
                "the file's values already; set it to 0"
            )

    learns_steps: ClassVar[bool] = True

    def quantizers(self, shapes: Mapping[str, Sequence[int]], training_steps: int) -> LearnedSteps:
        own = self.step_lr
        if own is None:
            own = min(REACH / ((1 - self.start_fraction) * training_steps), FASTEST_LR)
        return LearnedSteps(
            shapes,
            REGISTRY["quant/rate_model"][self.model](),
            per=self.per,
            group_size=self.group_size,
            lr=own,
            first_rate=self.price or START_RATE,
        )

    def learns(self, shape: Sequence[int]) -> bool:
        return math.prod(shape) >= self.min_numel

    def aim(self, budget_bytes: int) -> int | None:
        return None if self.price else self.artifact_bytes or budget_bytes

    def learned(self, model: nn.Module) -> dict[str, QuantizedTensor]:
        steps = model.quantizers
        if not (isinstance(steps, LearnedSteps) and steps.active):
            return {}
        return steps.stored(dict(model.named_parameters()))

    def build(
        self,
        model: nn.Module,
        grids: Mapping[str, QuantizerGrid],
        looped: Collection[str],
        ahead: bool = False,
        file: Callable[[], FileSize] | None = None,
    ) -> RateAware:
        assert file is not None and isinstance(model.quantizers, LearnedSteps)
        return RateAware(self, model, model.quantizers, file(), ahead)


class RateAware(QuantAware):
    """A model that trains at its file's values, with the price of its bytes in the loss."""

    def __init__(
        self, config: Rate, model: nn.Module, steps: LearnedSteps, file: FileSize, ahead: bool
    ):
        super().__init__(config.snap, {}, {}, config.start_fraction, ahead=False)
        self.config, self.steps, self.file, self._ahead = config, steps, file, ahead
        self._age = 0  # of the steps, in a training step that has bytes in its loss
        aim = config.aim(file.budget)
        self.target = None if aim is None else aim - file.code
        self.weights = {n: p for n, p in model.named_parameters() if n in set(steps.names)}
        self._places = [
            (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
            for name in steps.names
        ]
        buffers = [f"quantizers.{name}" for name, _ in steps.named_buffers()]
        self._buffers = frozenset(buffers)
        self._parameters = frozenset(f"quantizers.{name}" for name, _ in steps.named_parameters())

    @property
    def active(self) -> bool:
        return self.steps.active

    @property
    def idle(self) -> frozenset[str]:
        return self._buffers if self.active else self._buffers | self._parameters

    @torch.no_grad()
    def update(self, fraction: float) -> None:
        if fraction < self.start_fraction:
            return
        steps, age = self.steps, int(self.steps.age)
        done = (fraction - self.start_fraction) / (1 - self.start_fraction)
        if age < 0:
            self._begin()
        elif age % EVERY == 0:
            bits = steps.look(self.weights)
            if any(float(steps.progress) < at <= done for at in MEASURED_AT):
                self._measure(bits)
            if self.target is not None:
                self._follow(bits, self.target)
            steps.progress.fill_(done)
            steps.fit()
        steps.age += 1
        # Read once a step, before there is work on a GPU that would have to be waited for.
        self._age = int(steps.age)

    def _begin(self) -> None:
        steps, target = self.steps, self.target
        finest = FINEST * steps.numel
        if target is None:
            steps.start_at(self.weights, 0.6 * finest)
        else:
            for _ in range(2):  # the second time with what the file takes besides the codes
                left = 8 * AIM * target - float(steps.overhead)
                steps.start_at(self.weights, min(max(left, 0.0), finest))
                self._measure(float(steps.bits().sum()))
        steps.fit()
        steps.age.zero_()

    def _measure(self, bits: float) -> None:
        self.steps.overhead.fill_(8 * self.file.measure(self.steps.stored(self.weights)) - bits)

    def _follow(self, bits: float, target: int) -> None:
        """All steps by one factor to where the bytes are met, and λ after it.

        Bytes that would drift below their target show a price that is too high, and above it one
        that is too low: where nothing drifts, λ is what a bit is worth to the text.
        """
        steps = self.steps
        most = FINEST * steps.numel + float(steps.overhead)
        excess = bits + float(steps.overhead) - min(8 * AIM * target, most)
        # A bit per weight is an octave at high rates; at 2 to 3 bits, with many zeros, less.
        octaves = min(max(excess / (0.8 * steps.numel), -FASTEST), FASTEST)
        steps.log_factor.add_(octaves)
        steps.log_rate.add_(ASCENT * octaves).clamp_(-12.0, 6.0)

    def settle(self) -> bool:
        """One factor on all steps until the packed file is within half a percent of its target.

        Where training ends close to it, as it does, nothing changes; an average of the weights has
        other codes than the weights that it averages.
        """
        target, steps = self.target, self.steps
        if not self.active or target is None:
            return False
        small, large = -math.inf, math.inf  # factors that make the file too large, and that fit
        move = 1 / PER_OCTAVE
        for _ in range(16):
            size, factor = self.file.measure(steps.stored(self.weights)), float(steps.log_factor)
            fine = steps.count(self.weights) > FINEST * steps.numel
            if size <= target and (size > 0.995 * target or fine):
                return True
            if size > target:
                small = factor
            else:
                large = factor
            middle, move = (small + large) / 2, 2 * move
            if not math.isfinite(middle):
                middle = factor + move if size > target else factor - move
            steps.log_factor.fill_(middle)
        # Half a percent is less than one code in a file this small: the largest that fits.
        steps.log_factor.fill_(large if math.isfinite(large) else small)
        return True

    def price(self) -> Tensor | None:
        """λ * bits per weight, for the loss; None while bytes do not count."""
        if not self._age:
            return None
        rate = self.steps.rate(self.weights, self.file.seed + 1_000_003 * self._age)
        return self.steps.log_rate.exp().float() * rate

    def seen(self) -> AbstractContextManager[None]:
        if self._age:
            return self._swapped(self.steps.seen(self.weights))
        if self._ahead:
            # A compiled graph tells parameters from other tensors; it shall not meet both.
            return self._swapped({name: w.view_as(w) for name, w in self.weights.items()})
        return super().seen()

    @contextlib.contextmanager
    def _swapped(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        # Around the backward pass too: activation checkpointing runs the forward again in it.
        before = [module._parameters[name] for module, name in self._places]
        try:
            for (module, name), value in zip(self._places, values.values(), strict=True):
                module._parameters[name] = value  # type: ignore[assignment]
            yield
        finally:
            for (module, name), value in zip(self._places, before, strict=True):
                module._parameters[name] = value

    def curves(self, component: Callable[[str], str]) -> dict[str, float]:
        if not self.active:
            return {}
        steps = self.steps
        bits, numel = {}, {}
        for name, own in zip(steps.names, steps.bits().tolist(), strict=True):
            part = component(name).replace(" ", "_")
            bits[part] = bits.get(part, 0.0) + own
            numel[part] = numel.get(part, 0) + self.weights[name].numel()
        return {
            "rate/lambda": math.exp(float(steps.log_rate)),
            "rate/bits_per_weight": sum(bits.values()) / steps.numel,
            **{f"rate/bits_per_weight/{part}": bits[part] / numel[part] for part in bits},
            "rate/predicted_bytes": self._bytes(),
        }

    def _bytes(self) -> float:
        return (float(self.steps.bits().sum()) + float(self.steps.overhead)) / 8

    def status(self) -> str:
        if not self.active:
            return ""
        bits = float(self.steps.bits().sum()) / self.steps.numel
        return f" | {bits:.2f} bits/weight, {self._bytes():,.0f} bytes"

    def describe(self) -> str:
        count = len(self.steps.names)
        aim = "a fixed price" if self.target is None else f"{self.target:,} bytes of model file"
        return (
            f"learned steps of {count} tensors and bytes in the loss from {self.start_fraction:g} "
            f"of training on, for {aim}"
        )


__all__ = ["AIM", "LearnedSteps", "Rate", "RateAware"]
