"""Summary: the figures of a finished run, the same in summary.json, in W&B and from Python."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "summary.json"


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
    """Protocol -> val_bpb, val_loss, tokens, bytes, seconds."""
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
    seed: int
    fingerprint: str
    status: str
    """finished | over_budget."""
    folder: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> wall seconds."""
    environment: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def write(self, folder: Path) -> None:
        draft = folder / f".{FILE}"
        draft.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        draft.replace(folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> Summary:
        return cls(**json.loads((Path(folder) / FILE).read_text()))
