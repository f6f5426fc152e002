"""Training that starts from the weights of a finished run: `trainer.base`.

They come from a run folder: from its newest checkpoint, averaged as its config says, or from
artifact.bin where no checkpoint was kept. With `trainer.trainable=lora` they are frozen: no
optimizer and no average has them, and they leave training bit for bit as they came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recurgolf.artifact import ArtifactError, load
from recurgolf.artifact.decode import MissingLibrary
from recurgolf.artifact.score import rebuild
from recurgolf.config import ConfigError, to_dict
from recurgolf.log import counted
from recurgolf.model.transformer import Transformer
from recurgolf.run import Run
from recurgolf.training import checkpoint
from recurgolf.training.packing import ARTIFACT
from recurgolf.training.quantize import as_packed

if TYPE_CHECKING:
    from recurgolf.training.job import Job


@dataclass(frozen=True)
class FinishedRun:
    """A run folder's Run and final weights.

    Attributes:
        state: the weights that were scored before packing, or the artifact's; by name, on the CPU.
        source: where they are from, for the log.
        tokenizer: SHA-256 of the tokenizer's file.
        data: what it was trained on, as `Dataset.contents`; empty where nothing tells.
        seconds: of its clock, by phase; empty where there is no checkpoint.
    """

    run: Run
    state: dict[str, Tensor]
    source: str
    tokenizer: str
    data: dict[str, str]
    seconds: dict[str, float]

    def model(self) -> Transformer:
        """A model with these weights and adapters, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            model = self.run.build_model()
        _fill(model, self.state)
        return model.eval()


def read_finished(folder: str | Path, trust: bool = False) -> FinishedRun:
    """The final weights of a run folder, from its newest checkpoint or else its artifact.

    Args:
        trust: import plugins of it that are not installed.

    Raises:
        ConfigError: no run folder, neither checkpoint nor artifact, or damaged ones.
    """
    folder = Path(folder)
    run = Run.read(folder, trust)
    newest = checkpoint.newest(folder / "checkpoints")
    path = folder / ARTIFACT
    try:
        header = load(path).metadata if path.exists() else None
        if newest is not None:
            with torch.random.fork_rng(devices=[]):
                model, told, _ = weights_of(run, newest)
            source, state = f"{newest}", as_packed(run, model).state_dict()
            seconds, data = told.get("clock", {}), told.get("data", {})
        elif path.exists():
            source, state = f"{path}", rebuild(load(path)).model.state_dict()
            seconds, data = {}, {}
        else:
            raise ConfigError(
                f"{folder} has neither checkpoints nor {ARTIFACT}: there are no weights in it"
            )
    except (ArtifactError, MissingLibrary) as error:
        raise ConfigError(f"{folder}: {error}") from None
    tokenizer = run.data.prepare().tokenizer.sha256 if header is None else header["tokenizer"]
    return FinishedRun(run, dict(state), source, tokenizer, data, seconds)


def weights_of(run: Run, path: Path) -> tuple[Transformer, dict[str, Any], str]:
    """The network of a checkpoint with the weights that its run was scored with.

    Args:
        run: whose checkpoint it is.

    Returns:
        The network, the checkpoint's state, and how the weights were averaged, for the log.

    Raises:
        ConfigError: a damaged checkpoint.
    """
    try:
        parts, state = checkpoint.load(path)
    except checkpoint.CheckpointError as error:
        raise ConfigError(str(error)) from None
    model = run.build_model()
    model.load_state_dict(parts["model"])
    how = "the last weights"
    if parts.get("averaging"):
        averager = run.averaging.build(model)
        averager.load_state_dict(parts["averaging"])
        averaged, how = averager.averaged_state(), averager.status()
        if averaged is not None:
            model.load_state_dict(averaged)
    return model, state, how


def check_base(run: Run) -> None:
    """Before any long work: refuse another base, and to train adapters where there are none.

    Raises:
        ConfigError: no base folder, a model that differs from the base's (the keys are named); of
            adapters alone rank 0, a plan in which none takes part, snapping of what is frozen.
    """
    folder = run.trainer.base
    if folder is None:
        return
    base = Run.read(Path(folder))
    _refuse_differences(folder, "model", _network(base), _network(run))
    if base.lora.rank:
        lora = (to_dict(base.lora), to_dict(run.lora))
        _refuse_differences(f"{folder} has adapters of its own, and", "lora", *lora)
    if run.trainer.trainable == "lora":
        _check_adapters(run)


