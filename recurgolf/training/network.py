"""How the blocks are run in training: compiled, and with or without keeping what is inside them."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from recurgolf.model.transformer import Transformer
from recurgolf.model.visit import VisitInputs
from recurgolf.settings import TrainerConfig

GRAPHS_OF_A_BLOCK = 256
"""Blocks share their code, and every visit with adapters or gains of its own is a graph."""


def shape_network(model: Transformer, config: TrainerConfig) -> None:
    """Set a model up for training as the config asks; its parameters and names stay."""
    if config.activation_checkpointing:
        model.apply_block = visited_and_forgotten  # type: ignore[method-assign]
    if config.compile:
        torch._dynamo.config.recompile_limit = GRAPHS_OF_A_BLOCK
        torch._dynamo.config.accumulated_recompile_limit = 8 * GRAPHS_OF_A_BLOCK
        for block in model.blocks:
            block.compile(backend=config.compile_backend, dynamic=False)


def visited_and_forgotten(block: nn.Module, x: Tensor, inputs: VisitInputs) -> Tensor:
    """One visit that keeps its input alone; the backward pass computes the rest again.

    The copy matters: `inputs` will describe the next visits by then.
    """
    return recomputed(block, x, dataclasses.replace(inputs), use_reentrant=False)  # type: ignore[return-value]


def uncompiled() -> AbstractContextManager[object]:
    """Inside, compiled blocks run as they are written: scoring has shapes of its own."""
    # A program that never loaded the compiler has nothing compiled, and loading it takes seconds.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


__all__ = ["shape_network", "uncompiled", "visited_and_forgotten"]
