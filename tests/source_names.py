"""Our tensors under the names and shapes of the source they were imported from."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from gated_delta_layer import ImportedLayer, layer_state_from
from torch import Tensor

from recurgolf.importers import Imported
from recurgolf.importers.source import Place


def to_source(
    places: Iterable[Place],
    tensors: Mapping[str, Tensor | None],
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """Tensors that are named and shaped like our parameters, as the source has them.

    A source tensor of which no part is there is left out; a part that is not there is zero.

    Args:
        shapes: of the source's tensors.
    """
    found: dict[str, Tensor] = {}
    for place in places:
        tensor = tensors.get(place.ours)
        if tensor is not None:
            piece = place.from_ours(tensor)
            whole = found.setdefault(place.source, piece.new_zeros(shapes[place.source]))
            whole[place.source_index] = piece
    return found


def set_looping(imported: Imported, active: bool) -> None:
    """Without it the model runs every block once, as training does before a delayed loop begins."""
    run = copy.copy(imported.run)  # not composed: its adapters would be refused
    if not active:
        run.looping = dataclasses.replace(run.looping, passes=1, passes_eval=None)
    imported.model.run = run


def gradients(imported: Imported, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the last backward left at a whole system that was read from `source`."""
    named = {name: p.grad for name, p in imported.model.transformer.named_parameters()}
    return to_source(imported.places, named, {name: t.shape for name, t in source.items()})


def layer_gradients(model: ImportedLayer, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the last backward left at a single layer that was read from `source`."""
    found = {n: p.grad for n, p in model.layer.named_parameters()}
    found |= {n.replace("/", "."): p.grad for n, p in model.factors.items()}
    # Ours are rows of the source's, some several times: the way back is that map's derivative.
    leaves = {n: t.detach().clone().requires_grad_() for n, t in source.items()}
    _, ours = layer_state_from(model.config, leaves)
    pairs = [(ours[name], grad) for name, grad in found.items() if grad is not None]
    outputs, grads = zip(*pairs, strict=True)
    named = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
    return {n: g for n, g in zip(leaves, named, strict=True) if g is not None}
