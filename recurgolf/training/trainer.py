"""The Trainer: one rank of a run, from data to summary.json.

All state of a run lives here. The methods are the steps of a training run, in order; what several
ranks must agree on (learning-rate scale, loop plan, stop) is decided on rank 0 and handed round.
"""

from __future__ import annotations

import contextlib
import math
import resource
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from recurgolf.data import Dataset
from recurgolf.data.cache import cache_folder
from recurgolf.data.shard_fingerprints import check_unchanged
from recurgolf.disk import writing
from recurgolf.eval.several import named_protocols
from recurgolf.log import Bar, Log, time_left
from recurgolf.looping import LoopPlan
from recurgolf.optim import build as build_optimizers
from recurgolf.optim import training_fraction
from recurgolf.record import NoTracker, RunIdentity
from recurgolf.run import Run
from recurgolf.training import checkpoint, faults, non_finite, resume, state
from recurgolf.training.base import start_from_base
from recurgolf.training.clock import CapWatch, Clock
from recurgolf.training.distributed import Ranks
from recurgolf.training.finish import finish
from recurgolf.training.network import shape_network, uncompiled
from recurgolf.training.precision import autocast, resolve_precision
from recurgolf.training.quantize import prepare_quantization
from recurgolf.training.scoring import text_of, validate
from recurgolf.training.signals import TRACKER_SECONDS, WATCHED, Interruption, Signals
from recurgolf.training.summary import Summary
from recurgolf.training.telemetry import curves


