"""The limits a run is held to. Bytes are decimal: 16 MB is 16,000,000."""

from __future__ import annotations

from dataclasses import dataclass

from recurgolf.config import ConfigError, option


@option("budget", "budget")
@dataclass
class Budget:
    """Bytes of code plus packed model, and seconds."""

    artifact_bytes: int = 16_000_000
    train_seconds: float | None = None
    """Cap on the training clock; training stops after the first step that reaches it."""
    reserve_seconds: float = 0.0
    """Part of train_seconds kept for what also reads training data (calibration)."""

    def __post_init__(self) -> None:
        if self.artifact_bytes < 1:
            raise ConfigError(f"budget.artifact_bytes={self.artifact_bytes}: at least 1")
        if self.train_seconds is not None and self.train_seconds <= self.reserve_seconds:
            raise ConfigError(
                f"budget.train_seconds={self.train_seconds} leaves nothing beside "
                f"budget.reserve_seconds={self.reserve_seconds}"
            )

    @property
    def max_train_seconds(self) -> float | None:
        """Seconds that training steps may take."""
        return None if self.train_seconds is None else self.train_seconds - self.reserve_seconds
