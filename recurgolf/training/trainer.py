"""The Trainer: one rank of a run, from data to summary.json.

All state of a run lives here. The methods are the steps of a training run, in order; what several
ranks must agree on (learning-rate scale, loop plan, stop) is decided on rank 0 and handed round.
"""

from __future__ import annotations

import contextlib
import resource
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from recurgolf.data import Dataset
from recurgolf.eval import Eval, Score, score
from recurgolf.looping import LoopPlan
from recurgolf.model.transformer import Transformer
from recurgolf.optim import build as build_optimizers
from recurgolf.optim import training_fraction
from recurgolf.run import Run
from recurgolf.tracker import NoTracker, RunIdentity
from recurgolf.training import checkpoint
from recurgolf.training.clock import Clock
from recurgolf.training.distributed import Ranks
from recurgolf.training.finish import finish
from recurgolf.training.precision import autocast, resolve_precision
from recurgolf.training.progress import Bar, Log
from recurgolf.training.summary import Summary


class Trainer:
    """One rank of a run. `run_all` is its life."""

    def __init__(self, run: Run, folder: Path, ranks: Ranks):
        self.run, self.folder, self.ranks = run, folder, ranks
        self.config = run.trainer
        self.clock = Clock()
        self.log = Log(folder / "train.log" if ranks.is_first else None, ranks.is_first)
        self.step = 0
        self.tracker = NoTracker()

    def run_all(self) -> Summary:
        """Set up, train, pack, score; closes the tracker whatever happens."""
        failed = True
        try:
            with self.clock.phase("setup"):
                if self.ranks.is_first:
                    self.run.write(self.folder)
                self.setup()
            self.warm_up()
            self.fit()
            summary = self.finish()
            failed = False
            return summary
        finally:
            self.tracker.finish(exit_code=int(failed))
            self.log.close()

    def setup(self) -> None:
        """Data, model, optimizers, averages, loader, tracker."""
        run, config = self.run, self.config
        self.device = torch.device("cpu")
        if config.device == "cuda":
            self.device = torch.device("cuda", self.ranks.local_rank)
            torch.cuda.set_device(self.device)
        # Rank 0 fills the cache before the others look into it.
        if not self.ranks.is_first:
            self.ranks.wait()
        self.dataset: Dataset = run.data.prepare(self.log.line)
        if self.ranks.is_first:
            self.ranks.wait()
        self.val_tokens = self.dataset.validation_tokens()
        run.eval.check(len(self.val_tokens) - 1, run.eval.seq_len or config.seq_len)
        self.loader = run.data.loader.build(
            self.dataset.train_shards,
            seq_len=config.seq_len,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            seed=run.seed_of("data"),
        )
        self.loader.check(config.batch_tokens, config.grad_accum)
        if self.ranks.is_first:
            identity = RunIdentity(
                name=f"{run.name}/seed{run.seed}",
                group=run.name,
                job_type="train",
                tags=run.tags(),
                config={**run.to_dict(), "fingerprint": run.fingerprint},
            )
            self.tracker = run.tracker.build(identity, self.folder)
        self.precision = self.ranks.decided(resolve_precision(config.precision, self.device))
        self.model = run.build_model().to(self.device)
        self.optimizers = build_optimizers(
            run.optimizer,
            self.model,
            passes=run.looping.passes_of(run.model.num_blocks),
            looped_blocks=run.largest_plan.looped_blocks,
        )
        self.averager = run.averaging.build(self.model)
        self.parallel: dict[frozenset[str], torch.nn.Module] = {}
        self.params = sum(p.numel() for p in self.model.parameters())
        torch.manual_seed(run.seed_of("noise") + self.ranks.rank)
        self.log.line(
            f"{run.name}: {self.params:,} parameters, plan {run.plan(1.0).describe()}, "
            f"{self.ranks.world_size} rank(s) on {self.device.type}, {self.precision}, "
            f"{torch.get_num_threads()} thread(s)"
        )
        self.log.line(f"folder: {self.folder}")

    def warm_up(self) -> None:
        """Run every plan before the clock starts, then put everything back as it was."""
        if not self.config.warmup_steps:
            return
        with self.clock.phase("warmup"):
            weights = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
            loader, chance = self.loader.state_dict(), torch.get_rng_state()
            for plan in self.run.looping.all_plans(self.run.model.num_blocks):
                for _ in range(self.config.warmup_steps):
                    self.train_step(plan, 1.0, 0.0)
            self.model.load_state_dict(weights)
            self.optimizers.reset_state()
            self.loader.load_state_dict(loader)
            torch.set_rng_state(chance)

    def fit(self) -> None:
        """Steps until all are done or the training clock reaches its cap."""
        config = self.config
        with self.log.bar("training", config.steps) as bar, self.clock.phase("training"):
            while self.step < config.steps and self.advance(bar):
                if config.val_every and self.step % config.val_every == 0:
                    self.validate()
                if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                    self.save()

    def advance(self, bar: Bar) -> bool:
        """One step with everything around it; False when the clock forbids another."""
        config, cap = self.config, self.run.budget.max_train_seconds
        schedule_cap = cap if config.progress == "wallclock" else None
        elapsed = self.clock.elapsed("training")
        lr_scale, fraction, stop = self.ranks.decided(
            (
                self.run.optimizer.schedule.lr_scale(
                    self.step, config.steps, elapsed, schedule_cap
                ),
                training_fraction(self.step, config.steps, elapsed, schedule_cap),
                cap is not None and elapsed >= cap,
            )
        )
        if stop:
            self.log.line(f"step {self.step}: the training clock reached its cap of {cap:.0f} s")
            return False
        plan = self.run.plan(min(fraction, 1.0))
        loss, norms = self.train_step(plan, lr_scale, fraction)
        self.step += 1
        self.averager.update(self.step, fraction, lr_scale)
        self.report(bar, plan, loss, norms, lr_scale)
        return True

    def train_step(
        self, plan: LoopPlan, lr_scale: float, fraction: float
    ) -> tuple[Tensor, dict[str, float]]:
        """One optimizer step over `grad_accum` micro-steps; the loss of this rank, and norms."""
        config = self.config
        self.model.train()
        module = self.wrapped(plan)
        total = torch.zeros((), device=self.device)
        for micro in range(config.grad_accum):
            x, y = self.loader.next_batch(config.batch_tokens, config.grad_accum)
            last = micro == config.grad_accum - 1
            with self.synchronized(module, last):
                with autocast(self.precision, self.device):
                    loss = module(x.to(self.device), plan, y.to(self.device)) / config.grad_accum
                loss.backward()
            total += loss.detach()
        norms = self.optimizers.clip_gradients()
        self.optimizers.step(lr_scale, self.run.optimizer.momentum_at(self.step), fraction)
        self.optimizers.zero_grad()
        return total, norms

    def wrapped(self, plan: LoopPlan) -> torch.nn.Module:
        """The model, behind DDP when there are several ranks.

        DDP expects a gradient from every parameter, so those that a plan leaves out (adapters of
        visits that are not active yet) are taken from its sight: one wrapper per set of them.
        """
        if self.ranks.world_size == 1:
            return self.model
        idle = frozenset(self.model.idle_parameters(plan))
        if idle not in self.parallel:
            # Wrappers hook into the same gradients; only one may be alive.
            self.parallel.clear()
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                self.model, list(idle)
            )
            self.parallel[idle] = DistributedDataParallel(
                self.model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
            )
        return self.parallel[idle]

    def synchronized(self, module: torch.nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over ranks in the last micro-step alone, or by the optimizers."""
        wanted = last and not self.optimizers.wants_unsynchronized_gradients
        if isinstance(module, DistributedDataParallel) and not wanted:
            return module.no_sync()
        return contextlib.nullcontext()

    def report(
        self, bar: Bar, plan: LoopPlan, loss: Tensor, norms: dict[str, float], lr_scale: float
    ) -> None:
        """Progress, and every `log_every` steps a line and the tracker's curves."""
        config = self.config
        due = self.step % config.log_every == 0 or self.step in (1, config.steps)
        if not due:
            bar.at(self.step)
            return
        mean = self.ranks.sums([loss.item()])[0] / self.ranks.world_size
        seconds = self.clock.elapsed("training")
        rate = self.step * config.batch_tokens / seconds
        text = (
            f"step {self.step:5d}/{config.steps} | loss {mean:.4f} | lr x{lr_scale:.3f} | "
            f"{plan.num_visits} visits | {rate:,.0f} tok/s | {seconds:.0f} s"
        )
        bar.at(self.step, text, line=True)
        if self.ranks.is_first:
            self.tracker.log(
                {
                    "train/loss": mean,
                    "train/lr_scale": lr_scale,
                    **{f"train/grad_norm/{name}": norm for name, norm in norms.items()},
                    "loop/visits": plan.num_visits,
                    "perf/tokens_per_second": rate,
                    **self.progress(),
                },
                step=self.step,
            )

    def progress(self) -> dict[str, float]:
        """The x-axes that stand on every event."""
        return {
            "tokens": self.step * self.config.batch_tokens,
            "train_seconds": round(self.clock.elapsed("training"), 3),
        }

    def validate(self) -> Score:
        """Score the unpacked model under the run's protocol."""
        with self.clock.phase("validation"):
            result = self.score(self.model, self.run.eval)
        self.log.line(
            f"step {self.step:5d}/{self.config.steps} | val_loss {result.val_loss:.4f} | "
            f"val_bpb {result.val_bpb:.4f}"
        )
        if self.ranks.is_first:
            values = {"val/loss": result.val_loss, "val/bpb": result.val_bpb}
            self.tracker.log({**values, **self.progress()}, step=self.step)
        return result

    def score(self, model: Transformer, protocol: Eval) -> Score:
        """A model's score, every rank taking its share of the windows."""
        plan = self.run.looping.eval_plan(self.run.model.num_blocks, protocol.passes)
        was_training = model.training
        model.eval()
        with self.log.bar("scoring", 1) as bar:

            def shown(done: int, total: int) -> None:
                bar.total = total
                bar.at(done)

            share = score(
                lambda ids, first: model.logits(model.hidden(ids, plan)[:, first:]),
                protocol,
                self.val_tokens,
                self.dataset.byte_count.to(self.device),
                seq_len=self.config.seq_len,
                sidecar=self.dataset.val_byte_sidecar,
                device=self.device,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
                progress=shown,
            )
        model.train(was_training)
        nats, tokens, num_bytes = self.ranks.sums([share.nats, share.tokens, share.bytes])
        return Score(nats, int(tokens), int(num_bytes), share.seconds)

    def save(self) -> None:
        """A checkpoint of everything that training depends on."""
        parts = {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizers.state_dict(),
            "averaging": self.averager.state_dict(),
            "chance": {"torch": torch.get_rng_state()},
        }
        if self.ranks.is_first:
            state = {
                "fingerprint": self.run.fingerprint,
                "tokens": self.step * self.config.batch_tokens,
                "world_size": self.ranks.world_size,
                "loader": self.loader.state_dict(),
                "clock": self.clock.state_dict(),
                "tracker_run_id": self.tracker.run_id,
                "saved": time.time(),
            }
            checkpoint.save(self.folder / "checkpoints", self.step, parts, state)
        self.ranks.wait()

    def finish(self) -> Summary:
        """Average, checkpoint, quantise, pack, reload, score."""
        return finish(self)

    def peak_memory(self) -> int:
        """Bytes: of the GPU where there is one, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
