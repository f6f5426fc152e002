"""Token mixers: what a block uses to look at earlier positions. One file each."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from torch import nn


@dataclass
class Mixer:
    """The configuration of a mixer; `build` gives a module `mixer(x, inputs: VisitInputs)`."""

    def check(self, dim: int) -> None:
        """Refuse sizes that do not fit the model's width."""

    def projections(self, dim: int) -> dict[str, tuple[int, int]]:
        """Linear projections by name -> (in_dim, out_dim): what adapters can be put on."""
        raise NotImplementedError

    def build(self, dim: int, block: int, num_blocks: int, norm_eps: float) -> nn.Module:
        """The module for block number `block` of `num_blocks`."""
        raise NotImplementedError

    def flops(self, dim: int, length: int) -> int:
        """Floating-point operations per token of the mixing itself, projections not counted."""
        raise NotImplementedError


# By name and where they exist: the program packed with an artifact has only the mixers it uses.
for _module in ("attention", "gated_deltanet"):
    if find_spec(f"{__name__}.{_module}") is not None:
        import_module(f"{__name__}.{_module}")
