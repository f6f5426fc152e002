"""Skip connections between visits: the output of one visit is added to the input of a later one.

`model.skips` chooses the kind. The LoopPlan alone determines which visits are paired.

Shapes: states are (B, T, D) = batch, positions, model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from recurgolf.looping import LoopPlan


def unet_pairs(plan: LoopPlan) -> dict[int, tuple[int, int]]:
    """Later visit -> (earlier visit, row of weights), paired as a stack, as in a U-Net.

    The first floor(n/2) visits are the encoder and push their outputs; each visit of the decoder
    pops the latest one that is left.
    """
    encoder = plan.num_visits // 2
    return {encoder + k: (encoder - 1 - k, k) for k in range(encoder)}


def prelude_to_coda_pairs(plan: LoopPlan) -> dict[int, tuple[int, int]]:
    """The prelude's output is added before the coda, bypassing the whole core."""
    start, stop = plan.core
    if start == 0 or stop == plan.num_visits:
        return {}
    return {stop: (start - 1, 0)}


class Skips(nn.Module):
    """`x + weight * kept`, with weights (rows, D): one row per pair, initialized to 1.

    Scoring with more passes than the largest plan has more pairs than rows: they use the last row.
    """

    def __init__(
        self, pairs: Callable[[LoopPlan], Mapping[int, tuple[int, int]]], rows: int, dim: int
    ):
        super().__init__()
        self.pairs = pairs
        self.weight = nn.Parameter(torch.ones(rows, dim))

    def join(self, x: Tensor, kept: Tensor, row: int) -> Tensor:
        return x + self._row(self.weight, row).to(x.dtype) * kept  # (D,) over (B, T, D)

    @staticmethod
    def _row(table: Tensor, row: int) -> Tensor:
        return table[min(row, len(table) - 1)]


class GatedSkips(Skips):
    """`(1 - g) * weight * kept + g * x` with g = sigmoid(gate), gate (rows, D), g = 1/2 at init."""

    def __init__(
        self, pairs: Callable[[LoopPlan], Mapping[int, tuple[int, int]]], rows: int, dim: int
    ):
        super().__init__(pairs, rows, dim)
        self.gate = nn.Parameter(torch.zeros(rows, dim))

    def join(self, x: Tensor, kept: Tensor, row: int) -> Tensor:
        kept = self._row(self.weight, row).to(x.dtype) * kept
        # lerp(kept, x, g) = (1 - g) kept + g x, in one pass over memory.
        return torch.lerp(kept, x, torch.sigmoid(self._row(self.gate, row)).to(x.dtype))


class NoSkips(nn.Module):
    """No skip connections: a null object, so that the forward pass needs no branch."""

    @staticmethod
    def pairs(plan: LoopPlan) -> dict[int, tuple[int, int]]:
        return {}

    def join(self, x: Tensor, kept: Tensor, row: int) -> Tensor:
        raise AssertionError("nothing is ever joined")


SKIPS: dict[str, Callable[[LoopPlan, int], Skips | NoSkips]] = {
    "none": lambda plan, dim: NoSkips(),
    "unet": lambda plan, dim: Skips(unet_pairs, plan.num_visits // 2, dim),
    "unet_gated": lambda plan, dim: GatedSkips(unet_pairs, plan.num_visits // 2, dim),
    "prelude_to_coda": lambda plan, dim: Skips(prelude_to_coda_pairs, 1, dim),
}
"""`model.skips` -> constructor(largest plan, dim)."""
