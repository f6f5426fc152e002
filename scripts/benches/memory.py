"""Peak memory of a step and its time at 1 to 16 passes, with and without activation checkpointing.

Memory is that of all tensors alive at once, counted at every operation, without the weights.
"""

from __future__ import annotations

import argparse
import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import recurgolf
from recurgolf.training.network import shape_network

PASSES = (1, 2, 4, 8, 16)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while it is entered.

    Attributes:
        alive, peak: bytes now, and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if _is(tensor):
                self._count(tensor)
        return result

    def ignore(self, tensors: Any) -> None:
        """Leave out what was there before: weights and inputs."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage()._cdata)

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def peak_above(work: Callable[[], object], device: torch.device) -> int:
    """Bytes at most during `work`, above what is alive before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with PeakMemory() as memory:
        # By type(): isinstance() would call the properties of whatever is alive.
        memory.ignore(t for t in gc.get_objects() if issubclass(type(t), torch.Tensor))
        work()
    return memory.peak


def step_cost(overrides: list[str], rounds: int) -> tuple[int, float]:
    """Peak bytes above the weights, and the best seconds, of forward and backward."""
    run = recurgolf.compose(overrides)
    model, plan = run.build_model(), run.plan(1.0)
    shape_network(model, run.trainer)
    rows = max(1, run.trainer.batch_tokens // run.trainer.seq_len)
    x = torch.randint(0, run.data.vocab_size, (rows, run.trainer.seq_len))
    y = torch.randint(0, run.data.vocab_size, (rows, run.trainer.seq_len))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(x, plan, y).backward()

    step()
    model.zero_grad(set_to_none=True)
    peak = peak_above(step, x.device)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return peak, min(seconds)


def main(asked: argparse.Namespace) -> None:
    """A table over passes, and the ratio that activation checkpointing is for."""
    print("passes   kept MB      ms   recomputed MB      ms")
    ratios = []
    for passes in PASSES:
        own = [f"looping.passes={passes}", *asked.overrides]
        kept = step_cost(own, min(asked.rounds, 3))
        less = step_cost([*own, "trainer.activation_checkpointing=true"], min(asked.rounds, 3))
        ratios.append(less[0])
        print(
            f"{passes:6d} {kept[0] / 1e6:9.1f} {1e3 * kept[1]:7.0f} {less[0] / 1e6:15.1f} "
            f"{1e3 * less[1]:7.0f}"
        )
    ratio = ratios[-1] / ratios[0]
    print(f"recomputed: 16 passes / 1 pass: {ratio:.2f} (at most 2)")