class Trainer:
    """One rank of a run. `run_all` is its life."""

    def __init__(self, run: Run, folder: Path, ranks: Ranks, signals: Signals | None = None):
        self.run, self.folder, self.ranks = run, folder, ranks
        self.signals = signals or Signals()
        self.config = run.trainer
        self.clock = Clock()
        self.log = Log(folder / "train.log" if ranks.is_first else None, ranks.is_first)
        self.caps = CapWatch(run.budget, self.clock, self.log.line)
        self.found: resume.Found | None = None
        self.step, self.visits, self.skipped = 0, 0, 0
        self.saved_at, self.saved_time = -1, time.monotonic()
        self.validated: dict[int, float] = {}
        self.tracker = NoTracker()

    def run_all(self) -> Summary:
        """Set up, train, pack, score; closes the tracker whatever happens."""
        exit_code, allowed = 1, None
        try:
            with resume.only_one(self.folder, self.ranks.is_first):
                with self.clock.phase("setup"):
                    self.begin()
                    self.setup()
                self.warm_up()
                self.take_up()
                self.fit()
                summary = self.finish()
            exit_code = 0
            return summary
        except Interruption as end:
            exit_code, allowed = end.exit_code, TRACKER_SECONDS
            self.log.line(f"step {self.step}: {end}: stopped")
            raise
        except Exception as error:
            failure = self.explained(error)
            self.log.note(f"step {self.step}: {failure}")
            if failure is error:
                raise
            raise failure from error
        finally:
            self.end(exit_code, allowed)

    def end(self, exit_code: int, allowed: float | None) -> None:
        """Close tracker and log."""
        try:
            self.tracker.finish(exit_code, within_seconds=allowed)
        except OSError as error:
            raise self.explained(error) from None
        finally:
            self.log.close()

    def explained(self, error: Exception) -> Exception:
        """An error of the machine in words that help; any other as it is."""
        if faults.is_out_of_memory(error):
            return faults.out_of_memory(error, f"in step {self.step + 1}", self.config)
        if isinstance(error, OSError) and faults.is_full_disk(error):
            place = Path(error.filename) if isinstance(error.filename, str) else self.folder
            last = checkpoint.newest(self.folder / resume.CHECKPOINTS)
            left = f"{last} is kept and whole." if last else "No checkpoint was written yet."
            return faults.full_disk(place, 0, error, left)
        return error

    def begin(self) -> None:
        """Find what to continue from, and make the folder this run's."""
        if self.ranks.is_first:
            self.found = resume.find(self.run, self.folder, self.log.line)
            resume.make_room(self.run, self.folder, self.found, self.log.line)
            self.run.write(self.folder)
        self.found = self.ranks.decided(self.found)

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
        with writing(cache_folder()):
            self.dataset: Dataset = run.data.prepare(self.log.line)
        if self.ranks.is_first:
            self.ranks.wait()
        self.val_tokens = self.dataset.validation_tokens()
        self.text = text_of(self.dataset)
        for protocol in named_protocols([run.eval], run.trainer.seq_len).values():
            protocol.check(self.text.num_targets, protocol.seq_len or config.seq_len)
        self.loader = run.data.loader.build(
            self.dataset.train_shards,
            seq_len=config.seq_len,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            seed=run.seed_of("data"),
        )
        self.loader.check(config.batch_tokens, config.grad_accum)
        if self.ranks.is_first:
            goes_on = self.found is not None and self.found.is_of(self.folder)
            identity = RunIdentity(
                name=f"{run.name}/seed{run.seed}",
                group=run.name,
                job_type="train",
                tags=run.tags(),
                config={**run.to_dict(), "fingerprint": run.fingerprint},
                run_id=self.found.state["tracker_run_id"] if goes_on and self.found else None,
                resumed=goes_on,
            )
            self.tracker = run.tracker.build(identity, self.folder)
        measured = resolve_precision(config.precision, self.device)
        self.precision = self.ranks.decided(
            measured if self.found is None else self.found.state["precision"]
        )
        self.model = run.build_model().to(self.device)
        based = start_from_base(run, self.model, self.dataset.tokenizer.sha256)
        shape_network(self.model, config)
        self.optimizers = build_optimizers(
            run.optimizer,
            self.model,
            passes=run.looping.passes_of(run.model.num_blocks),
            looped_blocks=run.largest_plan.looped_blocks,
        )
        self.averager = run.averaging.build(self.model)
        self.qat = prepare_quantization(run, self.model, self.dataset)
        self.parallel: dict[frozenset[str], torch.nn.Module] = {}
        self.params = sum(p.numel() for p in self.model.parameters())
        state.seed(run.seed_of("noise") + self.ranks.rank)
        self.log.line(
            f"{run.name}: {self.params:,} parameters, plan {run.plan(1.0).describe()}, "
            f"{self.ranks.world_size} rank(s) on {self.device.type}, {self.precision}, "
            f"{torch.get_num_threads()} thread(s)"
        )
        if self.qat.describe():
            self.log.line(f"training knows its quantizer: {self.qat.describe()}")
        if based:
            self.log.line(based)
        self.log.line(f"folder: {self.folder}")

    def warm_up(self) -> None:
        """Run every plan before the clock starts, then put everything back as it was."""
        if not self.config.warmup_steps:
            return
        with self.clock.phase("warmup"):
            weights = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
            averages = {name: t.clone() for name, t in self.averager.state_dict().items()}
            loader, chance = self.loader.state_dict(), state.chance(self.device)
            for plan in self.run.looping.all_plans(self.run.model.num_blocks):
                for _ in range(self.config.warmup_steps):
                    self.train_step(plan, 1.0, 0.0)
            self.model.load_state_dict(weights)
            self.optimizers.reset_state()
            if averages:
                self.averager.load_state_dict(averages)
            self.loader.load_state_dict(loader)
            state.set_chance(chance, self.device)
            self.skipped = 0

    def take_up(self) -> None:
        """Continue where the checkpoint that was found ends."""
        if self.found is None:
            return
        parts, saved = checkpoint.load(self.found.path)
        state.restore(self, parts, saved)
        self.saved_at = self.step if self.found.is_of(self.folder) else -1
        self.log.line(f"continued from {self.found.path}, step {self.step}")
        if self.found.remark:
            self.log.line(self.found.remark)

    def fit(self) -> None:
        """Steps until all are done or the training clock reaches its cap."""
        config, self.saved_time = self.config, time.monotonic()
        with self.clock.phase("training"), self.signals.deferred():
            try:
                with self.log.bar("training", config.steps) as bar:
                    # One that a signal ended is made up for when the run goes on.
                    self.validate_if_due()
                    while self.step < config.steps and self.advance(bar):
                        self.validate_if_due()
                        if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                            self.save()
            except Interruption:
                self.save()
                raise
        self.signals.stop_if_heard()

    def validate_if_due(self) -> None:
        """Score every `val_every` steps, each of them once."""
        every = self.config.val_every
        if every and self.step and self.step % every == 0 and self.step not in self.validated:
            with self.signals.at_once(), uncompiled():
                validate(self)

    def advance(self, bar: Bar) -> bool:
        """One step with everything around it; False when the clock forbids another."""
        config, cap = self.config, self.run.budget.max_train_seconds
        schedule_cap = cap if config.progress == "wallclock" else None
        elapsed = self.clock.total(self.run.budget.train_phases)
        scale = self.run.optimizer.schedule.lr_scale(self.step, config.steps, elapsed, schedule_cap)
        done = training_fraction(self.step, config.steps, elapsed, schedule_cap)
        since_saved = time.monotonic() - self.saved_time
        due = 0 < config.checkpoint_seconds <= since_saved
        stop = cap is not None and elapsed >= cap
        (lr_scale, fraction, due, stop), heard = self.ranks.settled(
            [scale, done, due, stop], [self.signals.heard == number for number in WATCHED]
        )
        for number, was_heard in zip(WATCHED, heard, strict=True):
            if was_heard:
                raise Interruption(number)
        if due:
            self.save()
        if stop:
            self.log.line(f"step {self.step}: the training clock reached its cap of {cap:.0f} s")
            return False
        plan = self.run.plan(min(fraction, 1.0))
        loss, norms = self.train_step(plan, lr_scale, fraction)
        self.qat.snap(fraction)
        self.step += 1
        self.visits += plan.num_visits
        self.averager.update(self.step, fraction, lr_scale)
        self.report(bar, plan, loss, norms, lr_scale)
        return True

    def train_step(
        self, plan: LoopPlan, lr_scale: float, fraction: float
    ) -> tuple[Tensor, dict[str, float]]:
        """One optimizer step over `grad_accum` micro-steps; the loss of this rank, and norms."""
        config = self.config
        self.model.train()
        self.qat.update(fraction)
        module = self.wrapped(plan)
        total = torch.zeros((), device=self.device)
        batches: non_finite.Batches = []
        for micro in range(config.grad_accum):
            x, y = self.loader.next_batch(config.batch_tokens, config.grad_accum)
            batches.append((x, y))
            last = micro == config.grad_accum - 1
            with self.synchronized(module, last):
                with autocast(self.precision, self.device):
                    loss = module(x.to(self.device), plan, y.to(self.device)) / config.grad_accum
                loss.backward()
            total += loss.detach()
        norms = self.optimizers.clip_gradients()
        if non_finite.accepts(self, plan, batches, total, norms):
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
        check_unchanged(self.dataset.files)
        self.foresee()
        mean = self.ranks.sums([loss.item()])[0] / self.ranks.world_size
        seconds = self.clock.elapsed("training")
        rate = self.step * config.batch_tokens / seconds
        text = (
            f"step {self.step:5d}/{config.steps} | loss {mean:.4f} | "
            f"~{self.rough_bpb(mean):.3f} bpb | lr x{lr_scale:.3f} | {plan.num_visits} visits | "
            f"{rate:,.0f} tok/s | {seconds:.0f} s, "
            + time_left(self.step, config.steps, seconds, self.run.budget.max_train_seconds)
        )
        bar.at(self.step, text, line=True)
        if self.ranks.is_first:
            self.tracker.log(
                {
                    "train/loss": mean,
                    "train/lr_scale": lr_scale,
                    **{f"train/grad_norm/{name}": norm for name, norm in norms.items()},
                    "loop/visits": plan.num_visits,
                    **curves(self, plan, "log"),
                    "perf/tokens_per_second": rate,
                    **self.progress(),
                },
                step=self.step,
            )

    def rough_bpb(self, loss: float) -> float:
        """A training loss by the bytes that a token of the validation text stands for."""
        return loss / math.log(2) * self.text.num_targets / self.dataset.val_bytes

    def foresee(self) -> None:
        """Say once when the clock will end training before its last step, by the time so far."""
        config, cap = self.config, self.run.budget.max_train_seconds
        if cap is None or config.progress == "wallclock" or self.step < min(10, config.steps):
            return
        left = range(self.step, config.steps, max(1, (config.steps - self.step) // 50))
        visits = [self.run.plan(step / config.steps).num_visits for step in left]
        per_visit = self.clock.elapsed("training") / self.visits
        more = per_visit * sum(visits) * (config.steps - self.step) / max(len(visits), 1)
        self.caps.expect(
            "training",
            more,
            f"it will end before step {config.steps}; lower trainer.steps, or "
            "let schedules follow the clock (trainer.progress=wallclock)",
        )

    def progress(self) -> dict[str, float]:
        """The x-axes that stand on every event."""
        return {
            "tokens": self.step * self.config.batch_tokens,
            "train_seconds": round(self.clock.elapsed("training"), 3),
        }

    def save(self, phase: str = "checkpoint") -> None:
        """A checkpoint of everything that training depends on, unless there is one. Collective.

        Args:
            phase: what the time counts as; the last one is no part of training.
        """
        if self.saved_at == self.step:
            return
        with self.clock.phase(phase):
            check_unchanged(self.dataset.files)
            parts, rest = state.collect(self)
            if self.ranks.is_first:
                folder = self.folder / resume.CHECKPOINTS
                checkpoint.save(folder, self.step, parts, rest)
                checkpoint.prune(folder, self.config.keep_last, self.config.keep_best)
            self.saved_at, self.saved_time = self.step, time.monotonic()
            self.ranks.wait()

    def finish(self) -> Summary:
        """Average, checkpoint, quantize, pack, reload, score."""
        with uncompiled():
            return finish(self)

    def peak_memory(self) -> int:
        """Bytes: of the GPU where there is one, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
