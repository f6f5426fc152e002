"""The loop: from the first step to the last, on one rank.

What several ranks must agree on (learning-rate scale, loop plan, stop) is decided on rank 0 and
broadcast. `train` is the life of a rank, from its data to summary.json.
"""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from recurgolf.artifact.ledger import component
from recurgolf.eval.several import named_protocols
from recurgolf.log import Bar, time_left
from recurgolf.looping import LoopPlan
from recurgolf.optim import training_fraction
from recurgolf.record import RunIdentity
from recurgolf.training.averages import averaged_weights
from recurgolf.training.finish import finish
from recurgolf.training.job import Job
from recurgolf.training.network import uncompiled
from recurgolf.training.non_finite import Batches, accepts
from recurgolf.training.precision import autocast, resolve_precision
from recurgolf.training.scoring import validate
from recurgolf.training.signals import TRACKER_SECONDS, WATCHED, Interruption
from recurgolf.training.state import TrainState, rng_state, set_rng_state
from recurgolf.training.summary import Summary


def train(job: Job) -> Summary:
    """Set up, train, pack and score; closes tracker and log whatever happens."""
    exit_code, allowed = 1, None
    trainer, guard = Trainer(job), job.guard
    try:
        with guard.locked(job):
            with job.clock.phase("setup"):
                guard.begin(job)
                trainer.setup()
            trainer.warm_up()
            guard.resume(job, trainer.state)
            trainer.fit()
            summary = trainer.finish()
        exit_code = 0
        return summary
    except Interruption as end:
        exit_code, allowed = end.exit_code, TRACKER_SECONDS
        job.log.line(f"step {trainer.step}: {end}: stopped")
        raise
    except Exception as error:
        explained = guard.explained(job, trainer.step, error)
        job.log.note(f"step {trainer.step}: {explained or error}")
        if explained:
            raise explained from error
        raise
    finally:
        try:
            job.tracker.finish(exit_code, within_seconds=allowed)
        except OSError as error:
            raise guard.explained(job, trainer.step, error) or error from None
        finally:
            job.log.close()


