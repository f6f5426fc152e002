"""Calibration: what GPTQ asks about the inputs of a layer, and where the text comes from.

The quantizer weighs errors by H = XᵀX of a layer's inputs. `GramCollector` forms it with hooks on
modules, batch by batch; it knows modules and names and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from recurgolf.config import Checked, ConfigError, option
from recurgolf.limits import above, at_least


class TextSource(Protocol):
    """Where token ids can come from; rows are [len(numbers), length], int64.

    A row depends on its number alone, so that any split over ranks and batches gives one text.
    """

    def training_rows(self, numbers: Sequence[int], length: int, of: int) -> Tensor:
        """Rows number `numbers` of `of` different windows of the training tokens."""
        ...

    def sampled_rows(self, numbers: Sequence[int], length: int, temperature: float) -> Tensor:
        """Rows that the model writes itself."""
        ...


@dataclass
class Calibration(Checked):
    """How much text the Gram matrices are taken from, and how visits are pooled."""

    reads_training_data: ClassVar[bool] = False
    """Whether the challenge counts the time as training."""

    sequences: Annotated[int, at_least(1)] = 64
    """Rows of text over all ranks."""
    seq_len: Annotated[int | None, at_least(1)] = None
    """Tokens of a row; null: as in training."""
    batch: Annotated[int, at_least(1)] = 8
    """Rows in memory at once; changes no result."""
    visit_weights: Annotated[list[float], at_least(0)] = field(default_factory=list)
    """How much the inputs at the first, second, … visit of a looped block count; the last one
    stands for all later visits. Empty: all visits alike."""
    two_phase: bool = False
    """Quantize what is visited once first, then the looped blocks with inputs from the network
    that is already quantized elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.visit_weights and not any(self.visit_weights):
            raise ConfigError(
                f"quant.calibration.visit_weights={self.visit_weights}: at least one above 0"
            )

    def check_text(self, train_tokens: int, seq_len: int) -> None:
        """Refuse more text than there is."""

    def rows(self, source: TextSource, numbers: Sequence[int], length: int) -> Tensor:
        """Token ids [len(numbers), length]."""
        raise NotImplementedError


@option("quant/calibration", "train")
@dataclass
class TrainCalibration(Calibration):
    """Windows of the training tokens, none twice, drawn with `seeds.data`."""

    reads_training_data: ClassVar[bool] = True

    def check_text(self, train_tokens: int, seq_len: int) -> None:
        length = self.seq_len or seq_len
        if self.sequences * length > train_tokens:
            raise ConfigError(
                f"quant.calibration.sequences={self.sequences} of {length} tokens are "
                f"{self.sequences * length:,} tokens, but the training set has {train_tokens:,}: "
                f"at most {train_tokens // length} sequences"
            )

    def rows(self, source: TextSource, numbers: Sequence[int], length: int) -> Tensor:
        return source.training_rows(numbers, length, self.sequences)


@option("quant/calibration", "self_generated")
@dataclass
class SelfGenerated(Calibration):
    """Text that the model writes, token by token, with `seeds.noise`; it reads no data at all.

    Every token costs a forward over its row: `sequences` x `seq_len` of them, half as long on
    average.
    """

    temperature: Annotated[float, above(0)] = 1.0
    """Below 1 the model repeats what it is sure of, above 1 it wanders."""

    def rows(self, source: TextSource, numbers: Sequence[int], length: int) -> Tensor:
        return source.sampled_rows(numbers, length, self.temperature)


class GramCollector:
    """Sums of xxᵀ over the inputs of layers, in float32 whatever autocast does.

    Inside `with collector:` every call of a watched module adds its inputs. Calls of one module
    between two `begin`s are its visits, in order.

    Attributes:
        sums: weight name -> [cols, cols]; divide by `tokens` for means.
        tokens: positions that were announced to `begin`.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        others: Mapping[str, int] | None = None,
        visit_weights: Mapping[str, Sequence[float]] | None = None,
        device: torch.device | str = "cpu",
    ):
        """
        Args:
            layers: weight name [rows, cols] -> the module that multiplies its first argument by it.
            others: weight name -> cols, for weights whose inputs the caller hands to `add`.
            visit_weights: weight name -> how much its first, second, … visit counts, the last one
                for all later visits; where none are given, all visits alike.
        """
        self.layers = dict(layers)
        self.visit_weights = dict(visit_weights or {})
        cols = {name: _weight(module).shape[1] for name, module in self.layers.items()}
        self.sums = {
            name: torch.zeros(count, count, device=device)
            for name, count in {**cols, **(others or {})}.items()
        }
        self.tokens = 0
        self._visits: dict[str, int] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> GramCollector:
        for name, module in self.layers.items():
            self._hooks.append(module.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def begin(self, tokens: int) -> None:
        """A new forward over so many positions: the next call of a module is its first visit."""
        self.tokens += tokens
        self._visits.clear()

    @torch.no_grad()
    def add(self, name: str, x: Tensor) -> None:
        """Inputs [..., cols] of one visit."""
        visit = self._visits.get(name, 0)
        self._visits[name] = visit + 1
        weight = self._weight_of(name, visit)
        if weight == 0:
            return
        # Inside autocast the product would be rounded to bfloat16, and with a dominant direction
        # the sum is then no longer positive definite.
        with torch.autocast(x.device.type, enabled=False):
            flat = x.detach().reshape(-1, x.shape[-1]).float()
            self.sums[name].addmm_(flat.T, flat, alpha=weight)

    def grams(self) -> dict[str, Tensor]:
        """Mean over positions of the (weighted) sum over visits, on the CPU.

        Raises:
            ValueError: a layer that was never called.
        """
        silent = [name for name, total in self.sums.items() if not total.any()]
        if silent or not self.tokens:
            raise ValueError(
                f"calibration: no input ever reached {', '.join(silent) or 'any layer'}; quantize "
                "it with method rtn"
            )
        return {name: (total / self.tokens).cpu() for name, total in self.sums.items()}

    def _weight_of(self, name: str, visit: int) -> float:
        weights = self.visit_weights.get(name)
        return weights[min(visit, len(weights) - 1)] if weights else 1.0

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, arguments: self.add(name, arguments[0])


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