def _check_adapters(run: Run) -> None:
    if run.lora.rank == 0:
        raise ConfigError(
            "trainer.trainable=lora with lora.rank=0: there is nothing to train; choose adapters, "
            "as in lora=attention lora.rank=4"
        )
    with torch.device("meta"):
        adapters = run.lora.build(run.model.projections, run.largest_plan)
    assert adapters is not None
    for plan in run.looping.all_plans(run.model.num_blocks):
        if not any(adapters.slot(visit) is not None for visit in plan.visits[plan.grad_from :]):
            raise ConfigError(
                f"trainer.trainable=lora: under the plan {plan.describe()}, which training meets, "
                "no visit has an adapter and nothing would be trained; set lora.visits=all or "
                "looping.start_fraction=0"
            )
    if run.quant.qat.snap.strength > 0:
        raise ConfigError(
            f"trainer.trainable=lora with quant.qat.snap.strength={run.quant.qat.snap.strength}: "
            "snapping moves weights that are to stay as they are; set it to 0"
        )


def start_from_base(job: Job, model: Transformer) -> str:
    """Fill a fresh model from `trainer.base`, where the run has one.

    Where everything trains, the base's seconds count against the caps as if the run had gone on.

    Returns:
        A line for the log; empty without a base.

    Raises:
        ConfigError: the base has another tokenizer, tensors that do not fit, or used up the cap.
    """
    run, folder, tokenizer = job.run, job.run.trainer.base, job.dataset.tokenizer.sha256
    if folder is None:
        return ""
    base = read_finished(folder)
    if base.tokenizer != tokenizer:
        raise ConfigError(
            f"trainer.base={folder}: another tokenizer: {base.tokenizer[:12]}… there, "
            f"{tokenizer[:12]}… in this run's data"
        )
    _fill(model, base.state)
    if base.data and base.data != job.dataset.contents:
        job.log.line(
            f"{folder} was trained on other text than this run's: if that holds text that this run "
            "is scored on, the score is worth nothing (recurgolf audit compares them)"
        )
    if run.trainer.trainable == "all":
        spent = sum(base.seconds.get(phase, 0.0) for phase in run.budget.train_phases)
        cap = run.budget.max_train_seconds
        if cap is not None and spent >= cap:
            raise ConfigError(
                f"trainer.base={folder} has trained for {spent:.0f} s of the {cap:.0f} s that "
                "budget.train_seconds allows: nothing is left for this run; raise the cap"
            )
        job.clock.add({"base": spent})
        return f"starting from {base.source}, with its {spent:.0f} s of training on the clock"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"training {trained:,} adapter parameters on {base.source}"


def _network(run: Run) -> dict[str, Any]:
    """What a model's weights depend on: not how they start, nor in which way a hybrid is named."""
    model = run.model
    depth = range(model.num_blocks)
    parts = {
        "mixer_pattern": [_unless(model.mixer, model.mixer_of(block)) for block in depth],
        "block_pattern": [_unless(model.block, model.block_of(block)) for block in depth],
    }
    return {**to_dict(model), **parts, "init": None}


def _unless(usual: Any, part: Any) -> Any:
    """What a block has; null where it is what the model has of itself."""
    return None if part == usual else to_dict(part)


def _fill(model: Transformer, state: Mapping[str, Tensor]) -> None:
    """Load weights; adapters that the source does not have keep their start."""
    result = model.load_state_dict(dict(state), strict=False)
    own = ("adapters.", "quantizers.")
    missing = [name for name in result.missing_keys if not name.startswith(own)]
    for names, what in ((missing, "lacks"), (result.unexpected_keys, "has in addition")):
        if names:
            raise ConfigError(f"the base {what} {counted(len(names), 'tensor')}, as {names[0]!r}")


def _refuse_differences(
    folder: str, part: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> None:
    """Name the first keys in which two parts of a Run differ."""
    odd = _differences(part, theirs, ours)
    if odd:
        more = f" (and {len(odd) - 3} more)" if len(odd) > 3 else ""
        raise ConfigError(f"trainer.base: {folder} is another {part}: {'; '.join(odd[:3])}{more}")


def _differences(key: str, theirs: Any, ours: Any) -> list[str]:
    """`key is x there, y here`; of options of another kind only that."""
    if not (isinstance(theirs, Mapping) and isinstance(ours, Mapping)):
        there, here = (v.get("kind", v) if isinstance(v, Mapping) else v for v in (theirs, ours))
        return [] if theirs == ours else [f"{key} is {there!r} there, {here!r} here"]
    if theirs.get("kind") != ours.get("kind"):
        return _differences(f"{key}.kind", theirs.get("kind"), ours.get("kind"))
    odd = [_differences(f"{key}.{name}", theirs.get(name), ours.get(name)) for name in ours]
    return [line for lines in odd for line in lines]
