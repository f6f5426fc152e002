"""In which precision the matrix products of training run."""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch

BFLOAT16_PRODUCTS = {"amx_bf16", "avx512_bf16", "bf16"}
"""Instructions of x86 and ARM processors that multiply bfloat16; without one it is emulated."""


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` becomes bfloat16 where the device says that it multiplies bfloat16, else float32.

    The same device always gives the same answer, since the result depends on it.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = not instructions().isdisjoint(BFLOAT16_PRODUCTS)
    return "bfloat16" if able else "float32"


def instructions(told: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the processor says it can do; nothing where the system does not tell."""
    with suppress(OSError):
        for line in told.read_text().splitlines():
            if line.startswith(("flags", "Features")):  # x86, ARM
                return set(line.partition(":")[2].split())
    return set()


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context that training forwards run in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
