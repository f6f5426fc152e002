"""recurgolf import: somebody's checkpoint becomes a run folder, its weights kept exactly.

The folder has what a finished run has, less what only training makes: no metrics, no summary, and
a checkpoint at step 0 that holds the weights alone. `artifact.bin` is float32 unless the overrides
choose a quantizer, so scoring it gives the source's own score.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from recurgolf import importers
from recurgolf.config import ConfigError, suggestion
from recurgolf.data import DataError, Dataset
from recurgolf.importers import Imported
from recurgolf.log import Log
from recurgolf.model.transformer import Transformer
from recurgolf.plan import make_plan
from recurgolf.run import Run
from recurgolf.training import checkpoint
from recurgolf.training.clock import Clock
from recurgolf.training.distributed import Ranks
from recurgolf.training.packing import write_artifact
from recurgolf.training.quantize import quantize_model

KEPT_EXACTLY = ("quant=none", "quant.keep_dtype=float32", "artifact/codec=none", "tracker=none")
"""What an import adds to the source's experiment; overrides stand behind it."""


def main(arguments: Sequence[str]) -> int:
    """Make a run folder of a public system's checkpoint; evaluate, plan and pack take it."""
    parser = argparse.ArgumentParser(prog="recurgolf import", description=main.__doc__)
    parser.add_argument("system", help=", ".join(importers.SYSTEMS))
    parser.add_argument("weights", type=Path, help="state dict, .safetensors or .pt")
    parser.add_argument("config", type=Path, help="the source's hyper-parameters, a JSON file")
    parser.add_argument("folder", type=Path, help="to be made")
    parser.add_argument("overrides", nargs="*", help="of the Run, as in data=shards data.path=…")
    asked = parser.parse_args(arguments)
    check_request(asked.system, asked.weights, asked.folder)
    settings = read_config(asked.config)
    log = Log(None)
    given = [f"name=imported_{asked.system}", *KEPT_EXACTLY, *asked.overrides]
    found = importers.load(asked.system, settings, asked.weights, given)
    run = found.run
    assert run is not None
    dataset = prepared(run, log)
    source = {
        "system": asked.system,
        "weights": asked.weights.name,
        "weights_sha256": sha256(asked.weights),
        "config": dict(settings),
    }
    write_folder(asked.folder, found, dataset, source, log)
    log.line(f"tokenizer: {dataset.tokenizer.path} ({dataset.tokenizer.sha256[:12]}…), of the data")
    if found.passed_over:
        log.line(f"settings without bearing here: {', '.join(found.passed_over)}")
    log.line(f"folder: {asked.folder}")
    return 0


def check_request(system: str, weights: Path, folder: Path) -> None:
    """Refuse what needs no reading to be refused.

    Raises:
        ConfigError: an unknown system, missing weights, a destination that is in use.
    """
    if system not in importers.SYSTEMS:
        raise ConfigError(
            f"import {system!r}: no such system{suggestion(system, importers.SYSTEMS)}"
        )
    if not weights.is_file():
        raise ConfigError(f"weights {weights}: no such file")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: name a folder that is new or empty")


def read_config(path: Path) -> Mapping[str, Any]:
    """The source's hyper-parameters.

    Raises:
        ConfigError: no such file, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config {path}: no such file") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"config {path}: no JSON ({error})") from None


def prepared(run: Run, log: Log) -> Dataset:
    """The data that the model will be scored on; its tokenizer is noted in the artifact.

    Raises:
        ConfigError: data that is not there, or a tokenizer of another size than the token table.
    """
    try:
        return run.data.prepare(log.line)
    except DataError as error:
        raise ConfigError(
            f"{error}; an import needs the data that the model is scored on, with a tokenizer of "
            f"the token table's {run.data.vocab_size} pieces: data=shards data.path=FOLDER "
            "data.tokenizer=FILE"
        ) from None


def write_folder(
    folder: Path, found: Imported, dataset: Dataset, source: Mapping[str, Any], log: Log
) -> None:
    """Everything that evaluate, plan and pack read; the folder appears when it is whole."""
    run = found.run
    assert run is not None
    model = cast("Transformer", found.model.get_submodule("transformer"))
    draft = folder.parent / f".{folder.name}.{os.getpid()}"
    draft.mkdir(parents=True)
    try:
        run.write(draft)
        state = {"fingerprint": run.fingerprint, "tokens": 0, "imported": dict(source)}
        checkpoint.save(draft / "checkpoints", 0, {"model": dict(model.state_dict())}, state)
        clock = Clock()
        stored = quantize_model(run, model, dataset, Ranks(), clock, log)
        assert stored is not None
        write_artifact(run, draft, stored, dataset, make_plan(run), clock, log)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
