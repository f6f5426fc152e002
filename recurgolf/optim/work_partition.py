"""Work dealt over ranks: who orthogonalises which matrix, and how the results reach everyone.

The deal is a pure function of sizes and world size. Results travel by all_gather, bit for bit, so
what is computed does not depend on how many ranks computed it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) outside torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def deal(costs: Sequence[int], world: int) -> list[int]:
    """The owner of every item: the dearest first, each to the rank with the least work so far."""
    owners = [0] * len(costs)
    if world == 1:
        return owners
    load = [0] * world
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(world), key=lambda rank: (load[rank], rank))
        owners[item] = owner
        load[owner] += costs[item]
    return owners


def exchange(
    shapes: Sequence[torch.Size],
    owners: Sequence[int],
    mine: dict[int, Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    """Every item on every rank, where each rank brings those it owns. Collective.

    Args:
        shapes: shape of every item, the same list on all ranks.
        owners: rank of every item.
        mine: item number -> tensor for this rank's items.
        dtype: of the items; one for all.
        device: of the items and of the exchange.
    """
    _, world = rank_and_world()
    if world == 1:
        return [mine[item] for item in range(len(shapes))]
    place, filled = [], [0] * world
    for shape, owner in zip(shapes, owners, strict=True):
        place.append(filled[owner])
        filled[owner] += shape.numel()
    # Equal parts keep this one call on every backend; the deal is balanced, so padding is small.
    part = max(filled)
    sent = torch.zeros(part, dtype=dtype, device=device)
    for item, tensor in mine.items():
        sent[place[item] : place[item] + tensor.numel()] = tensor.reshape(-1)
    received = torch.empty(world * part, dtype=dtype, device=device)
    # torch 2.13 renamed it; what it does is the same.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(received, sent)
    everyone = received.view(world, part)
    return [
        everyone[owner, start : start + shape.numel()].view(shape)
        for shape, owner, start in zip(shapes, owners, place, strict=True)
    ]
