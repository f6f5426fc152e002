"""Per-iteration low-rank adapters: every visit of a looped block gets its own small correction.

`y = W x + (alpha / rank) B_v A_v x`, with A_v, B_v chosen by how many-th visit of the block it is
(Relaxed Recursive Transformers, 2410.20672). Adapters stay in float32 and are cast at the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, cast

import torch
from torch import Tensor, nn

from recurgolf.config import Checked, ConfigError, option
from recurgolf.limits import at_least, one_of
from recurgolf.looping import LoopPlan, Visit

NO_ADAPTERS: Mapping[str, Callable[[Tensor], Tensor]] = {}


@option("lora", "low_rank")
@dataclass
class LoRA(Checked):
    """Which projections of which visits get an adapter, and how it starts."""

    rank: Annotated[int, at_least(0)] = 0
    """0: no adapters at all."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """Projections of the block: q_proj k_proj v_proj o_proj (attention), in_proj_qkv in_proj_z
    in_proj_b in_proj_a out_proj (gated delta net), up_proj down_proj gate_proj (MLP), or `residual`
    (a correction of the block's output). In a hybrid each block takes those that it has."""
    blocks: Annotated[str, one_of("looped", "all")] = "looped"
    """looped: blocks that a plan visits more than once | all."""
    visits: Annotated[str, one_of("repeats", "all", "shared")] = "repeats"
    """repeats: from the second visit on | all: the first too | shared: one for all visits."""
    alpha: float | None = None
    """Scale is alpha / rank; null: 1."""
    init: Annotated[str, one_of("uniform", "normal")] = "uniform"
    """Start of A: uniform U(+-1/sqrt(in)) | normal N(0, 1/in). B starts at zero."""
    compat_init_fan: Annotated[str, one_of("in", "rank")] = "in"
    """`rank` reproduces a public bug: the bound of A is 1/sqrt(rank), 8 times too wide at 512/8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not 0 < abs(self.alpha) < math.inf:
            raise ConfigError(
                f"lora.alpha={self.alpha}: the scale is alpha / rank; a number other than 0, with "
                "which adapters would do nothing, or null for a scale of 1"
            )
        if self.rank and not self.targets:
            raise ConfigError(f"lora.rank={self.rank}, but lora.targets is empty")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None or self.rank == 0 else self.alpha / self.rank

    def slots(self, largest_plan: LoopPlan) -> dict[int, int]:
        """Block -> number of adapters it gets, for the plan with the most visits."""
        counts: dict[int, int] = {}
        for visit in largest_plan.visits:
            counts[visit.block] = max(counts.get(visit.block, 0), visit.nth + 1)
        if self.blocks == "looped":
            looped = largest_plan.looped_blocks
            counts = {block: count for block, count in counts.items() if block in looped}
        number = {"repeats": lambda n: n - 1, "all": lambda n: n, "shared": lambda n: 1}
        slots = {block: number[self.visits](count) for block, count in counts.items()}
        return {block: count for block, count in slots.items() if count > 0}

    def check(
        self, projections: Callable[[int], Mapping[str, tuple[int, int]]], largest_plan: LoopPlan
    ) -> None:
        """Refuse adapters that would sit on nothing.

        Args:
            projections: block -> its projections (Model.projections).
        """
        if self.rank == 0:
            return
        slots = self.slots(largest_plan)
        if not slots:
            raise ConfigError(
                f"lora.rank={self.rank} with lora.visits={self.visits}, lora.blocks={self.blocks}: "
                f"no visit qualifies in the plan {largest_plan.describe()}; loop some blocks, or "
                "set lora.blocks=all lora.visits=all, or lora.rank=0"
            )
        widest: dict[tuple[str, int], int] = {}
        for target in self.targets:
            having = [block for block in slots if target in projections(block)]
            if not having:
                known = sorted({name for block in slots for name in projections(block)})
                raise ConfigError(
                    f"lora.targets: the adapted blocks {sorted(slots)} have no projection "
                    f"{target!r}; theirs are {', '.join(known)}"
                )
            widest.update({(target, b): min(projections(b)[target]) for b in having})
        # One rank serves all targets: it may exceed narrow ones (keys, a row per head), not all.
        (target, block), limit = max(widest.items(), key=lambda item: item[1])
        if self.rank > limit:
            raise ConfigError(
                f"lora.rank={self.rank} exceeds the smaller side {limit} of {target} in block "
                f"{block}, the widest of lora.targets; from 0 (no adapters) to {limit}"
            )

    def build(
        self, projections: Callable[[int], Mapping[str, tuple[int, int]]], largest_plan: LoopPlan
    ) -> Adapters | None:
        """The adapters for a model, or None at rank 0."""
        if self.rank == 0:
            return None
        self.check(projections, largest_plan)
        return Adapters(self, projections, self.slots(largest_plan))


class LowRank:
    """The delta of one projection at one visit: `scale * (x A^T) B^T`."""

    __slots__ = ("a", "b", "scale")

    def __init__(self, a: Tensor, b: Tensor, scale: float):
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, x: Tensor) -> Tensor:
        # Two thin products: B A is never formed, which would cost a full matrix per visit.
        low = nn.functional.linear(x, self.a.to(x.dtype))  # (..., rank)
        delta = nn.functional.linear(low, self.b.to(low.dtype))  # (..., out)
        return delta if self.scale == 1.0 else delta * self.scale


class AdapterBank(nn.Module):
    """All visits' factors of one projection: A [slots, rank, in], B [slots, out, rank]."""

    def __init__(self, slots: int, rank: int, in_dim: int, out_dim: int):
        super().__init__()
        self.lora_a = nn.Parameter(torch.empty(slots, rank, in_dim))
        self.lora_b = nn.Parameter(torch.zeros(slots, out_dim, rank))


class Adapters(nn.Module):
    """The adapters of a model: `of_visit(visit)` gives those of one visit, by projection name."""

    def __init__(
        self,
        config: LoRA,
        projections: Callable[[int], Mapping[str, tuple[int, int]]],
        slots: Mapping[int, int],
    ):
        super().__init__()
        self.config = config
        self.banks = nn.ModuleDict()
        self.num_slots = dict(slots)
        for block, count in slots.items():
            shapes = projections(block)
            self.banks[str(block)] = nn.ModuleDict(
                {
                    target: AdapterBank(count, config.rank, *shapes[target])
                    for target in config.targets
                    if target in shapes
                }
            )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        for block in self.num_slots:
            for bank in self.bank(block).values():
                fan = {"in": bank.lora_a.shape[-1], "rank": self.config.rank}
                bound = 1 / math.sqrt(fan[self.config.compat_init_fan])
                if bank.lora_a.is_meta:
                    continue
                if self.config.init == "normal":
                    bank.lora_a.normal_(std=bound)
                else:
                    bank.lora_a.uniform_(-bound, bound)
                bank.lora_b.zero_()

    def bank(self, block: int) -> Mapping[str, AdapterBank]:
        """The factors of one adapted block, by projection name."""
        return cast("Mapping[str, AdapterBank]", self.banks[str(block)])

    def slot(self, visit: Visit) -> int | None:
        """Index into the banks of this visit's block; None where the visit has no adapter.

        Passes beyond those trained use the last adapter.
        """
        count = self.num_slots.get(visit.block, 0)
        index = {"repeats": visit.nth - 1, "all": visit.nth, "shared": 0}[self.config.visits]
        return None if count == 0 or index < 0 else min(index, count - 1)

    def of_visit(self, visit: Visit) -> Mapping[str, Callable[[Tensor], Tensor]]:
        slot = self.slot(visit)
        if slot is None:
            return NO_ADAPTERS
        scale = self.config.scale
        return {
            target: LowRank(bank.lora_a[slot], bank.lora_b[slot], scale)
            for target, bank in self.bank(visit.block).items()
        }
