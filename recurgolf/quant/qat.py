"""Quantization-aware training: the network trains with the weights that its file will hold.

What a layer sees comes from the export grid of its weight (bits, clip, groups), which is fitted
once per step, so that training for other bits than are exported cannot be configured. Snapping
pulls the weights themselves onto that grid while training ends.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from recurgolf.config import Checked, ConfigError, option
from recurgolf.limits import at_least, one_of
from recurgolf.looping import LoopPlan
from recurgolf.quant.clip import MaxClip
from recurgolf.quant.quantized_tensor import QuantizedTensor
from recurgolf.quant.quantizer_grid import QuantizerGrid
from recurgolf.quant.rtn import exported, step_sizes


@dataclass
class Snap(Checked):
    """Weight snapping: after every step w <- w + a (Q(w) - w), a growing linearly to `strength`.

    A few hundredths are enough: with a = 0.05 a weight that its gradient leaves alone comes to
    its grid point within a factor of e every twenty steps.
    """

    strength: Annotated[float, at_least(0, at_most=1)] = 0.0
    """a at the end of training; 0: no snapping."""
    start_fraction: Annotated[float, at_least(0, below=1)] = 0.75
    """Fraction of training at which a begins to grow from 0."""

    def at(self, fraction: float) -> float:
        """a at a fraction of training."""
        grown = (fraction - self.start_fraction) / (1 - self.start_fraction)
        return self.strength * min(max(grown, 0.0), 1.0)


@dataclass(frozen=True)
class FileSize:
    """What training may know of the file.

    Attributes:
        budget, code: bytes of model and code together, and of the code alone.
        measure: quantized tensors -> bytes of the model file with them, really packed. Collective.
        seed: of the noise in the rate; the same on every rank.
    """

    budget: int
    code: int
    measure: Callable[[Mapping[str, QuantizedTensor]], int]
    seed: int


class FakeQuantizer:
    """A weight -> the weight that training sees: at first as it is, then as last refreshed."""

    def refresh(self, weight: Tensor) -> None:
        """Take up the weight's present values; in place, for compiled graphs keep the memory."""
        raise NotImplementedError

    def __call__(self, weight: Tensor) -> Tensor:
        """The disturbed weight; the gradient passes unchanged."""
        raise NotImplementedError


class RoundingError(FakeQuantizer):
    """The exported values. One rounding per step, whatever the number of visits."""

    def __init__(self, weight: Tensor, spec: QuantizerGrid):
        self.spec = spec
        self.change = torch.zeros_like(weight, dtype=torch.float32)

    def refresh(self, weight: Tensor) -> None:
        torch.sub(exported(weight, self.spec), weight.float(), out=self.change)

    def __call__(self, weight: Tensor) -> Tensor:
        return weight + self.change.to(weight.dtype)


class UniformNoise(FakeQuantizer):
    """Plus uniform noise one step wide, fresh at every visit, from torch's own generator."""

    def __init__(self, weight: Tensor, spec: QuantizerGrid):
        self.spec = spec
        self.steps = torch.zeros_like(step_sizes(weight, spec))

    def refresh(self, weight: Tensor) -> None:
        self.steps.copy_(step_sizes(weight, self.spec))

    def __call__(self, weight: Tensor) -> Tensor:
        noise = (torch.rand_like(weight, dtype=torch.float32) - 0.5) * self.steps
        return weight + noise.to(weight.dtype)


@dataclass
class Qat(Checked):
    """Nothing but snapping, which every kind has."""

    snap: Snap = field(default_factory=Snap)

    def check_plan(self, plan: LoopPlan) -> None:
        """Refuse to wait for looped blocks where this plan, the largest, has none."""

    learns_steps: ClassVar[bool] = False
    """Whether the steps of the file are its own instead of those of quant's rules."""

    def quantizers(
        self, shapes: Mapping[str, Sequence[int]], training_steps: int
    ) -> nn.Module | None:
        """Parameters that it brings into the model for the tensors that `Quant.learned` names;
        they are `model.quantizers`. None: none."""
        return None

    def learns(self, shape: Sequence[int]) -> bool:
        """Whether the steps of a tensor of this shape are its own, and not those of the rules."""
        return False

    def aim(self, budget_bytes: int) -> int | None:
        """Bytes of model and code together that training itself ends at; None: it knows nothing."""
        return None

    def learned(self, model: nn.Module) -> dict[str, QuantizedTensor]:
        """Tensors of a model as the file holds them, where training has decided that."""
        return {}

    def build(
        self,
        model: nn.Module,
        grids: Mapping[str, QuantizerGrid],
        looped: Collection[str],
        ahead: bool = False,
        file: Callable[[], FileSize] | None = None,
    ) -> QuantAware:
        """Attach to a model.

        Args:
            grids: weight name -> the grid it is exported on; other weights are left alone.
            looped: names of the weights that belong to looped blocks.
            ahead: attach at once and not only when it begins, so that a compiled graph need not
                change in the middle of training.
            file: for what depends on the bytes of the file.

        Raises:
            ConfigError: there is nothing to attach to.
        """
        return QuantAware(self.snap, _with_grid(model, grids), {}, math.inf, ahead)


@option("quant/qat", "none")
@dataclass
class NoQat(Qat):
    """Training sees the weights as they are."""


