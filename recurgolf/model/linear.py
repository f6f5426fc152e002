"""Matrices of the network: no bias, cast to the activations, room for adapters and QAT."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """`y = x W^T (+ adapter(x))` with W [out_dim, in_dim] kept in float32.

    Attributes:
        zero_init: starts at zero (projections that write to the residual stream).
        fake_quantize: applied to the weight in every training forward when quantization-aware
            training is on; None otherwise.
    """

    def __init__(self, in_dim: int, out_dim: int, *, zero_init: bool = False):
        super().__init__()
        self.in_dim, self.out_dim, self.zero_init = in_dim, out_dim, zero_init
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.fake_quantize: Callable[[Tensor], Tensor] | None = None

    @property
    def seen_weight(self) -> Tensor:
        """The weight that a forward works with now."""
        if self.fake_quantize is not None and self.training:
            return self.fake_quantize(self.weight)
        return self.weight

    def forward(self, x: Tensor, adapter: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        # Weights stay in float32, so that optimizer, averages and quantizer see every update;
        # the cast is cheap beside the product. Adapters are added outside the fake quantizer:
        # they are stored beside the matrix, not in it.
        y = F.linear(x, self.seen_weight.to(x.dtype))
        return y if adapter is None else y + adapter(x).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_dim} -> {self.out_dim}"


class Embedding(nn.Embedding):
    """A table of vectors [count, dim]; quantization-aware training reaches it as it does `Linear`.

    A tied table also reads out: both uses take `seen_weight`.
    """

    def __init__(self, count: int, dim: int):
        # As nn.Embedding draws it. Drawn without storage it would load torch's compiler: a second.
        super().__init__(count, dim, _weight=torch.randn(count, dim))
        self.fake_quantize: Callable[[Tensor], Tensor] | None = None

    @property
    def seen_weight(self) -> Tensor:
        """The table that a forward works with now."""
        if self.fake_quantize is not None and self.training:
            return self.fake_quantize(self.weight)
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.seen_weight)


def init_linear(layer: Linear, how: str, zero_output: bool, orthogonal_min_side: int = 64) -> None:
    """Fill a layer: `uniform` is torch's default U(+-1/sqrt(in)), `orthogonal` has gain 1.

    Args:
        zero_output: fill layers that say so with zeros.
        orthogonal_min_side: matrices with a smaller side stay uniform under `orthogonal`.
    """
    if layer.zero_init and zero_output:
        nn.init.zeros_(layer.weight)
    elif how == "orthogonal" and min(layer.weight.shape) >= orthogonal_min_side:
        nn.init.orthogonal_(layer.weight)
    else:
        bound = 1 / math.sqrt(layer.in_dim)
        nn.init.uniform_(layer.weight, -bound, bound)
