"""The trainer's knobs: steps, batch, precision, devices."""

from __future__ import annotations

from dataclasses import dataclass

from recurgolf.config import ConfigError, option, suggestion

PRECISIONS = ("auto", "float32", "bfloat16")


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
    compile: bool = False
    """torch.compile each block."""
    warmup_steps: int = 0
    """Steps run before the clock starts; weights, optimizer and data are reset behind them."""
    log_every: int = 25
    """Steps between training lines."""
    val_every: int = 0
    """Steps between validations of the unpacked model; 0: only at the end."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: one at the end."""

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "batch_tokens", "grad_accum", "devices", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"trainer.{name}={getattr(self, name)}: at least 1")
        for name in ("warmup_steps", "val_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"trainer.{name}={getattr(self, name)}: 0 or more")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"trainer.threads={self.threads}: at least 1")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"trainer.device={self.device!r}: cpu or cuda")
        if self.progress not in ("steps", "wallclock"):
            raise ConfigError(f"trainer.progress={self.progress!r}: steps or wallclock")
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
