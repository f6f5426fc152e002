"""Loaders: in which order the training tokens are met, and which rank gets which of them.

A loader hands out micro-steps: `next_batch(global_tokens, grad_accum)` is this rank's part of one
of the `grad_accum` micro-steps that make an optimizer step of `global_tokens` tokens in all.
Its state is a few numbers, so a run continues exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recurgolf.config import ConfigError, option
from recurgolf.data.shards import DataError, Shard, Tokens, TokenStream


class Loader:
    """An endless supply of this rank's training batches.

    Attributes:
        seq_len: tokens in a row of a batch.
        rank, world_size: which rank of how many this one serves.
    """

    def __init__(self, seq_len: int, rank: int, world_size: int) -> None:
        self.seq_len = seq_len
        self.rank = rank
        self.world_size = world_size

    def next_batch(self, global_tokens: int, grad_accum: int) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the next micro-step.

        Args:
            global_tokens: tokens of a whole optimizer step, over all ranks and micro-steps.
            grad_accum: micro-steps per optimizer step.

        Returns:
            x and y, int64 [global_tokens / (world_size * grad_accum * seq_len), seq_len]; y is the
            token behind each x.
        """
        self.check(global_tokens, grad_accum)
        return self._next_rows(global_tokens // (self.world_size * grad_accum * self.seq_len))

    def check(self, global_tokens: int, grad_accum: int) -> None:
        """Refuse a batch that the training tokens cannot fill once."""
        raise NotImplementedError

    def order_key(self, world_size: int, grad_accum: int) -> str:
        """What the order of the tokens depends on besides data and seed, in words; empty: nothing.

        A run may be continued on another number of ranks or micro-steps when the words stay.
        """
        return ""

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain numbers for JSON."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, with the same data, seed, rank and seq_len."""
        raise NotImplementedError

    def _next_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@dataclass
class LoaderConfig:
    """A kind of loader."""

    def build(
        self, shards: list[Path], *, seq_len: int, rank: int, world_size: int, seed: int
    ) -> Loader:
        """The loader of one rank over the training shards."""
        raise NotImplementedError


@option("data/loader", "shuffled")
@dataclass
class ShuffledConfig(LoaderConfig):
    """Windows of the whole stream, in a new order and with a new phase every epoch."""

    def build(
        self, shards: list[Path], *, seq_len: int, rank: int, world_size: int, seed: int
    ) -> ShuffledLoader:
        return ShuffledLoader(TokenStream(shards), seq_len, rank, world_size, seed)


@option("data/loader", "sequential")
@dataclass
class SequentialConfig(LoaderConfig):
    """The stream from its beginning, without shuffling: the official baseline's order."""

    def build(
        self, shards: list[Path], *, seq_len: int, rank: int, world_size: int, seed: int
    ) -> SequentialLoader:
        return SequentialLoader(TokenStream(shards), seq_len, rank, world_size)


@option("data/loader", "rank_shards_shuffled")
@dataclass
class RankShardsShuffledConfig(LoaderConfig):
    """Every rank shuffles shards of its own (per_iteration_lora's order)."""

    seed_includes_run_seed: bool = True
    """False: seeded with the rank alone, so that all runs see one order (compat: the source's)."""

    def build(
        self, shards: list[Path], *, seq_len: int, rank: int, world_size: int, seed: int
    ) -> RankShardsLoader:
        if world_size > len(shards):
            raise ConfigError(
                f"data.loader=rank_shards_shuffled gives every rank shards of its own, but there "
                f"are {world_size} ranks and {len(shards)} training shards; use fewer ranks, "
                "smaller shards, or data/loader=shuffled"
            )
        entropy = [seed, rank] if self.seed_includes_run_seed else rank
        return RankShardsLoader(shards[rank::world_size], seq_len, rank, world_size, entropy)


class ShuffledLoader(Loader):
    """One global sequence of windows, the same for any number of ranks and micro-steps.

    An epoch cuts the stream in windows of `seq_len` tokens (each with the token behind it), from a
    phase that changes per epoch, and permutes them; epochs follow each other without a gap. A
    micro-step takes the next windows of that sequence, rank after rank. The order depends on the
    seed and the epoch's number only, so the state is one number.
    """

    def __init__(
        self, stream: TokenStream, seq_len: int, rank: int, world_size: int, seed: int
    ) -> None:
        super().__init__(seq_len, rank, world_size)
        self._stream = stream
        self._seed = seed
        self._taken = 0
        # Epochs are equally long, and there is room for them at seq_len phases or a few more, so
        # that the last tokens of the stream are met as often as others.
        self._epoch_windows = max(stream.num_tokens - seq_len, 0) // seq_len
        self._phases = stream.num_tokens - self._epoch_windows * seq_len
        self._epoch = -1
        self._starts = np.empty(0, dtype=np.int64)

    def check(self, global_tokens: int, grad_accum: int) -> None:
        if global_tokens > self._epoch_windows * self.seq_len:
            raise DataError(
                f"fewer training tokens than one batch: {self._stream.num_tokens} tokens give "
                f"{self._epoch_windows} windows of {self.seq_len} at any phase, a batch of "
                f"{global_tokens} tokens needs {global_tokens // self.seq_len}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"windows": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._taken = int(state["windows"])

    def _next_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        first = self._taken + self.rank * rows
        self._taken += self.world_size * rows
        starts = [self._start(window) for window in range(first, first + rows)]
        return _shifted([self._stream.read(start, self.seq_len + 1) for start in starts])

    def _start(self, window: int) -> int:
        epoch, index = divmod(window, self._epoch_windows)
        if epoch != self._epoch:
            rng = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            phase = rng.integers(self._phases)
            self._starts = phase + rng.permutation(self._epoch_windows) * self.seq_len
            self._epoch = epoch
        return int(self._starts[index])


class SequentialLoader(Loader):
    """Spans of the stream, one after the other, around its end and forever.

    A micro-step takes from the stream, for each rank in turn, its tokens and one more, the last
    target; the transition from one span to the next is never trained. So the order is the same for
    the same number of spans in a step: ranks x micro-steps.
    """

    def __init__(self, stream: TokenStream, seq_len: int, rank: int, world_size: int) -> None:
        super().__init__(seq_len, rank, world_size)
        self._stream = stream
        self._position = 0

    def check(self, global_tokens: int, grad_accum: int) -> None:
        needed = global_tokens + self.world_size * grad_accum
        if needed > self._stream.num_tokens:
            raise DataError(
                f"fewer training tokens than one batch: there are {self._stream.num_tokens}, a "
                f"batch of {global_tokens} takes {needed} (one more per rank and micro-step)"
            )

    def order_key(self, world_size: int, grad_accum: int) -> str:
        return f"trainer.devices x trainer.grad_accum = {world_size * grad_accum}"

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = int(state["position"])

    def _next_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        span = rows * self.seq_len + 1
        tokens = self._stream.read(self._position + self.rank * span, span)
        self._position = (self._position + self.world_size * span) % self._stream.num_tokens
        ids = torch.from_numpy(tokens.astype(np.int64))
        return ids[:-1].view(rows, self.seq_len), ids[1:].view(rows, self.seq_len)


class RankShardsLoader(Loader):
    """Windows from this rank's shards: a shard by chance, weighted by what it has left, then its
    next window in a permuted order. When all are used up, all are cut and permuted anew.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        seq_len: int,
        rank: int,
        world_size: int,
        entropy: int | list[int],
    ) -> None:
        super().__init__(seq_len, rank, world_size)
        self.shards = [Shard(path) for path in shards]
        self._rng = np.random.Generator(np.random.PCG64(entropy))
        self._cut()

    def check(self, global_tokens: int, grad_accum: int) -> None:
        share = global_tokens // self.world_size
        windows = sum(max(len(shard) - 1, 0) // self.seq_len for shard in self.shards)
        if share > windows * self.seq_len:
            raise DataError(
                f"fewer training tokens than one batch: the {len(self.shards)} shards of rank "
                f"{self.rank} give {windows} windows of {self.seq_len}, its share of a batch of "
                f"{global_tokens} tokens needs {share // self.seq_len}"
            )

    def order_key(self, world_size: int, grad_accum: int) -> str:
        return f"trainer.devices = {world_size}"

    def state_dict(self) -> dict[str, Any]:
        return {
            "rng_at_cut": self._rng_at_cut,
            "rng": self._rng.bit_generator.state,
            "left": [len(starts) for starts in self._starts],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng_at_cut"]
        self._cut()
        self._starts = [s[:left] for s, left in zip(self._starts, state["left"], strict=True)]
        self._rng.bit_generator.state = state["rng"]

    def _cut(self) -> None:
        # The order of the draws is the source's, so that the recorded batches come out.
        self._rng_at_cut = self._rng.bit_generator.state
        self._starts: list[list[int]] = []
        for shard in self.shards:
            largest_phase = min(self.seq_len - 1, max(len(shard) - self.seq_len - 1, 0))
            phase = int(self._rng.integers(largest_phase + 1)) if largest_phase else 0
            windows = max(len(shard) - 1 - phase, 0) // self.seq_len
            self._starts.append((phase + self._rng.permutation(windows) * self.seq_len).tolist())

    def _next_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        parts = []
        left = np.array([len(starts) for starts in self._starts], dtype=np.float64)
        for _ in range(rows):
            if left.sum() == 0:
                self._cut()
                left = np.array([len(starts) for starts in self._starts], dtype=np.float64)
            index = int(self._rng.choice(len(left), p=left / left.sum()))
            start = self._starts[index].pop()
            left[index] -= 1
            parts.append(self.shards[index][start : start + self.seq_len + 1])
        return _shifted(parts)


def _shifted(windows: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 [rows, seq_len], of windows of seq_len + 1 tokens."""
    ids = torch.from_numpy(np.stack(windows).astype(np.int64))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
