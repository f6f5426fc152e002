"""The trainer's knobs: steps, batch, precision, devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from recurgolf.config import Checked, ConfigError, option
from recurgolf.limits import at_least, not_empty, one_of

TELEMETRY = ("none", "validation", "log")

NOT_FINGERPRINTED = (
    *("resume", "log_every", "val_every", "checkpoint_every", "checkpoint_seconds"),
    *("keep_last", "keep_best", "rank_timeout_seconds", "telemetry"),
)
"""What is recorded and kept: no result depends on these fields, nor does the fingerprint."""


@option("trainer", "trainer")
@dataclass
class TrainerConfig(Checked):
    """How training runs. Lengths and batches are in tokens over all ranks."""

    steps: Annotated[int, at_least(1)] = 1000
    """Optimizer steps; a cap on time (budget.train_seconds) may end training earlier."""
    seq_len: Annotated[int, at_least(1)] = 256
    """Tokens of a training row, the longest context in training."""
    batch_tokens: Annotated[int, at_least(1)] = 2048
    """Tokens per optimizer step over all ranks and micro-steps."""
    grad_accum: Annotated[int, at_least(1)] = 1
    """Micro-steps per optimizer step on every rank."""
    device: Annotated[str, one_of("cpu", "cuda")] = "cpu"
    """cpu | cuda."""
    devices: Annotated[int, at_least(1)] = 1
    """Ranks; each is one process (gloo on the CPU, nccl on GPUs)."""
    threads: Annotated[int | None, at_least(1)] = None
    """CPU threads per rank; null: all cores for one rank, one each for several."""
    progress: Annotated[str, one_of("steps", "wallclock")] = "steps"
    """What schedules follow: steps (repeatable) | wallclock (the challenge's ten minutes)."""
    precision: Annotated[str, one_of("auto", "float32", "bfloat16")] = "auto"
    """Of the matrix products in training: float32 | bfloat16 (autocast) | auto (bfloat16 where the
    device has instructions for its products). summary.json tells what auto was
    (`environment.precision`). Scoring is always float32 on the CPU."""
    trainable: Annotated[str, one_of("all", "lora")] = "all"
    """all | lora: only the adapters train, on the frozen weights of `base`."""
    base: str | None = None
    """Folder of the run whose final weights this one starts from; trainable=lora keeps them."""
    compile: bool = False
    """torch.compile each block in training; scoring runs uncompiled."""
    compile_backend: str = "inductor"
    """Of torch.compile; aot_eager and eager need no compiler on the machine."""
    activation_checkpointing: bool = False
    """Keep one state per visit of a block and compute the rest again in the backward pass: memory
    hardly grows with passes, a step takes about a third longer, gradients are the same."""
    warmup_steps: Annotated[int, at_least(0)] = 0
    """Steps run before the clock starts; weights, optimizer and data are reset behind them."""
    log_every: Annotated[int, at_least(1)] = 25
    """Steps between training lines."""
    telemetry: Annotated[str, one_of(TELEMETRY)] = "validation"
    """Curves of what the loop does at every visit: none | validation (with every validation) | log
    (with every training line too). Off the training clock; results do not change."""
    val_every: Annotated[int, at_least(0)] = 0
    """Steps between validations of the unpacked model; 0: only at the end."""
    checkpoint_every: Annotated[int, at_least(0)] = 0
    """Steps between checkpoints; 0: by checkpoint_seconds alone. There is always one at the end."""
    checkpoint_seconds: Annotated[float, at_least(0)] = 120.0
    """Seconds between checkpoints; 0: by checkpoint_every alone."""
    keep_last: Annotated[int, at_least(1)] = 2
    """How many of the newest checkpoints stay."""
    keep_best: Annotated[int, at_least(0)] = 1
    """How many of those with the lowest validation score stay besides (needs val_every)."""
    resume: Annotated[str, not_empty] = "never"
    """never: start anew | auto: from the newest whole checkpoint of the run's folder, if there is
    one | a folder: from that run's, or from that checkpoint."""
    non_finite: Annotated[str, one_of("stop", "skip")] = "stop"
    """A loss or gradient that is no finite number: stop (keeps the batch and a report) | skip (the
    step changes nothing; at most max_skipped of them)."""
    max_skipped: Annotated[int, at_least(0)] = 10
    """Steps that non_finite=skip may leave out in a run."""
    rank_timeout_seconds: Annotated[float, at_least(1)] = 600.0
    """A rank that others wait for longer than this is gone: the run ends and says which. While
    rank 0 prepares data or packs, the others wait ten times as long."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainable == "lora" and not self.base:
            raise ConfigError(
                "trainer.trainable=lora, trainer.base=null: adapters alone train on a finished "
                "run; name its folder, trainer.base=RUN_FOLDER"
            )
        share = self.devices * self.grad_accum * self.seq_len
        if self.batch_tokens % share:
            raise ConfigError(
                f"trainer.batch_tokens={self.batch_tokens} is not a multiple of devices x "
                f"grad_accum x seq_len = {self.devices} x {self.grad_accum} x {self.seq_len} = "
                f"{share}"
            )
