"""This process's rank, and the few collectives that a run needs."""

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
"""Factor on the timeout for barriers at which rank 0 may be preparing data or packing."""


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of a run.

    Attributes:
        rank: 0 to world_size - 1; rank 0 writes, logs and decides.
        local_rank: rank on this machine, the index of its GPU.
        patient: process group with a long timeout, for waiting while rank 0 works alone; None for
            a single rank.
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
        """This rank's share of the text to score."""
        if self.world_size == 1:
            return Share()
        return RankShare(self.rank, self.world_size, all_reduced)

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """Each value summed over ranks, in float64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return total.tolist()

    def broadcast_and_any(
        self, values: Sequence[float], flags: Sequence[bool]
    ) -> tuple[list[float], list[bool]]:
        """Rank 0's values, and for each flag whether any rank has set it, in one all-reduce.

        The other ranks contribute zeros, so the sums are rank 0's values bit for bit.
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
        """Wait for all ranks, with the long timeout: rank 0 may be busy for a while."""
        if self.world_size > 1:
            dist.barrier(group=self.patient)


def all_reduced(tensor: Tensor) -> Tensor:
    """A tensor summed over ranks, on the device it came from."""
    total = tensor.to(_device(), copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _patient_group(timeout_seconds: float) -> Any:
    """Always gloo, on the CPU: it only serves barriers."""
    allowed = timedelta(seconds=PATIENCE * timeout_seconds)
    return dist.new_group(backend="gloo", timeout=allowed)


def backend_of(config: TrainerConfig) -> str:
    """The torch.distributed backend."""
    return "nccl" if config.device == "cuda" else "gloo"


def started_by_torchrun() -> bool:
    """Whether torchrun, or a launcher that sets its variables, has started the ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


@contextlib.contextmanager
def torchrun_ranks(config: TrainerConfig) -> Iterator[Ranks]:
    """The process group described by torchrun's environment variables.

    Raises:
        ConfigError: the number of ranks is not `trainer.devices`.
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
    """A process group of one machine with a file rendezvous, so that no port can be taken."""
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
    """This process's rank from torchrun's environment; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))
