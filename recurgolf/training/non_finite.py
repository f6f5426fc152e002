"""A loss or gradient that is not finite: found before it reaches the weights, and explained.

Every rank looks at its own loss and at the norms; they agree before any of them steps.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor

from recurgolf.config import Diverged
from recurgolf.disk import write_file, write_json
from recurgolf.looping import LoopPlan
from recurgolf.model.transformer import TRAINING_ONLY, Transformer
from recurgolf.training.precision import autocast

if TYPE_CHECKING:
    from recurgolf.settings import TrainerConfig
    from recurgolf.training.job import Job
    from recurgolf.training.state import TrainState

FOLDER = "non_finite"

Batches = list[tuple[Tensor, Tensor]]


def accepts(
    job: Job,
    state: TrainState,
    plan: LoopPlan,
    batches: Batches,
    loss: Tensor,
    norms: dict[str, float],
) -> bool:
    """Whether this step may change the weights; the same answer on every rank. Collective.

    Raises:
        Diverged: it may not, and `trainer.non_finite` does not let it pass.
    """
    finite = math.isfinite(loss.item()) and all(map(math.isfinite, norms.values()))
    if job.ranks.all_reduce([float(not finite)])[0] == 0:
        return True
    config = job.run.trainer
    state.skipped += 1
    words = f"step {state.step + 1}: loss {loss.item():.4g} or a gradient is not finite"
    if config.non_finite == "skip" and state.skipped <= config.max_skipped:
        job.log.line(f"{words}: skipped ({state.skipped} of at most {config.max_skipped})")
        return False
    raise Diverged(job.guard.diagnosis(job, state, plan, batches, loss) or words)


def diagnosis(job: Job, state: TrainState, plan: LoopPlan, batches: Batches, loss: Tensor) -> str:
    """Keep every rank's batch and report; the message tells of the first rank that saw something.

    Collective.
    """
    folder, rank = job.folder / FOLDER, job.ranks.rank
    folder.mkdir(exist_ok=True)
    report = examine(job, state.model, plan, batches)
    report |= {"step": state.step + 1, "rank": rank, "loss": loss.item()}
    _keep(folder, rank, batches, report)
    worst = first_to_fail(job.ranks.all_gather(report))
    return _message(job.run.trainer, state.skipped, worst, folder)


def first_to_fail(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report that tells most: of weights or gradients, else of a loss that was not finite."""
    seen = [report for report in reports if report["parameters"]]
    seen += [report for report in reports if not math.isfinite(report["loss"])]
    return [*seen, *reports][0]


def examine(job: Job, model: Transformer, plan: LoopPlan, batches: Batches) -> dict[str, Any]:
    """Run a batch again on a copy of the weights and look where numbers stop being finite.

    Returns:
        `forward` and `backward`: the first visit whose state, or the gradient of it, is not
        finite (None: all are); `parameters`: name -> counts of non-finite weights and gradients.
    """
    model = copy.deepcopy(model)
    model.zero_grad(set_to_none=True)
    forward: list[int] = []
    backward: list[int] = []

    def seen(position: int, state: Tensor) -> None:
        if not torch.isfinite(state).all():
            forward.append(position)
        if state.requires_grad:
            state.register_hook(functools.partial(seen_gradient, position))

    def seen_gradient(position: int, gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all():
            backward.append(position)

    model.hidden = functools.partial(model.hidden, observe=seen)  # type: ignore[method-assign]
    for x, y in batches:
        with autocast(job.precision, job.device):
            loss = model(x.to(job.device), plan, y.to(job.device))
        loss.backward()
    parameters = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        counts = {
            "weights": _count(parameter),
            "gradients": 0 if grad is None else _count(grad),
            "of": parameter.numel(),
        }
        if counts["weights"] or counts["gradients"]:
            parameters[name] = counts
    return {
        "plan": plan.describe(),
        "forward": _visit(plan, min(forward, default=None)),
        # The backward pass meets the visits from the last to the first.
        "backward": _visit(plan, max(backward, default=None)),
        "parameters": parameters,
    }


def check_weights(model: torch.nn.Module, dtype: str = "float32") -> None:
    """Refuse weights that no score can come from.

    Args:
        dtype: of kept weights and of scales in the file, which may hold less than the model; what
            only trains is not in it, and must be finite alone.

    Raises:
        Diverged: naming the first of them.
    """
    packed, trained = (torch.finfo(getattr(torch, name)).max for name in (dtype, "float32"))
    for name, tensor in model.state_dict().items():
        most = trained if name.startswith(TRAINING_ONLY) else packed
        # Written so that NaN, which is not below anything, counts as well.
        bad = int((~(tensor.abs() <= most)).sum()) if tensor.is_floating_point() else 0
        if bad:
            what = "not finite"
            if tensor.isfinite().all():
                what = f"beyond {most:,.6g}, the most that {dtype} holds in the file"
            raise Diverged(
                f"the run diverged: {bad:,} of {tensor.numel():,} weights in {name} are {what}; "
                "lower rates may prevent it"
            )


def check_score(val_bpb: float) -> None:
    """Refuse a score that is none.

    Raises:
        Diverged: it is infinite or NaN.
    """
    if not math.isfinite(val_bpb):
        raise Diverged(
            f"the run diverged: val_bpb is {val_bpb} although all weights are finite; lower rates "
            "may prevent it"
        )


def _count(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


def _visit(plan: LoopPlan, position: int | None) -> dict[str, int] | None:
    if position is None:
        return None
    block, nth = plan.visits[position]
    return {"position": position, "block": block, "nth": nth}


def _keep(folder: Path, rank: int, batches: Batches, report: dict[str, Any]) -> None:
    tensors = {
        f"{name}{micro}": tensor.cpu().contiguous()
        for micro, (x, y) in enumerate(batches)
        for name, tensor in (("x", x), ("y", y))
    }
    write_file(folder / f"batch_rank{rank}.safetensors", save(tensors))
    write_json(folder / f"report_rank{rank}.json", report)


def _message(config: TrainerConfig, skipped: int, report: dict[str, Any], folder: Path) -> str:
    where = []
    for name, words in (("forward", "state behind"), ("backward", "gradient of the state behind")):
        visit = report[name]
        if visit is not None:
            where.append(
                f"the {words} visit {visit['position']} (block {visit['block']}, time "
                f"{visit['nth'] + 1})"
            )
            break
    names = list(report["parameters"])
    if names:
        first = report["parameters"][names[0]]
        kind = "weights" if first["weights"] else "gradients"
        where.append(
            f"{len(names)} parameters, the first {names[0]} ({first[kind]:,} of {first['of']:,} "
            f"{kind})"
        )
    if not where:
        where.append(
            "nothing when the batch is run again: the fault was "
            + ("in the gradients alone" if math.isfinite(report["loss"]) else "a passing one")
        )
    remedy = (
        f"this was skip number {skipped} of at most trainer.max_skipped={config.max_skipped}"
        if config.non_finite == "skip"
        else "trainer.non_finite=skip passes over such steps; a lower rate may prevent them"
    )
    return (
        f"step {report['step']}: loss {report['loss']:.4g}, on rank {report['rank']} not finite: "
        f"{'; '.join(where)}. Batch and report are in {folder}; {remedy}"
    )


__all__ = ["Batches", "accepts", "check_score", "check_weights", "diagnosis", "examine"]