class Trainer:
    """One rank's training; `setup` makes its state."""

    state: TrainState

    def __init__(self, job: Job):
        self.job, self.run, self.config = job, job.run, job.run.trainer
        self.parallel: dict[frozenset[str], torch.nn.Module] = {}

    @property
    def step(self) -> int:
        """Steps done; 0 as long as there is no state."""
        return self.state.step if "state" in vars(self) else 0

    def setup(self) -> None:
        """Data, loader, tracker, and the state in front of the first step."""
        job, run, config = self.job, self.run, self.config
        if job.ranks.is_first:
            run.write(job.folder)
        for protocol in named_protocols([run.eval], config.seq_len).values():
            protocol.check(job.text.num_targets, protocol.seq_len or config.seq_len)
        loader = run.data.loader.build(
            job.dataset.train_shards,
            seq_len=config.seq_len,
            rank=job.ranks.rank,
            world_size=job.ranks.world_size,
            seed=run.seed_of("data"),
        )
        loader.check(config.batch_tokens, config.grad_accum)
        found = job.guard.found
        if job.ranks.is_first:
            resumed = found.is_of(job.folder) if found else False
            group = run.tracker.group_of(run.name)
            identity = RunIdentity(
                name=f"{group}/seed{run.chance}",
                group=group,
                job_type="train",
                tags=run.tags(),
                config={
                    **run.to_dict(),
                    "fingerprint": run.fingerprint,
                    "setting": f"{group} {run.setting}",
                },
                run_id=found.state["tracker_run_id"] if found and resumed else None,
                resumed=resumed,
            )
            job.tracker = run.tracker.build(identity, job.folder)
        # A run keeps its precision when it is resumed on another machine.
        own = resolve_precision(config.precision, job.device)
        job.precision = job.ranks.broadcast(found.state["precision"] if found else own)
        self.state = TrainState.build(job, loader)

    def warm_up(self) -> None:
        """Run every plan before the clock starts, then put everything back as it was."""
        if not self.config.warmup_steps:
            return
        job, state = self.job, self.state
        with job.clock.phase("warmup"):
            weights = {name: t.detach().clone() for name, t in state.model.state_dict().items()}
            averages = {name: t.clone() for name, t in state.averager.state_dict().items()}
            loader, rng = state.loader.state_dict(), rng_state(job.device)
            for plan in self.run.looping.all_plans(self.run.model.num_blocks):
                for _ in range(self.config.warmup_steps):
                    self.train_step(plan, 1.0, 0.0)
            state.model.load_state_dict(weights)
            state.optimizers.reset_state()
            if averages:
                state.averager.load_state_dict(averages)
            state.loader.load_state_dict(loader)
            set_rng_state(rng, job.device)
            state.skipped = 0

    def fit(self) -> None:
        """Steps until all are done or the training clock reaches its cap."""
        job, state, config = self.job, self.state, self.config
        with job.clock.phase("training"), job.signals.deferred():
            try:
                with job.log.bar("training", config.steps) as bar:
                    # A validation that a signal cut short is made up for when the run goes on.
                    self.validate_if_due()
                    while state.step < config.steps and self.advance(bar):
                        self.validate_if_due()
                        if config.checkpoint_every and state.step % config.checkpoint_every == 0:
                            job.guard.save(job, state)
            except Interruption:
                job.guard.save(job, state)
                raise
        job.signals.stop_if_heard()

    def validate_if_due(self) -> None:
        """Score every `val_every` steps, each of them once."""
        every, step = self.config.val_every, self.state.step
        if every and step and step % every == 0 and step not in self.state.validated:
            with self.job.signals.at_once(), uncompiled():
                validate(self.job, self.state)

    def advance(self, bar: Bar) -> bool:
        """One step with everything around it; False when the clock forbids another."""
        job, state, config = self.job, self.state, self.config
        cap = self.run.budget.max_train_seconds
        schedule_cap = cap if config.progress == "wallclock" else None
        elapsed = job.clock.total(self.run.budget.train_phases)
        schedule = self.run.optimizer.schedule
        scale = schedule.lr_scale(state.step, config.steps, elapsed, schedule_cap)
        done = training_fraction(state.step, config.steps, elapsed, schedule_cap)
        due = bool(job.guard.due(config.checkpoint_seconds))
        stop = cap is not None and elapsed >= cap
        # Clocks differ between ranks: rank 0's decides. A signal that any rank heard stops all.
        (lr_scale, fraction, due, stop), heard = job.ranks.broadcast_and_any(
            [scale, done, due, stop], [job.signals.heard == number for number in WATCHED]
        )
        for number, was_heard in zip(WATCHED, heard, strict=True):
            if was_heard:
                raise Interruption(number)
        if due:
            job.guard.save(job, state)
        if stop:
            job.log.line(f"step {state.step}: the training clock reached its cap of {cap:.0f} s")
            return False
        plan = self.run.plan(min(fraction, 1.0))
        loss, norms = self.train_step(plan, lr_scale, fraction)
        state.qat.snap(fraction)
        state.step += 1
        state.visits += plan.num_visits
        state.averager.update(state.step, fraction, lr_scale)
        self.report(bar, plan, loss, norms, lr_scale)
        return True

    def train_step(
        self, plan: LoopPlan, lr_scale: float, fraction: float
    ) -> tuple[Tensor, dict[str, float]]:
        """One optimizer step over `grad_accum` micro-steps; the loss of this rank, and norms."""
        job, state, config = self.job, self.state, self.config
        state.model.train()
        state.qat.update(fraction)
        module = self.wrapped(plan)
        total = torch.zeros((), device=job.device)
        batches: Batches = []
        for micro in range(config.grad_accum):
            x, y = state.loader.next_batch(config.batch_tokens, config.grad_accum)
            batches.append((x, y))
            last = micro == config.grad_accum - 1
            with self.synchronized(module, last), state.qat.seen():
                with autocast(job.precision, job.device):
                    loss = module(x.to(job.device), plan, y.to(job.device)) / config.grad_accum
                total += loss.detach()
                price = state.qat.price() if last else None
                (loss if price is None else loss + price).backward()
        norms = state.optimizers.clip_gradients()
        if accepts(job, state, plan, batches, total, norms):
            momentum = self.run.optimizer.momentum_at(state.step)
            state.optimizers.step(lr_scale, momentum, fraction)
        state.optimizers.zero_grad()
        return total, norms

    def wrapped(self, plan: LoopPlan) -> torch.nn.Module:
        """The model, behind DDP when there are several ranks.

        DDP waits for a gradient of every parameter that it knows, so it must not know those that a
        plan leaves out (adapters of visits that are not active yet): one wrapper per set of them.
        """
        model, device = self.state.model, self.job.device
        if self.job.ranks.world_size == 1:
            return model
        idle = self.state.qat.idle.union(model.idle_parameters(plan))
        if idle not in self.parallel:
            # Wrappers hook into the same gradients; only one may be alive.
            self.parallel.clear()
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(idle))
            ids = [device] if device.type == "cuda" else None
            self.parallel[idle] = DistributedDataParallel(model, device_ids=ids)
        return self.parallel[idle]

    def synchronized(self, module: torch.nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over ranks in the last micro-step alone, or by the optimizers."""
        wanted = last and not self.state.optimizers.wants_unsynchronized_gradients
        if isinstance(module, DistributedDataParallel) and not wanted:
            return module.no_sync()
        return contextlib.nullcontext()

    def report(
        self, bar: Bar, plan: LoopPlan, loss: Tensor, norms: dict[str, float], lr_scale: float
    ) -> None:
        """Progress, and every `log_every` steps a line and the tracker's curves."""
        job, state, config, step = self.job, self.state, self.config, self.state.step
        if step % config.log_every and step not in (1, config.steps):
            bar.at(step)
            return
        job.guard.check_data(job.dataset)
        job.caps.warn_of_training(self.run, step, self.state.visits)
        mean = job.ranks.all_reduce([loss.item()])[0] / job.ranks.world_size
        # By the bytes that a token of the validation text stands for.
        rough_bpb = mean / math.log(2) * job.text.num_targets / job.dataset.val_bytes
        seconds = job.clock.elapsed("training")
        rate = step * config.batch_tokens / seconds
        text = (
            f"step {step:5d}/{config.steps} | loss {mean:.4f} | ~{rough_bpb:.3f} bpb | "
            f"lr x{lr_scale:.3f} | {plan.num_visits} visits{state.qat.status()} | "
            f"{rate:,.0f} tok/s | {seconds:.0f} s, "
            + time_left(step, config.steps, seconds, self.run.budget.max_train_seconds)
        )
        bar.at(step, text, line=True)
        if job.ranks.is_first:
            values = {
                "train/loss": mean,
                "train/lr_scale": lr_scale,
                **{f"train/grad_norm/{name}": norm for name, norm in norms.items()},
                "loop/visits": plan.num_visits,
                **state.qat.curves(component),
                **job.telemetry(job, self.state, plan, "log"),
                "perf/tokens_per_second": rate,
            }
            job.tracker.log({**values, **job.axes(step)}, step=step)

    def finish(self) -> Summary:
        """Average, checkpoint, validate; then the one end of all runs."""
        job, state = self.job, self.state
        with uncompiled():
            # Before the average: what is resumed from are the weights that train.
            job.guard.save(job, state, "packing")
            averaged = averaged_weights(job, state)
            if averaged is not None:
                state.model.load_state_dict(averaged)
                job.log.line(f"weights: {state.averager.status()}")
            changed = state.qat.settle() or averaged is not None
            # Of weights that nothing changed since, a validation at the last step is the score.
            val_bpb = None if changed else state.validated.get(state.step)
            if val_bpb is None:
                val_bpb = validate(job, state).val_bpb
            return finish(job, state.model, state.trained(self.run, val_bpb))


__all__ = ["Trainer", "train"]
