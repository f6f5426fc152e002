"""recurgolf import: somebody's checkpoint becomes a run folder, its weights kept exactly.

The folder has what a finished run has, less what only training makes: no metrics, and a checkpoint
at step 0 that holds the weights alone; `--score` adds the summary. `artifact.bin` is float32 unless
the overrides choose a quantizer, so scoring it gives the source's own score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recurgolf import importers
from recurgolf.config import ConfigError
from recurgolf.data import DataError, Dataset
from recurgolf.disk import sha256
from recurgolf.folders import check_new
from recurgolf.training.job import Job
from recurgolf.training.new_folder import keep_weights, new_folder, pack, pack_and_score
from recurgolf.verbs import parser_of

KEPT_EXACTLY = ("quant=none", "quant.keep_dtype=float32", "artifact/codec=none", "tracker=none")
"""What an import adds to the source's experiment; overrides stand behind it."""


def main(arguments: Sequence[str]) -> int:
    """Make a run folder of a public system's checkpoint; evaluate, plan and pack take it."""
    parser = parser_of("import", main.__doc__)
    parser.add_argument("system", help=", ".join(importers.SYSTEMS))
    parser.add_argument("weights", type=Path, help="state dict, .safetensors or .pt")
    parser.add_argument("config", type=Path, help="the source's hyper-parameters, a JSON file")
    parser.add_argument("folder", type=Path, help="to be made")
    parser.add_argument("overrides", nargs="*", help="of the Run, as in data=shards data.path=…")
    parser.add_argument("--score", action="store_true", help="score the file: summary.json")
    asked = parser.parse_intermixed_args(arguments)
    check_new(asked.folder)
    settings = read_config(asked.config)
    given = [f"name=imported_{asked.system}", *KEPT_EXACTLY, *asked.overrides]
    found = importers.load(asked.system, settings, asked.weights, given)
    source = {
        "system": asked.system,
        "weights": asked.weights.name,
        "weights_sha256": sha256(asked.weights),
        "config": dict(settings),
    }
    with new_folder(found.run, asked.folder) as job:
        tokenizer = prepared(job).tokenizer
        keep_weights(job, found.model.transformer, {"imported": source})
        (pack_and_score if asked.score else pack)(job, found.model.transformer)
        job.log.line(f"tokenizer: {tokenizer.path} ({tokenizer.sha256[:12]}…), of the data")
        if found.passed_over:
            job.log.line(f"settings without bearing here: {', '.join(found.passed_over)}")
        job.log.line(f"folder: {asked.folder}")
    return 0


def read_config(path: Path) -> Mapping[str, Any]:
    """The source's hyper-parameters."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config {path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"config {path}: no JSON ({error})") from None


def prepared(job: Job) -> Dataset:
    """The data that the model will be scored on; its tokenizer is noted in the artifact."""
    try:
        return job.dataset
    except DataError as error:
        raise ConfigError(
            f"{error}; an import needs the data that the model is scored on, with a tokenizer of "
            f"the token table's {job.run.data.vocab_size} pieces: data=shards data.path=FOLDER "
            "data.tokenizer=FILE"
        ) from None
