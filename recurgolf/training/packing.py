"""From trained weights to the file: quantise, pack, and the ledger of what it weighs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from recurgolf import __version__
from recurgolf.artifact import pack
from recurgolf.artifact.code import PACKED_NAME, code_of
from recurgolf.artifact.ledger import add_actual, to_json
from recurgolf.config import to_dict
from recurgolf.plan import Plan
from recurgolf.quant import quantize_state

if TYPE_CHECKING:
    from recurgolf.training.trainer import Trainer

ARTIFACT = "artifact.bin"
LEDGER = "ledger.json"


def write_artifact(trainer: Trainer, plan: Plan) -> None:
    """Quantise and pack the trainer's model: artifact.bin, score.py and ledger.json (rank 0).

    The actual bytes are added to the plan's lines.
    """
    run, folder, clock = trainer.run, trainer.folder, trainer.clock
    state = {k: v for k, v in trainer.model.state_dict().items() if not k.startswith("mtp.")}
    with clock.phase("quantization"):
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        stored = quantize_state(state, run.quant.assign(shapes))
    with clock.phase("packing"):
        trainer.log.line("packing the artifact ...")
        table = pack(folder / ARTIFACT, metadata(trainer), stored, run.artifact.codec)
        code = code_of(run)
        (folder / PACKED_NAME).write_text(code.source)
    add_actual(plan.lines, table.tensors, table.header_bytes)
    code_sizes = {
        "packed": (folder / PACKED_NAME).stat().st_size,
        "raw": code.raw_bytes,
        "counted": "packed",
        "modules": code.modules,
    }
    ledger = to_json(plan.lines, code_sizes, run.budget.artifact_bytes)
    (folder / LEDGER).write_text(json.dumps(ledger, indent=1) + "\n")


def metadata(trainer: Trainer) -> dict[str, Any]:
    """The header of the artifact: what `artifact.score.rebuild` needs, and where it is from."""
    run = trainer.run
    model = to_dict(run.model)
    model["mtp_heads"] = 0
    return {
        "model": model,
        "looping": to_dict(run.looping),
        "lora": to_dict(run.lora),
        "eval": to_dict(run.eval),
        "seq_len": run.trainer.seq_len,
        "data_vocab_size": run.data.vocab_size,
        "tokenizer": trainer.dataset.tokenizer.sha256,
        "text": trainer.dataset.fingerprint,
        "fingerprint": run.fingerprint,
        "recurgolf": __version__,
    }
