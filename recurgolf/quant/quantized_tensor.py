"""Quantized tensors as plain tensors, and the way back to weights.

All that a reader of an artifact needs of quantization: torch alone, nothing of the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes with the scales that turn them into weights.

    Attributes:
        codes: int8, shape of the weight.
        scales: what `dequantize` multiplies by, see there for its shape.
        bits: width of the codes, 1 to 8; one byte holds each in memory whatever it says.
        group_size: columns that share a scale; None: a whole row.
        symmetric: no offset; zero is code 0.
        method: how the codes were found (`rtn`, `gptq`), for the table only.
        clip: the clip rule in words, for the table only.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    method: str = "rtn"
    clip: str = ""

    def dequantize(self) -> Tensor:
        """The weight, float32."""
        return dequantize(
            self.codes, self.scales, group_size=self.group_size, symmetric=self.symmetric
        )


Stored = Tensor | QuantizedTensor

LQER_PARTS = (":lqer_out", ":lqer_in")
"""Behind a weight's name: factors [rank, rows] and [rank, cols] of a correction to be added."""


def code_range(bits: int, symmetric: bool = True) -> tuple[int, int]:
    """Lowest and highest code. One symmetric bit is the sign: -1 and 1, never 0."""
    if not symmetric:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    high = max(2 ** (bits - 1) - 1, 1)
    return -high, high


def scale_shape(shape: tuple[int, ...], group_size: int | None, symmetric: bool) -> tuple[int, ...]:
    """Shape of the scales of a tensor: rows, or rows × groups, or () for what is no matrix.

    Without symmetry the steps and the offsets are stacked: a leading dimension of two.
    """
    rows: tuple[int, ...] = ()
    if len(shape) == 2:
        groups = () if group_size is None else (-(-shape[1] // group_size),)
        rows = (shape[0], *groups)
    return rows if symmetric else (2, *rows)


def per_column(values: Tensor, shape: tuple[int, ...], group_size: int | None) -> Tensor:
    """Per-row [rows] or per-group [rows, groups] values so that they broadcast over the weight."""
    if len(shape) != 2:
        return values
    if group_size is None:
        return values[:, None]
    return values.repeat_interleave(group_size, dim=1)[:, : shape[1]]


def dequantize(
    codes: Tensor, scales: Tensor, *, group_size: int | None = None, symmetric: bool = True
) -> Tensor:
    """Weights from codes: `code * step`, or `code * step + offset` where not symmetric; float32.

    Args:
        codes: int8, any shape; rows are the first dimension of a matrix.
        scales: steps of shape [rows] or [rows, groups], a scalar for a tensor that is no matrix;
            without symmetry [2, …] with the steps first and the offsets second.
    """
    shape = tuple(codes.shape)
    if symmetric:
        return codes.float() * per_column(scales.float(), shape, group_size)
    step, offset = (per_column(part, shape, group_size) for part in scales.float().unbind(0))
    return codes.float() * step + offset


def dequantize_state(
    state: Mapping[str, Stored], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A state dict of weights: floating tensors in `dtype`, integers and flags as they are.

    Low-rank corrections are added to their weights and have no entry of their own.
    """
    plain = {
        name: value.dequantize() if isinstance(value, QuantizedTensor) else value
        for name, value in state.items()
    }
    weights = {}
    for name, tensor in plain.items():
        if name.endswith(LQER_PARTS):
            continue
        out, into = (plain.get(name + part) for part in LQER_PARTS)
        if out is not None and into is not None:
            tensor = tensor + out.float().T @ into.float()
        weights[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return weights
