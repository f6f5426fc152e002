"""Everything that training depends on, taken out of a Trainer and put back.

What is not here is a function of the Run: plans, rates, data order. Saving and restoring are
collective, since Muon's momentum and the random states lie with their ranks.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recurgolf.config import ConfigError, kind_of
from recurgolf.data import shard_fingerprints

if TYPE_CHECKING:
    from recurgolf.training.trainer import Trainer

Parts = dict[str, dict[str, Tensor]]


def collect(trainer: Trainer) -> tuple[Parts, dict[str, Any]]:
    """Tensors by part, and the JSON-able rest. Collective; the same on every rank."""
    ranks = trainer.ranks
    chances = ranks.gathered(chance(trainer.device))
    parts: Parts = {
        "model": dict(trainer.model.state_dict()),
        "optimizer": trainer.optimizers.state_dict(),
        "averaging": trainer.averager.state_dict(),
        "chance": {
            f"{rank}:{name}": state
            for rank, states in enumerate(chances)
            for name, state in states.items()
        },
    }
    metrics = trainer.folder / "metrics.jsonl"
    state = {
        "fingerprint": trainer.run.fingerprint,
        "run": trainer.run.to_dict(),
        "tokens": trainer.step * trainer.config.batch_tokens,
        "skipped_steps": trainer.skipped,
        "val_bpb": trainer.validated.get(trainer.step),
        "world_size": ranks.world_size,
        "precision": trainer.precision,
        "loaders": ranks.gathered(trainer.loader.state_dict()),
        "clock": trainer.clock.state_dict(),
        "data": shard_fingerprints.contents(trainer.dataset),
        "tracker_run_id": trainer.tracker.run_id,
        "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
        "saved": time.time(),
    }
    return parts, state


def restore(trainer: Trainer, parts: Parts, state: dict[str, Any]) -> None:
    """Put a trainer, already set up, where `collect` found it; any number of ranks.

    Raises:
        ConfigError: the data has changed, or its order depends on the number of ranks.
    """
    ranks = trainer.ranks
    shard_fingerprints.check_contents(state["data"], trainer.dataset)
    same_ranks = state["world_size"] == ranks.world_size
    grad_accum = state["run"]["trainer"]["grad_accum"]
    began = trainer.loader.splits(state["world_size"], grad_accum)
    now = trainer.loader.splits(ranks.world_size, trainer.config.grad_accum)
    if began != now:
        raise ConfigError(
            f"this run began with {began}, and the order of data/loader="
            f"{kind_of(trainer.run.data.loader)} depends on that: it cannot be continued with {now}"
        )
    trainer.model.load_state_dict(parts["model"])
    trainer.optimizers.load_state_dict(parts.get("optimizer", {}))
    if "averaging" in parts:
        trainer.averager.load_state_dict(parts["averaging"])
    trainer.loader.load_state_dict(state["loaders"][ranks.rank if same_ranks else 0])
    trainer.clock.add(state["clock"])
    trainer.step = trainer.saved_at = state["step"]
    trainer.skipped = state["skipped_steps"]
    if state["val_bpb"] is not None:
        trainer.validated[trainer.step] = state["val_bpb"]
    own = f"{ranks.rank}:"
    mine = {
        key.removeprefix(own): value
        for key, value in parts["chance"].items()
        if key.startswith(own)
    }
    if mine:
        set_chance(mine, trainer.device)
    else:  # a rank that did not exist: a seed of its own that no other has had
        seed(trainer.run.seed_of("noise") + ranks.rank + 1_000 * trainer.step)


def seed(value: int) -> None:
    """Start all of this process's random numbers, those of plugins included."""
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)


def chance(device: torch.device) -> dict[str, Tensor]:
    """This process's random states: torch's, Python's and numpy's, and its GPU's."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    assert (version, kind) == (3, "MT19937")
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_chance(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `chance` gave."""
    torch.set_rng_state(states["torch"])
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss, cached = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


__all__ = ["Parts", "chance", "collect", "restore", "seed", "set_chance"]
