"""Token mixers: how a block looks at earlier positions. One module each, found by being here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from recurgolf.config import Checked, import_modules


@dataclass
class Mixer(Checked):
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


MODULES = import_modules(__name__)