@dataclass
class _Disturbing(Qat):
    start_fraction: Annotated[float, at_least(0, below=1)] = 0.0
    """Fraction of training from which on the layers see disturbed weights."""
    blocks: Annotated[str, one_of("all", "looped")] = "all"
    """`all` weights that have a grid, embeddings too, or those of `looped` blocks alone."""
    compat_own_steps: bool = False
    """True (compat, depth_recurrent_qat and universal_rank1): steps of every row's largest entry,
    without the clip and the floor of the export: training meets other steps than the file holds."""

    def check_plan(self, plan: LoopPlan) -> None:
        if self.blocks == "looped" and not plan.looped_blocks:
            raise ConfigError(
                f"quant.qat.blocks=looped, but the plan {plan.describe()} loops no block; loop "
                "some, or set quant.qat.blocks=all, or quant/qat=none"
            )

    def disturbance(self, weight: Tensor, spec: QuantizerGrid) -> FakeQuantizer:
        raise NotImplementedError

    def build(
        self,
        model: nn.Module,
        grids: Mapping[str, QuantizerGrid],
        looped: Collection[str],
        ahead: bool = False,
        file: Callable[[], FileSize] | None = None,
    ) -> QuantAware:
        weights = _with_grid(model, grids)
        steps = {name: self._own(spec) for name, (_, spec) in weights.items()}
        layers = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if hasattr(module, "fake_quantize") and f"{name}.weight" in weights
        }
        if self.blocks == "looped":
            layers = {name: module for name, module in layers.items() if name in looped}
        if not layers:
            what = "weight" if self.blocks == "all" else "weight of a looped block"
            raise ConfigError(
                f"quant.qat is on, but the rules of quant code no {what}: it would change nothing"
            )
        seen = {n: (m, self.disturbance(weights[n][0], steps[n])) for n, m in layers.items()}
        return QuantAware(self.snap, weights, seen, self.start_fraction, ahead)

    def _own(self, spec: QuantizerGrid) -> QuantizerGrid:
        return replace(spec, clip=MaxClip(), scale_floor=None) if self.compat_own_steps else spec


@option("quant/qat", "straight_through")
@dataclass
class StraightThrough(_Disturbing):
    """Layers see the exported values, gradients pass as if they had not (arXiv 1308.3432)."""

    def disturbance(self, weight: Tensor, spec: QuantizerGrid) -> FakeQuantizer:
        return RoundingError(weight, spec)


@option("quant/qat", "noise")
@dataclass
class Noise(_Disturbing):
    """Layers see weights with noise as large as the rounding will be (cf. arXiv 2004.07320)."""

    blocks: str = "looped"

    def disturbance(self, weight: Tensor, spec: QuantizerGrid) -> FakeQuantizer:
        return UniformNoise(weight, spec)


class QuantAware:
    """Quantization-aware training of one model: `update` before a step, `snap` behind it.

    Attributes:
        layers: weight name -> its module and what it sees.
        start_fraction: of training, from which on it is active.
    """

    def __init__(
        self,
        snap: Snap,
        weights: Mapping[str, tuple[Tensor, QuantizerGrid]],
        layers: Mapping[str, tuple[nn.Module, FakeQuantizer]],
        start_fraction: float,
        ahead: bool,
    ):
        self._snap, self._weights = snap, dict(weights)
        self.layers, self.start_fraction = dict(layers), start_fraction
        if ahead:
            self._attach()

    @torch.no_grad()
    def update(self, fraction: float) -> None:
        """Take up the present weights; before every optimizer step, not for its micro-steps."""
        if fraction < self.start_fraction:
            return
        self._attach()
        for name, (_, disturbance) in self.layers.items():
            disturbance.refresh(self._weights[name][0].detach())

    @property
    def idle(self) -> frozenset[str]:
        """Names of parameters and buffers of the model that DDP must not know now."""
        return frozenset()

    def seen(self) -> AbstractContextManager[None]:
        """Inside, forward and backward of a micro-step: the model has the weights that it sees.

        Disturbed layers look for themselves.
        """
        return contextlib.nullcontext()

    def price(self) -> Tensor | None:
        """What the loss has to bear besides the text, once per optimizer step; None: nothing."""
        return None

    def settle(self) -> bool:
        """After the last step, with the weights that will be packed; whether it changes them."""
        return False

    def curves(self, component: Callable[[str], str]) -> dict[str, float]:
        """Figures for the tracker; `component` names the part that a tensor belongs to."""
        return {}

    def status(self) -> str:
        """What a line of training says of it; empty where there is nothing to say."""
        return ""

    @torch.no_grad()
    def snap(self, fraction: float) -> None:
        """Pull every weight that has a grid towards it; behind the optimizer step."""
        strength = self._snap.at(fraction)
        if strength > 0:
            for weight, spec in self._weights.values():
                weight.lerp_(exported(weight, spec).to(weight.dtype), strength)

    def describe(self) -> str:
        """A line for the log; empty where nothing is on."""
        parts = []
        if self.layers:
            kinds = ", ".join(sorted({type(d).__name__ for _, d in self.layers.values()}))
            parts.append(
                f"{kinds} on {len(self.layers)} weights from {self.start_fraction:g} of training on"
            )
        if self._snap.strength:
            parts.append(
                f"snapping of {len(self._weights)} weights from {self._snap.start_fraction:g} on"
            )
        return "; ".join(parts)

    def _attach(self) -> None:
        for module, disturbance in self.layers.values():
            module.fake_quantize = disturbance  # type: ignore[assignment]


def _with_grid(
    model: nn.Module, grids: Mapping[str, QuantizerGrid]
) -> dict[str, tuple[Tensor, QuantizerGrid]]:
    return {n: (p, grids[n]) for n, p in model.named_parameters() if n in grids and p.ndim == 2}
