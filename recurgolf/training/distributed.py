"""Ranks: who this process is, and the few collectives that a run needs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from recurgolf.config import ConfigError
from recurgolf.eval import RankShare, Share
from recurgolf.settings import TrainerConfig

T = TypeVar("T")

PATIENCE = 10
"""Times the usual timeout, for waiting while rank 0 prepares data or packs."""


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run.

    Attributes:
        rank: 0 to world_size - 1; rank 0 writes, logs and decides.
        local_rank: number on this machine, which picks the GPU.
        patient: a process group for waiting while rank 0 works alone; None for a single rank.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    patient: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def share(self) -> Share:
        """This rank's part of a scoring."""
        if self.world_size == 1:
            return Share()
        return RankShare(self.rank, self.world_size, all_reduced)

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """Each value added up over ranks, in float64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return total.tolist()

    def broadcast_and_any(
        self, values: Sequence[float], flags: Sequence[bool]
    ) -> tuple[list[float], list[bool]]:
        """Rank 0's values, and which flags any rank has raised, in one all-reduce.

        The other ranks contribute zeros, so that the sum is rank 0's number to the last bit.
        """
        if self.world_size == 1:
            return list(values), list(flags)
        own = list(values) if self.is_first else [0.0] * len(values)
        total = self.all_reduce([*own, *map(float, flags)])
        return total[: len(values)], [count > 0 for count in total[len(values) :]]

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: T) -> list[T]:
        """The value of every rank, in order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks, patiently: rank 0 may have much to do alone."""
        if self.world_size > 1:
            dist.barrier(group=self.patient)


def all_reduced(tensor: Tensor) -> Tensor:
    """A tensor's sum over ranks, back on the device that it came from."""
    total = tensor.to(_device(), copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _patient_group(timeout_seconds: float) -> Any:
    """On the CPU always: nothing is computed there."""
    allowed = timedelta(seconds=PATIENCE * timeout_seconds)
    return dist.new_group(backend="gloo", timeout=allowed)


def backend_of(config: TrainerConfig) -> str:
    """Which library carries the collectives."""
    return "nccl" if config.device == "cuda" else "gloo"


def started_by_torchrun() -> bool:
    """Whether torchrun (or another launcher with its variables) already made the ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


@contextlib.contextmanager
def torchrun_ranks(config: TrainerConfig) -> Iterator[Ranks]:
    """The process group that torchrun's environment describes.

    Raises:
        ConfigError: other than `trainer.devices` ranks.
    """
    timeout = timedelta(seconds=config.rank_timeout_seconds)
    dist.init_process_group(backend_of(config), timeout=timeout)
    try:
        world_size = dist.get_world_size()
        if world_size != config.devices:
            raise ConfigError(
                f"trainer.devices={config.devices}, but torchrun has started {world_size} ranks "
                "(nnodes x nproc_per_node)"
            )
        local = int(os.environ.get("LOCAL_RANK", "0"))
        yield Ranks(dist.get_rank(), world_size, local, _patient_group(config.rank_timeout_seconds))
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def file_ranks(
    backend: str, rendezvous: str, rank: int, world_size: int, timeout_seconds: float
) -> Iterator[Ranks]:
    """A process group of one machine that meets in a file (no port to collide on)."""
    dist.init_process_group(
        backend,
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        yield Ranks(rank, world_size, rank, _patient_group(timeout_seconds))
    finally:
        dist.destroy_process_group()


def environment_rank() -> int:
    """This process's rank by torchrun's environment; 0 outside it."""
    return int(os.environ.get("RANK", "0"))
