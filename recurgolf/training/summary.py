"""Summary: the figures of a finished run, the same in summary.json, in W&B and from Python."""

from __future__ import annotations

import dataclasses
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recurgolf.disk import DamagedFile, read_json, write_json

if TYPE_CHECKING:
    from recurgolf.training.job import Job

FILE = "summary.json"


@dataclass(frozen=True)
class Trained:
    """What came before the end of a run: its training, and the score of the weights as they are.

    Attributes:
        skipped: steps left out because a loss or gradient was not finite.
        val_bpb: before packing.
    """

    steps: int
    tokens: int
    skipped: int
    val_bpb: float


@dataclass
class Summary:
    """The result of a run. Losses are nats per token; bpb is bits per byte of validation text."""

    val_bpb: float
    """Of the reloaded artifact under the run's own protocol."""
    val_loss: float
    val_bpb_raw: float | None
    """The same over the bytes of the raw text: the figure to compare tokenizers by."""
    pre_quant_val_bpb: float
    evals: dict[str, dict[str, float]]
    """Protocol -> val_bpb, val_loss, tokens, bytes, seconds; with the raw text known also raw_bytes
    and val_bpb_raw. What is measured besides the headline follows: `sliding/passes=3`."""
    artifact_bytes: int
    """Model file + counted code."""
    bytes_model: int
    bytes_code: int
    """Packed source, as shipped: the figure that counts."""
    bytes_code_raw: int
    budget_bytes: int
    within_budget: bool
    params: int
    effective_params: int
    """Parameters with every visit counted."""
    steps: int
    tokens: int
    train_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    val_tokens: int
    val_bytes: int
    """Of the targets scored, by the token table (or the data set's sidecar)."""
    seed: int
    fingerprint: str
    status: str
    """finished | over_budget | diverged: the figures of one that diverged are null."""
    val_raw_bytes: float | None = None
    """Bytes of raw text that go with them; None where the raw text is not known."""
    by_passes: dict[str, float] = field(default_factory=dict)
    """Passes of the looped band -> val_bpb; empty unless eval.passes is a list."""
    folder: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> wall seconds."""
    caps: dict[str, Any] = field(default_factory=dict)
    """Cap of the budget -> its seconds, those used, phases that count, whether it was kept."""
    skipped_steps: int = 0
    """Steps left out because a loss or gradient was not finite."""
    environment: dict[str, Any] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    """Data set scored: name, fingerprint (of validation tokens and tokenizer), tokenizer."""
    normalizer: str = ""
    """What the tokenizer's normalizer rewrites, as `'e' becomes 'eeee'`: bits per byte are then no
    figure to compare. Empty where it is the challenge's."""
    quantization: dict[str, Any] = field(default_factory=dict)
    """What quantizing took: errors, retries of the factorisation, corrections."""
    diverged: str = ""
    """Why there are no figures; empty where there are."""
    trajectory: dict[str, Any] = field(default_factory=dict)
    """Error of the state behind every visit, of the packed network against the trained one."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def write(self, folder: Path) -> None:
        write_json(folder / FILE, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> Summary:
        """The summary in a run's folder.

        Raises:
            ConfigError: it is damaged.
        """
        path = Path(folder) / FILE
        told = read_json(path)
        try:
            return cls(**told)
        except TypeError as error:
            raise DamagedFile(f"{path} is damaged: {str(error).partition('() ')[2]}") from None


def environment(job: Job) -> dict[str, Any]:
    """Where the figures were measured; no figure compares without it."""
    device = job.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "ranks": job.ranks.world_size,
        "threads": torch.get_num_threads(),
        "precision": job.precision,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


__all__ = ["Summary", "Trained", "environment"]
