"""The limits a run is held to. Bytes are decimal: 16 MB is 16,000,000."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from recurgolf.config import Checked, ConfigError, option
from recurgolf.limits import above, at_least, not_empty, one_of

PHASES = (
    *("setup", "warmup", "training", "checkpoint", "validation", "calibration"),
    *("quantization", "packing", "evaluation", "base"),
)
"""What a run spends its time on; `warmup` is compiling and the steps before the clock starts,
`base` what the run of `trainer.base` had spent on its training clock."""

TRAINING = "training"
"""The cap that ends training."""


@dataclass
class Cap(Checked):
    """Seconds that some phases may take together."""

    seconds: Annotated[float | None, above(0)] = None
    """null, for the cap `training` alone: budget.train_seconds."""
    phases: Annotated[list[str], not_empty, one_of(PHASES)] = field(default_factory=list)
    """Which of a run's phases count."""


@option("budget", "budget")
@dataclass
class Budget(Checked):
    """Bytes of code plus packed model, and seconds."""

    artifact_bytes: Annotated[int, at_least(1)] = 16_000_000
    """Largest sum of the packed model and the code that counts (artifact.code)."""
    train_seconds: float | None = None
    """Cap on the training clock; training stops after the first step that reaches it."""
    reserve_seconds: Annotated[float, at_least(0)] = 0.0
    """Part of train_seconds kept for what also reads training data (calibration)."""
    caps: dict[str, Cap] = field(default_factory=dict)
    """Which phases count against which clock, such as evaluation: {seconds: 600, phases:
    [evaluation]}. The cap `training` is there by itself where train_seconds is, over training,
    checkpoint, calibration and base: whatever works on the weights or reads training data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_seconds is not None and self.train_seconds <= self.reserve_seconds:
            raise ConfigError(
                f"budget.train_seconds={self.train_seconds} leaves nothing beside "
                f"budget.reserve_seconds={self.reserve_seconds}"
            )
        for name, cap in self.caps.items():
            self._check_cap(name, cap)

    def _check_cap(self, name: str, cap: Cap) -> None:
        if name == TRAINING:
            if TRAINING not in cap.phases:
                raise ConfigError(f"budget.caps.{name}.phases={cap.phases} lacks 'training'")
            if cap.seconds is not None and cap.seconds != self.train_seconds:
                raise ConfigError(
                    f"budget.caps.{name}.seconds={cap.seconds}, but budget.train_seconds="
                    f"{self.train_seconds} ends training: leave the former out"
                )
        elif cap.seconds is None:
            raise ConfigError(f"budget.caps.{name}.seconds=null: above 0")

    @property
    def max_train_seconds(self) -> float | None:
        """Seconds that training steps may take."""
        return None if self.train_seconds is None else self.train_seconds - self.reserve_seconds

    @property
    def train_phases(self) -> list[str]:
        """What the training clock counts."""
        own = self.caps.get(TRAINING)
        return own.phases if own else [TRAINING, "checkpoint", "calibration", "base"]

    @property
    def all_caps(self) -> dict[str, Cap]:
        """Every cap by name, `training` with its seconds."""
        others = {name: cap for name, cap in self.caps.items() if name != TRAINING}
        if self.train_seconds is None:
            return others
        return {TRAINING: Cap(self.train_seconds, self.train_phases), **others}
