"""From stored tensors to the file: artifact.bin, the code that counts, and the ledger of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recurgolf import __version__
from recurgolf.artifact import pack
from recurgolf.artifact.code import PACKED_NAME, codes_of
from recurgolf.artifact.ledger import add_actual, to_json
from recurgolf.config import to_dict
from recurgolf.data import Dataset
from recurgolf.disk import writing
from recurgolf.log import Log
from recurgolf.plan import Plan
from recurgolf.quant import QuantizedState
from recurgolf.run import Run
from recurgolf.training.clock import Clock

ARTIFACT = "artifact.bin"
LEDGER = "ledger.json"


def write_artifact(
    run: Run,
    folder: Path,
    stored: QuantizedState,
    dataset: Dataset,
    plan: Plan,
    clock: Clock,
    log: Log,
) -> None:
    """Write artifact.bin, score.py and ledger.json (rank 0); the plan's lines get actual bytes.

    Args:
        stored: what `quantize_model` gave.
        dataset: whose tokenizer and text the artifact names.
    """
    with clock.phase("packing"):
        log.line("packing the artifact ...")
        table = pack(folder / ARTIFACT, metadata(run, dataset), stored, run.artifact.codec)
        codes = codes_of(run)
        with writing(folder / PACKED_NAME, codes.counted.packed_bytes):
            codes.write(folder)
    for line in table.render().splitlines():
        log.line(line)
    add_actual(plan.lines, table.tensors, table.header_bytes)
    ledger = to_json(plan.lines, codes.to_json(), run.budget.artifact_bytes, table)
    if stored.filled is not None:
        ledger["filled"] = stored.filled.to_json()
    text = json.dumps(ledger, indent=1) + "\n"
    with writing(folder / LEDGER, len(text)):
        (folder / LEDGER).write_text(text)


def metadata(run: Run, dataset: Dataset) -> dict[str, Any]:
    """The header of the artifact: what `artifact.score.rebuild` needs, and where it is from."""
    model = to_dict(run.model)
    model["mtp_heads"] = 0
    return {
        "model": model,
        "looping": to_dict(run.looping),
        "lora": to_dict(run.lora),
        "eval": to_dict(run.eval.alone),
        "seq_len": run.trainer.seq_len,
        "data_vocab_size": run.data.vocab_size,
        "tokenizer": dataset.tokenizer.sha256,
        "text": dataset.fingerprint,
        "fingerprint": run.fingerprint,
        "recurgolf": __version__,
    }
