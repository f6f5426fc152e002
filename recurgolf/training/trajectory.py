"""How far quantization drives a network off its path: the error of the state behind every visit.

A looped block repeats its error at every visit, and the next visit starts from it; the score alone
does not say where it grows. Measured on a few validation windows, after the score, so that nothing
can be chosen by it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recurgolf.data.shards import Tokens
from recurgolf.looping import LoopPlan
from recurgolf.model.transformer import Transformer

WINDOWS = 8
"""Windows of the training length, spread evenly over the validation text."""


def validation_windows(tokens: Tokens, length: int) -> Tensor:
    """Ids [at most WINDOWS, length] from all over the text."""
    length = min(length, len(tokens))
    count = min(WINDOWS, len(tokens) // length)
    starts = np.linspace(0, len(tokens) - length, count).astype(np.int64)
    return torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(np.int64))


@torch.no_grad()
def trajectory(
    exact: Transformer, quantized: Transformer, plan: LoopPlan, ids: Tensor, gap_bpb: float
) -> dict[str, Any]:
    """Compare two networks along their visits.

    Args:
        ids: token ids [windows, length]; one window is in memory at a time.
        gap_bpb: what quantization costs in the score, to stand beside.

    Returns:
        For every visit, and for the state that the head reads: `relative_error` |x_q - x| / |x|,
        `rms` of x and `rms_quantized` of x_q, over all positions and channels.
    """
    visits = [Deviation() for _ in range(plan.num_visits)]
    read = Deviation()
    for model in (exact, quantized):
        model.eval()
    for window in ids.to(exact.embed.weight.device).split(1):
        states: list[Tensor] = []
        final = exact.hidden(window, plan, observe=lambda _, x, kept=states: kept.append(x))

        def compare(position: int, x: Tensor, exact_states: list[Tensor] = states) -> None:
            visits[position].add(exact_states[position], x)

        read.add(final, quantized.hidden(window, plan, observe=compare))
    return {
        "text": f"{len(ids)} validation windows of {ids.shape[1]} tokens, after scoring",
        "gap_bpb": gap_bpb,
        "visits": [
            {"block": visit.block, "visit": visit.nth + 1, **deviation.figures()}
            for visit, deviation in zip(plan.visits, visits, strict=True)
        ],
        "readout": read.figures(),
    }


class Deviation:
    """Sums of squares of a state, of its quantized twin and of their difference."""

    def __init__(self) -> None:
        self.exact = self.quantized = self.error = 0.0
        self.count = 0

    def add(self, exact: Tensor, quantized: Tensor) -> None:
        exact, quantized = exact.double(), quantized.double()
        self.exact += float(exact.square().sum())
        self.quantized += float(quantized.square().sum())
        self.error += float((quantized - exact).square().sum())
        self.count += exact.numel()

    def figures(self) -> dict[str, float]:
        count, tiny = max(self.count, 1), 1e-300
        return {
            "relative_error": (self.error / max(self.exact, tiny)) ** 0.5,
            "rms": (self.exact / count) ** 0.5,
            "rms_quantized": (self.quantized / count) ** 0.5,
        }


def trajectory_lines(found: dict[str, Any]) -> list[str]:
    """The report for people."""
    lines = [f"error of the state behind every visit ({found['text']})"]
    for position, at in enumerate(found["visits"]):
        lines.append(
            f"  visit {position:2d}: block {at['block']}, visit {at['visit']} of it | relative "
            f"error {at['relative_error']:.2e} | rms {at['rms']:.3f}, quantized "
            f"{at['rms_quantized']:.3f}"
        )
    read = found["readout"]
    lines.append(
        f"  readout: relative error {read['relative_error']:.2e}; the score loses "
        f"{found['gap_bpb']:+.4f} bpb"
    )
    return lines
