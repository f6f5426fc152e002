"""The gated delta rule by the kernels of flash-linear-attention, where there is a GPU for them.

An optional extra (`pip install recurgolf[fla]`). The kernels compute in half precision with sums in
float32; they are taken for training under autocast alone. Float32 keeps the form of delta_rule.py,
so that a score does not depend on what is installed. Tested against the sequential form on GPUs
(`pytest -m gpu`); on the CPU these kernels do not run.
"""

from __future__ import annotations

import math
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from recurgolf.config import ConfigError

MAX_KEY_DIM = 256
"""Widest key that the kernels hold."""


def missing(k: Tensor, v: Tensor) -> str:
    """Why the kernels cannot be used for such keys and values; empty where they can."""
    if not v.is_cuda:
        return f"the tensors are on the {v.device.type}; it needs a GPU"
    if v.dtype not in (torch.bfloat16, torch.float16):
        return f"values are {v.dtype}; it computes in half precision"
    if k.shape[-1] > MAX_KEY_DIM:
        return f"keys are {k.shape[-1]} wide; at most {MAX_KEY_DIM}"
    absent = [name for name in ("triton", "fla") if find_spec(name) is None]
    return f"{' and '.join(absent)} is not installed (recurgolf[fla])" if absent else ""


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Shapes and meaning as in `gated_delta_rule`; the state is float32.

    Raises:
        ConfigError: no GPU, no kernels, or inputs they do not take.
    """
    reason = missing(k, v)
    if reason:
        raise ConfigError(f"gated delta rule: form='kernel' cannot run: {reason}")
    # A document's start forgets by -inf, of which the kernels' running sums would make nan.
    floor = math.log(torch.finfo(torch.float32).tiny)
    return import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        log_decay.float().clamp(min=floor),
        beta.float(),
        scale=scale,
        initial_state=None if state is None else state.float(),
        output_final_state=True,
    )
