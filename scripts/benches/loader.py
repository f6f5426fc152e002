"""Tokens per second of the loader against the fastest model, and start-up over many shards."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import recurgolf
from recurgolf.data.loader import ShuffledConfig
from recurgolf.data.shard_fingerprints import fingerprints
from recurgolf.data.shards import write_shard


def main(asked: argparse.Namespace) -> None:
    """The loader must never be what a run waits for."""
    run = recurgolf.compose(["model=nano", "looping=none", "lora=none", *asked.overrides])
    config, shards = run.trainer, run.data.prepare().train_shards
    loader = ShuffledConfig().build(
        shards, seq_len=config.seq_len, rank=0, world_size=1, seed=run.seed
    )
    loaded = tokens_per_second(
        lambda: loader.next_batch(config.batch_tokens, 1), config.batch_tokens, asked.rounds * 20
    )
    model, plan = run.build_model(), run.plan(1.0)
    x, y = loader.next_batch(config.batch_tokens, 1)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(x, plan, y).backward()

    used = tokens_per_second(step, config.batch_tokens, asked.rounds)
    print(f"loader {loaded:,.0f} tokens/s, fastest model {used:,.0f} tokens/s")
    print(f"loader / model: {loaded / used:.0f} (at least 20)\n")
    for count in (1, 20, 200):
        print(f"start-up over {count:3d} shards: {1000 * start_seconds(count):.1f} ms")


def tokens_per_second(action: object, tokens: int, rounds: int) -> float:
    """The best of three series."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(rounds):
            action()  # type: ignore[operator]
        best = min(best, time.perf_counter() - began)
    return tokens * rounds / best


def start_seconds(count: int, tokens: int = 20_000_000) -> float:
    """Opening so many shards that hold the same tokens together, to the first batch."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"fineweb_train_{number:06d}.bin" for number in range(count)]
        for path in paths:
            write_shard(path, np.zeros(tokens // count, dtype=np.uint16))
        best = float("inf")
        for _ in range(3):
            torch.manual_seed(0)
            began = time.perf_counter()
            loader = ShuffledConfig().build(paths, seq_len=1024, rank=0, world_size=1, seed=1)
            fingerprints(paths)
            loader.next_batch(8192, 1)
            best = min(best, time.perf_counter() - began)
        return best
