"""What training changes, and how it is saved and restored.

Whatever is not in here or in the parts below is a function of the Run: plans, rates, data order.
Saving and restoring are collective, since Muon's momentum and the random states lie with their
ranks.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recurgolf.config import ConfigError, kind_of
from recurgolf.data import Loader
from recurgolf.log import counted
from recurgolf.model.transformer import Transformer
from recurgolf.optim import Averager, Optimizers
from recurgolf.optim import build as build_optimizers
from recurgolf.quant import QuantAware
from recurgolf.run import Run
from recurgolf.training.base import start_from_base
from recurgolf.training.network import shape_network
from recurgolf.training.quantize import prepare_quantization
from recurgolf.training.summary import Trained

if TYPE_CHECKING:
    from recurgolf.training.job import Job

Parts = dict[str, dict[str, Tensor]]


@dataclass
class TrainState:
    """The changing side of a training run, on one rank.

    Parameters that quantization-aware training brings along belong into the model (a ModuleDict
    beside `adapters`, with an `optimizer_role`): there they are optimized, averaged, saved and
    resumed like all others. Plain numbers that it carries from step to step go into `collect`.

    Attributes:
        step: optimizer steps done, skipped ones included.
        visits: visits of blocks in all these steps, by which the time still needed is estimated.
        skipped: steps left out because a loss or gradient was not finite.
        validated: step -> val_bpb.
    """

    model: Transformer
    optimizers: Optimizers
    averager: Averager
    qat: QuantAware
    loader: Loader
    step: int = 0
    visits: int = 0
    skipped: int = 0
    validated: dict[int, float] = field(default_factory=dict)

    @classmethod
    def build(cls, job: Job, loader: Loader) -> TrainState:
        """The state in front of the first step."""
        run = job.run
        model = run.build_model().to(job.device)
        based = start_from_base(job, model)
        shape_network(model, run.trainer)
        optimizers = build_optimizers(
            run.optimizer,
            model,
            passes=run.looping.passes_of(run.model.num_blocks),
            looped_blocks=run.largest_plan.looped_blocks,
        )
        averager = run.averaging.build(model)
        qat = prepare_quantization(job, model)
        seed(run.seed_of("noise") + job.ranks.rank)
        ranks = counted(job.ranks.world_size, "rank")
        job.log.line(
            f"{run.name}: {model.num_parameters:,} parameters, plan "
            f"{run.plan(1.0).describe()}, {ranks} on {job.device.type}, "
            f"{job.precision}, {counted(torch.get_num_threads(), 'thread')}"
        )
        if qat.describe():
            job.log.line(f"training knows its quantizer: {qat.describe()}")
        if based:
            job.log.line(based)
        job.log.line(f"folder: {job.folder}")
        return cls(model, optimizers, averager, qat, loader)

    def trained(self, run: Run, val_bpb: float) -> Trained:
        """What the summary tells of the training, with the score before packing."""
        tokens = self.step * run.trainer.batch_tokens
        return Trained(self.step, tokens, self.skipped, val_bpb)

    def collect(self, job: Job) -> tuple[Parts, dict[str, Any]]:
        """Tensors by part, and the JSON-able rest. Collective; the same on every rank."""
        run, ranks = job.run, job.ranks
        rng_states = ranks.all_gather(rng_state(job.device))
        parts: Parts = {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizers.state_dict(),
            "averaging": self.averager.state_dict(),
            "rng": {
                f"{rank}:{name}": state
                for rank, states in enumerate(rng_states)
                for name, state in states.items()
            },
        }
        metrics = job.folder / "metrics.jsonl"
        state = {
            "fingerprint": run.fingerprint,
            "run": run.to_dict(),
            "tokens": self.step * run.trainer.batch_tokens,
            "visits": self.visits,
            "skipped_steps": self.skipped,
            "val_bpb": self.validated.get(self.step),
            "world_size": ranks.world_size,
            "precision": job.precision,
            "loaders": ranks.all_gather(self.loader.state_dict()),
            "clock": job.clock.state_dict(),
            "data": job.dataset.contents,
            "tracker_run_id": job.tracker.run_id,
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            "saved": time.time(),
        }
        return parts, state

    def restore(self, job: Job, parts: Parts, state: dict[str, Any]) -> None:
        """Become what `collect` found, on any number of ranks.

        Raises:
            ConfigError: the data has changed, or its order depends on the number of ranks.
        """
        run, ranks = job.run, job.ranks
        job.dataset.check_contents(state["data"])
        same_ranks = state["world_size"] == ranks.world_size
        began = self.loader.order_key(state["world_size"], state["run"]["trainer"]["grad_accum"])
        now = self.loader.order_key(ranks.world_size, run.trainer.grad_accum)
        if began != now:
            raise ConfigError(
                f"this run began with {began}, and the order of data/loader="
                f"{kind_of(run.data.loader)} depends on that: it cannot be continued with {now}"
            )
        self.model.load_state_dict(parts["model"])
        self.optimizers.load_state_dict(parts.get("optimizer", {}))
        if "averaging" in parts:
            self.averager.load_state_dict(parts["averaging"])
        self.loader.load_state_dict(state["loaders"][ranks.rank if same_ranks else 0])
        job.clock.add(state["clock"])
        self.step, self.skipped = state["step"], state["skipped_steps"]
        self.visits = state["visits"] if "visits" in state else visits_until(run, self.step)
        if state["val_bpb"] is not None:
            self.validated[self.step] = state["val_bpb"]
        # Checkpoints of version 0.1 call this part `chance`.
        saved = parts["rng"] if "rng" in parts else parts["chance"]
        own = f"{ranks.rank}:"
        mine = {k.removeprefix(own): tensor for k, tensor in saved.items() if k.startswith(own)}
        if mine:
            set_rng_state(mine, job.device)
        else:
            # This rank is new: a seed of its own that no other rank has had at any step.
            seed(run.seed_of("noise") + ranks.rank + 1_000 * self.step)


def visits_until(run: Run, step: int) -> int:
    """Visits in the first steps, for checkpoints of version 0.1, which do not tell them."""
    return sum(run.plan(n / run.trainer.steps).num_visits for n in range(step))


def seed(value: int) -> None:
    """Seed every generator of this process, also those that only plugins use."""
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states of this process's generators as tensors: torch's, Python's, numpy's, the GPU's."""
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


def set_rng_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `rng_state` gave."""
    torch.set_rng_state(states["torch"])
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss, cached = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


__all__ = ["Parts", "TrainState", "rng_state", "seed", "set_rng_state"]
