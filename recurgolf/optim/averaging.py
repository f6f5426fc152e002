"""Averages of the weights over training, which are scored and packed in place of the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from recurgolf.config import Checked, ConfigError, option
from recurgolf.limits import at_least, one_of
from recurgolf.optim import foreach

DTYPES: dict[str, torch.dtype | None] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "param": None,
}


@dataclass
class Averaging(Checked):
    """A rule of averaging; `build` starts one over a model."""

    def build(self, model: nn.Module) -> Averager:
        """An average over the model's weights, as they are now and as they will become."""
        return Averager()


class Averager:
    """No average; what averages has this interface.

    `update` comes after every optimizer step, `averaged_state` at the end.
    """

    def update(self, step: int, fraction: float, lr_scale: float) -> None:
        """Take note of the model's present weights.

        Args:
            step: finished steps, so 1 after the first.
            fraction: of training done, 0 to 1.
            lr_scale: the schedule's factor in this step.
        """

    def averaged_state(self) -> dict[str, Tensor] | None:
        """The averaged weights for `model.load_state_dict`, in the parameters' precision.

        None where nothing was averaged: `status` says why, and the last weights are the result.
        """
        return None

    def status(self) -> str:
        """One line for the log."""
        return "no averaging"

    def state_dict(self) -> dict[str, Tensor]:
        """Flat, plain tensors (not copied)."""
        return {}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state_dict` gave; the tensors are copied."""


@option("averaging", "none")
@dataclass
class NoAveraging(Averaging):
    """The last weights are the result."""


@option("averaging", "ema")
@dataclass
class EMA(Averaging):
    """Exponential average: a = decay * a + (1 - decay) * w after every step."""

    decay: Annotated[float, at_least(0, below=1)] = 0.9965
    """Share of the average that stays at every step; about 1 / (1 - decay) steps count."""
    dtype: Annotated[str, one_of(DTYPES)] = "float32"
    """Of the average: `float32`; `param`, the parameters' own; `bfloat16` (compat,
    parallel_recurrent), which rounds most updates away."""
    start_fraction: Annotated[float, at_least(0, at_most=1)] = 0.0
    """Of training. 0: from the initial weights on; otherwise the first average is a copy."""
    require_started: bool = True
    """False (compat, parallel_recurrent): averages from the weights at build whenever it
    starts, and these are the result if it never does."""

    def build(self, model: nn.Module) -> Averager:
        return ExponentialAverager(self, model)


@dataclass
class _SnapshotMean(Averaging):
    interval_steps: Annotated[int, at_least(1)] = 50
    """Steps between snapshots."""

    below_lr_scale: ClassVar[float] = 1.0
    """Snapshots are taken while the schedule's factor is below this."""
    min_snapshots: ClassVar[int] = 2
    """With fewer the last weights are the result."""

    def build(self, model: nn.Module) -> Averager:
        return SnapshotAverager(self, model)


@option("averaging", "lawa")
@dataclass
class LAWA(_SnapshotMean):
    """The mean of snapshots taken during the warm-down (latest weight averaging, 2209.14981)."""


@option("averaging", "swa")
@dataclass
class SWA(_SnapshotMean):
    """The mean of snapshots taken late in the warm-down (stochastic averaging, 1803.05407)."""

    below_lr_scale: ClassVar[float] = 0.2
    min_snapshots: ClassVar[int] = 1


class ExponentialAverager(Averager):
    """See `EMA`."""

    def __init__(self, config: EMA, model: nn.Module):
        self.config = config
        self.weights = _Weights(model)
        self.updates = 0
        from_build = config.start_fraction == 0 or not config.require_started
        self.shadow = self._copy() if from_build else []

    @torch.no_grad()
    def update(self, step: int, fraction: float, lr_scale: float) -> None:
        if fraction < self.config.start_fraction:
            return
        self.updates += 1
        if not self.shadow:
            self.shadow = self._copy()
            return
        weights = [w.to(s.dtype) for w, s in zip(self.weights.live, self.shadow, strict=True)]
        foreach.scale_(self.shadow, self.config.decay)
        foreach.add_(self.shadow, weights, alpha=1 - self.config.decay)

    def averaged_state(self) -> dict[str, Tensor] | None:
        if self.updates == 0 and self.config.require_started:
            return None
        return self.weights.state_from(self.shadow)

    def status(self) -> str:
        if self.updates == 0:
            return f"ema never began (averaging.start_fraction={self.config.start_fraction})"
        return f"ema over {self.updates} steps"

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights.packed(self.shadow, self.updates)

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.shadow, self.updates = self.weights.unpacked(tensors)

    def _copy(self) -> list[Tensor]:
        dtype = DTYPES[self.config.dtype]
        return [w.detach().to(dtype or w.dtype, copy=True) for w in self.weights.live]


class SnapshotAverager(Averager):
    """See `LAWA` and `SWA`. Holds a running sum in float32, not the snapshots."""

    def __init__(self, config: _SnapshotMean, model: nn.Module):
        self.config = config
        self.weights = _Weights(model)
        self.total: list[Tensor] = []
        self.snapshots = 0

    @torch.no_grad()
    def update(self, step: int, fraction: float, lr_scale: float) -> None:
        if lr_scale >= self.config.below_lr_scale or step % self.config.interval_steps:
            return
        weights = [w.detach().to(torch.float32, copy=True) for w in self.weights.live]
        if self.snapshots:
            foreach.add_(self.total, weights)
        else:
            self.total = weights
        self.snapshots += 1

    def averaged_state(self) -> dict[str, Tensor] | None:
        if self.snapshots < self.config.min_snapshots:
            return None
        return self.weights.state_from([total / self.snapshots for total in self.total])

    def status(self) -> str:
        if self.snapshots < self.config.min_snapshots:
            return (
                f"too few snapshots to average: {self.snapshots} of at least "
                f"{self.config.min_snapshots} (averaging.interval_steps="
                f"{self.config.interval_steps}, taken at lr scales below "
                f"{self.config.below_lr_scale})"
            )
        return f"mean of {self.snapshots} snapshots"

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights.packed(self.total, self.snapshots)

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.total, self.snapshots = self.weights.unpacked(tensors)


class _Weights:
    """A model's floating-point tensors in order, each once, and the way back to a state dict.

    Frozen parameters are left out: rounding in an average would move them.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        unique: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
            if tensor.is_floating_point() and not frozen:
                unique.setdefault(id(tensor), (name, tensor))
        self.names = [name for name, _ in unique.values()]
        self.live = [tensor for _, tensor in unique.values()]

    def state_from(self, values: list[Tensor]) -> dict[str, Tensor]:
        """A full state dict with `values` in place of the live tensors."""
        by_id = {
            id(w): v.detach().to(w.dtype, copy=True) for w, v in zip(self.live, values, strict=True)
        }
        state: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            averaged = by_id.get(id(tensor))
            state[name] = tensor.detach() if averaged is None else averaged
        return state

    def packed(self, values: list[Tensor], count: int) -> dict[str, Tensor]:
        pairs = zip(self.names, values, strict=True) if values else ()
        return {"count": torch.tensor(count), **{f"average:{n}": v for n, v in pairs}}

    def unpacked(self, tensors: dict[str, Tensor]) -> tuple[list[Tensor], int]:
        """Values, empty where none were packed, and the count.

        Raises:
            ConfigError: the tensors belong to another model.
        """
        stored = {key.partition(":")[2] for key in tensors if key != "count"}
        if stored and stored != set(self.names):
            odd = sorted(stored ^ set(self.names))
            raise ConfigError(
                f"the saved average belongs to another model: it differs in {odd[0]!r}"
            )
        if not stored:
            return [], int(tensors["count"])
        values = [
            tensors[f"average:{name}"].to(live.device, copy=True)
            for name, live in zip(self.names, self.live, strict=True)
        ]
        return values, int(tensors["count"])
