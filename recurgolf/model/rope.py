"""Rotary positions in the half-split layout: dimension i turns with dimension i + dims/2."""

import torch
from torch import Tensor


def rope_base(base: float, dims: int, length: int, train_len: int | None) -> float:
    """The base for sequences of `length`: NTK-aware, `base * s**(dims/(dims-2))` beyond training.

    Args:
        train_len: training length from which on the base grows; None leaves it as it is.
    """
    if train_len is None or length <= train_len or dims <= 2:
        return base
    return base * (length / train_len) ** (dims / (dims - 2))


def rope_table(length: int, dims: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [length, dims / 2] in float32."""
    frequencies = base ** -(torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first `dims` of the head dimension; the rest passes through.

    Args:
        x: queries or keys [batch, heads, length, head_dim].
        table: what `rope_table` gave for this length.
    """
    cos, sin = (t.to(x.dtype) for t in table)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)
