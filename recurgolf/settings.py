"""The trainer's knobs: steps, batch, precision, devices."""

from __future__ import annotations

from dataclasses import dataclass

from recurgolf.config import ConfigError, option, suggestion

TELEMETRY = ("none", "validation", "log")
PRECISIONS = ("auto", "float32", "bfloat16")
NON_FINITE = ("stop", "skip")

NOT_FINGERPRINTED = (
    *("resume", "log_every", "val_every", "checkpoint_every", "checkpoint_seconds"),
    *("keep_last", "keep_best", "rank_timeout_seconds", "telemetry"),
)
"""What is recorded and kept: no result depends on these fields, nor does the fingerprint."""


@option("trainer", "trainer")
@dataclass
class TrainerConfig:
    """How training runs. Lengths and batches are in tokens over all ranks."""

    steps: int = 1000
    seq_len: int = 256
    batch_tokens: int = 2048
    """Tokens per optimizer step over all ranks and micro-steps."""
    grad_accum: int = 1
    """Micro-steps per optimizer step on every rank."""
    device: str = "cpu"
    """cpu | cuda."""
    devices: int = 1
    """Ranks; each is one process (gloo on the CPU, nccl on GPUs)."""
    threads: int | None = None
    """CPU threads per rank; null: all cores for one rank, one each for several."""
    progress: str = "steps"
    """What schedules follow: steps (repeatable) | wallclock (the challenge's ten minutes)."""
    precision: str = "auto"
    """Of the matrix products in training: float32 | bfloat16 (autocast) | auto (whichever a short
    probe finds faster; bfloat16 on GPUs). Scoring is always float32 on the CPU."""
    trainable: str = "all"
    """all | lora: only the adapters train, on the frozen weights of `base`."""
    base: str | None = None
    """Folder of the run whose weights trainable=lora starts from and keeps."""
    compile: bool = False
    """torch.compile each block in training; scoring runs uncompiled."""
    compile_backend: str = "inductor"
    """Of torch.compile; aot_eager and eager need no compiler on the machine."""
    activation_checkpointing: bool = False
    """Keep one state per visit of a block and compute the rest again in the backward pass: memory
    hardly grows with passes, a step takes about a third longer, gradients are the same."""
    warmup_steps: int = 0
    """Steps run before the clock starts; weights, optimizer and data are reset behind them."""
    log_every: int = 25
    """Steps between training lines."""
    telemetry: str = "validation"
    """Curves of what the loop does at every visit: none | validation (with every validation) | log
    (with every training line too). Off the training clock; results do not change."""
    val_every: int = 0
    """Steps between validations of the unpacked model; 0: only at the end."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: by checkpoint_seconds alone. There is always one at the end."""
    checkpoint_seconds: float = 120.0
    """Seconds between checkpoints; 0: by checkpoint_every alone."""
    keep_last: int = 2
    """How many of the newest checkpoints stay."""
    keep_best: int = 1
    """How many of those with the lowest validation score stay besides (needs val_every)."""
    resume: str = "never"
    """never: start anew | auto: from the newest whole checkpoint of the run's folder, if there is
    one | a folder: from that run's, or from that checkpoint."""
    non_finite: str = "stop"
    """A loss or gradient that is no finite number: stop (keeps the batch and a report) | skip (the
    step changes nothing; at most max_skipped of them)."""
    max_skipped: int = 10
    """Steps that non_finite=skip may leave out in a run."""
    rank_timeout_seconds: float = 600.0
    """A rank that others wait for longer than this is gone: the run ends and says which. While
    rank 0 prepares data or packs, the others wait ten times as long."""

    def __post_init__(self) -> None:
        lengths = ("steps", "seq_len", "batch_tokens", "grad_accum", "devices", "log_every")
        for name in (*lengths, "keep_last", "rank_timeout_seconds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"trainer.{name}={getattr(self, name)}: at least 1")
        intervals = ("warmup_steps", "val_every", "checkpoint_every", "checkpoint_seconds")
        for name in (*intervals, "keep_best", "max_skipped"):
            if getattr(self, name) < 0:
                raise ConfigError(f"trainer.{name}={getattr(self, name)}: 0 or more")
        if self.non_finite not in NON_FINITE:
            raise ConfigError(
                f"trainer.non_finite={self.non_finite!r}{suggestion(self.non_finite, NON_FINITE)}"
            )
        if not self.resume:
            raise ConfigError("trainer.resume='': never, auto, or a folder")
        if self.trainable not in ("all", "lora"):
            raise ConfigError(f"trainer.trainable={self.trainable!r}: all or lora")
        if (self.trainable == "lora") != bool(self.base):
            raise ConfigError(
                f"trainer.trainable={self.trainable}, trainer.base={self.base}: adapters alone "
                "train on a finished run, so trainable=lora and base=RUN_FOLDER go together"
            )
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"trainer.threads={self.threads}: at least 1")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"trainer.device={self.device!r}: cpu or cuda")
        if self.progress not in ("steps", "wallclock"):
            raise ConfigError(f"trainer.progress={self.progress!r}: steps or wallclock")
        if self.telemetry not in TELEMETRY:
            raise ConfigError(
                f"trainer.telemetry={self.telemetry!r}{suggestion(self.telemetry, TELEMETRY)}"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"trainer.precision={self.precision!r}{suggestion(self.precision, PRECISIONS)}"
            )
        share = self.devices * self.grad_accum * self.seq_len
        if self.batch_tokens % share:
            raise ConfigError(
                f"trainer.batch_tokens={self.batch_tokens} is not a multiple of devices x "
                f"grad_accum x seq_len = {self.devices} x {self.grad_accum} x {self.seq_len} = "
                f"{share}"
            )
