"""torch's operations over lists of tensors, under names that its type information lacks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

add = torch._foreach_add  # pyright: ignore[reportPrivateImportUsage]
add_ = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]


def scale_(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiply every tensor in place by one factor, which is not rounded to their precision.

    On the CPU torch's own list operation rounds it: 0.99 becomes 0.988 for bfloat16 tensors.
    """
    if all(tensor.dtype == torch.float32 for tensor in tensors):
        torch._foreach_mul_(list(tensors), factor)  # pyright: ignore[reportPrivateImportUsage]
        return
    for tensor in tensors:
        tensor.mul_(factor)
