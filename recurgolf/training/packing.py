"""From stored tensors to the file: artifact.bin, the code that counts, and the ledger of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recurgolf import __version__
from recurgolf.artifact import pack
from recurgolf.artifact.ledger import add_actual, to_json
from recurgolf.config import to_dict
from recurgolf.data import Dataset
from recurgolf.disk import write_json
from recurgolf.quant import QuantizedState
from recurgolf.run import Run

if TYPE_CHECKING:
    from recurgolf.training.job import Job

ARTIFACT = "artifact.bin"
LEDGER = "ledger.json"


def write_artifact(job: Job, stored: QuantizedState) -> None:
    """Write artifact.bin, the counted code and ledger.json; the plan's lines get actual bytes.

    Args:
        stored: what `quantize_model` gave (rank 0).
    """
    run, folder, plan = job.run, job.folder, job.plan
    with job.clock.phase("packing"):
        job.log.line("packing the artifact ...")
        header = metadata(run, job.dataset)
        table = pack(folder / ARTIFACT, header, stored, run.artifact.codec)
        plan.code.write(folder)
    for line in table.render().splitlines():
        job.log.line(line)
    add_actual(plan.lines, table.tensors, table.header_bytes)
    ledger = to_json(plan.lines, plan.code.to_json(), run.budget.artifact_bytes, table)
    if stored.filled is not None:
        ledger["filled"] = stored.filled.to_json()
    write_json(folder / LEDGER, ledger)


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
