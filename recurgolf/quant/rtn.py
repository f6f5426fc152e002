"""Rounding to nearest: the plain quantizer, and its straight-through form for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recurgolf.quant.clip import Clip
from recurgolf.quant.quantized_tensor import dequantize, per_column, scale_shape
from recurgolf.quant.quantizer_grid import Grid, QuantizerGrid, fit_grids, limited, vector_grid


def rtn_quantize(
    weight: Tensor,
    *,
    bits: int,
    clip: Clip,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_floor: str | None = None,
    code_scale: str = "stored",
    vector_zero_scale: float = 0.0,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """Round every row (or group of columns) of a weight to integer codes.

    Args:
        weight: floating, any shape. A matrix [rows, cols] gets a scale per row or per group, any
            other tensor a single one.
        bits: 1 (sign), 2 (symmetric: ternary) to 8.
        clip: which magnitude the highest code stands for.
        scale_floor, code_scale, vector_zero_scale: habits of public systems, see `QuantizerGrid`.

    Returns:
        Codes, int8 of the weight's shape, and scales as `dequantize` takes them.

    Raises:
        ConfigError: bits, groups or clip that make no grid.
        ValueError: weights that are not finite, or too large for float16 scales.
    """
    spec = QuantizerGrid(
        bits, clip, group_size, symmetric, scale_floor, code_scale, vector_zero_scale, scale_dtype
    )
    codes, grid = round_to_grid(weight, spec)
    return codes.to(torch.int8), checked_scales(grid, weight)


def round_to_grid(weight: Tensor, spec: QuantizerGrid) -> tuple[Tensor, Grid]:
    """Float32 codes of the weight's shape and the grid they are on; nothing is checked."""
    weight = weight.detach().float()
    if weight.ndim != 2 or weight.numel() == 0:
        return _round_vector(weight, spec)
    grids = fit_grids(weight, spec)
    rounded = limited(weight, spec)
    options = [(grid.round(rounded), grid) for grid in grids]
    if len(options) == 1:
        return options[0]
    errors = [squared_error(weight, codes, grid) for codes, grid in options]
    return options[int(torch.stack(errors).argmin())]


def squared_error(weight: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    """Mean squared error of the weights that a reader will see."""
    spec = grid.spec
    restored = dequantize(codes, grid.scales, group_size=spec.group_size, symmetric=spec.symmetric)
    return (weight - restored).square().mean()


def fake_quantize(weight: Tensor, spec: QuantizerGrid, mode: str = "straight_through") -> Tensor:
    """The weight as training with quantization sees it, from the export quantizer itself.

    Args:
        mode: `straight_through` gives the exported values, `noise` adds uniform noise of one step
            (± half a step) instead, fresh on every call. The gradient is the identity either way.
    """
    return weight + _DISTURBANCES[mode](weight.detach().float(), spec).to(weight.dtype)


def exported(weight: Tensor, spec: QuantizerGrid) -> Tensor:
    """The values that a reader will see in place of a weight, float32."""
    codes, grid = round_to_grid(weight, spec)
    return dequantize(codes, grid.scales, group_size=spec.group_size, symmetric=spec.symmetric)


def step_sizes(weight: Tensor, spec: QuantizerGrid) -> Tensor:
    """Distance between neighbouring codes of a matrix, float32, broadcastable over it."""
    weight = weight.detach().float()
    single = len(grids := fit_grids(weight, spec)) == 1
    grid = grids[0] if single else round_to_grid(weight, spec)[1]
    scales = grid.scales if spec.symmetric else grid.scales[0]
    return per_column(scales.float(), tuple(weight.shape), spec.group_size)


def checked_scales(grid: Grid, weight: Tensor) -> Tensor:
    """The stored scales, or a ValueError where they cannot stand for the weight."""
    if not torch.isfinite(grid.scales).all():
        what = "is beyond float16 scales" if torch.isfinite(weight).all() else "is not finite"
        largest = float(weight.detach().abs().max())
        raise ValueError(f"quant: a weight of shape {tuple(weight.shape)} {what} (max {largest:g})")
    return grid.scales


def _round_vector(weight: Tensor, spec: QuantizerGrid) -> tuple[Tensor, Grid]:
    if weight.numel() == 0:
        shape = scale_shape(tuple(weight.shape), spec.group_size, spec.symmetric)
        scales = torch.zeros(shape, dtype=spec.scale_dtype)
        return torch.zeros_like(weight), Grid(spec, scales.float(), None, scales)
    grid = vector_grid(weight.reshape(-1), spec)
    row_spec = Grid(_per_row(spec), grid.step, grid.offset, grid.scales)
    codes = row_spec.round(spec.clip.limit_vector(weight.reshape(-1))[None]).reshape(weight.shape)
    return codes, Grid(spec, grid.step, grid.offset, grid.scales.squeeze(-1))


def _per_row(spec: QuantizerGrid) -> QuantizerGrid:
    return QuantizerGrid(spec.bits, spec.clip, None, spec.symmetric)


def _rounding_error(weight: Tensor, spec: QuantizerGrid) -> Tensor:
    return exported(weight, spec) - weight


def _uniform_noise(weight: Tensor, spec: QuantizerGrid) -> Tensor:
    return (torch.rand_like(weight) - 0.5) * step_sizes(weight, spec)


_DISTURBANCES: dict[str, Any] = {
    "straight_through": _rounding_error,
    "noise": _uniform_noise,
}
