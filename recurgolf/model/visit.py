"""What a block receives besides the hidden state: everything that differs from visit to visit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class VisitInputs:
    """The inputs of one visit of one block.

    Attributes:
        x0: the state behind the embedding [batch, length, dim].
        rope: cosines and sines, each [length, dims / 2]; empty where no block attends.
        adapters: projection name -> low-rank delta for this visit; empty without adapters.
        values: added to the attention values of this visit [batch, length, kv_dim], or None.
        mixer_gain, mlp_gain: gains of the two branches for this visit [dim], or None.
        documents: document number of every position [batch, length] where mixers must not cross
            documents, else None; every document is one run of positions.
        read_from: first position whose output is wanted. Earlier ones are still to be attended to;
            the block returns [batch, length - read_from, dim].
    """

    x0: Tensor
    rope: tuple[Tensor, Tensor]
    adapters: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    values: Tensor | None = None
    mixer_gain: Tensor | None = None
    mlp_gain: Tensor | None = None
    documents: Tensor | None = None
    read_from: int = 0
