"""In which precision the matrix products of training run."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` becomes bfloat16 on a GPU, and on a CPU whichever its matrix units run faster.

    CPUs differ by a factor of ten here: with AMX bfloat16 is several times faster than float32,
    with plain AVX-512 it can be half as fast.
    """
    if precision != "auto":
        return precision
    return "bfloat16" if device.type == "cuda" else faster_on_cpu()


@cache
def faster_on_cpu() -> str:
    """Times one matrix product in both; bfloat16 must win clearly, since it costs accuracy."""
    seconds = {dtype: _product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    wins = seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]
    return "bfloat16" if wins else "float32"


def _product_seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(1024, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return best


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context that training forwards run in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
