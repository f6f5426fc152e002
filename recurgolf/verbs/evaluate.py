"""recurgolf evaluate: score the artifact of a finished run again, by one protocol or several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from recurgolf.artifact import ArtifactError, load
from recurgolf.artifact.decode import MissingLibrary
from recurgolf.artifact.score import Scorable, check_data, check_run, rebuild
from recurgolf.config import EXIT_FAILED, ConfigError
from recurgolf.data import Dataset
from recurgolf.data.shard_fingerprints import check_unchanged
from recurgolf.disk import DamagedFile, json_text, read_json, write_json
from recurgolf.eval import Eval, Score
from recurgolf.eval.several import free_names, named_protocols, write_scores
from recurgolf.eval.ttt import SgdEval
from recurgolf.loaded import PARTS
from recurgolf.log import Log
from recurgolf.overrides import check_parts, group_of
from recurgolf.run import Run
from recurgolf.seal import resealing
from recurgolf.terminal import terminal_bar
from recurgolf.training.job import Job
from recurgolf.training.own_data import check_own_data
from recurgolf.training.scoring import entry_of, score_all
from recurgolf.training.summary import FILE as SUMMARY
from recurgolf.verbs import add_json, add_trust, parser_of

OTHER_EVALS = "evals.json"
"""Where entries go in a folder without a summary (an imported checkpoint)."""


def main(arguments: Sequence[str]) -> int:
    """Score the artifact of a finished run again.

    Every `eval=` is one more protocol; `eval.key=value` behind it belongs to it, one in front of
    the first `eval=` to all. Each adds an entry to summary.json's `evals` and a file in scores/;
    the headline stays as the run made it. Exit code 1 if a score is not finite.
    """
    parser = parser_of("evaluate", main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of a finished run")
    parser.add_argument("overrides", nargs="*", help="of eval and data, as in eval=sliding")
    add_json(parser)
    add_trust(parser)
    asked = parser.parse_intermixed_args(arguments)
    finished = Run.read(asked.folder, asked.trust)
    run, protocols = _asked(finished, asked.overrides)
    log = Log(None, stderr=asked.json, bar=terminal_bar)
    job = Job.watched(run, asked.folder, log=log)
    path = asked.folder / "artifact.bin"
    if not path.exists():
        raise ConfigError(f"{asked.folder} has no artifact.bin: the run did not finish")
    try:
        scorable = rebuild(load(path))
        check_run(scorable.metadata, finished)
        dataset = job.dataset
        check_data(scorable.metadata, dataset)
        # Another text is fine where it was asked for, and only there.
        if not any(override.startswith("data") for override in asked.overrides):
            check_own_data(asked.folder, dataset)
    except (ArtifactError, MissingLibrary) as error:
        raise ConfigError(f"{path}: {error}") from None
    if dataset.fingerprint != scorable.metadata["text"]:
        log.line(f"{dataset.folder}: another text than the run's own; figures do not compare")
    found = _scored(job, scorable, protocols)
    check_unchanged(dataset.files)
    entries = {name: entry_of(score, dataset) for name, score in found.items()}
    for name, score in found.items():
        raw = entries[name].get("raw_bytes")
        of_raw = "" if raw is None else f" ({raw:,.0f} bytes of raw text)"
        log.line(
            f"{name}: val_bpb {score.val_bpb:.6f}, val_loss {score.val_loss:.6f} over "
            f"{score.tokens:,} tokens = {score.bytes:,} bytes{of_raw} in {score.seconds:.1f} s"
        )
    _keep(asked.folder, dataset, protocols, found, log)
    if asked.json:
        print(json_text(entries))
    return 0 if all(math.isfinite(score.val_bpb) for score in found.values()) else EXIT_FAILED


def _scored(job: Job, scorable: Scorable, protocols: dict[str, Eval]) -> dict[str, Score]:
    text = job.text
    for name, protocol in protocols.items():
        protocol.check_model(scorable.model.config, scorable.looping)
        protocol.check(text.num_targets, protocol.seq_len or scorable.seq_len)
        if isinstance(protocol, SgdEval) and protocol.chunk_tokens >= text.num_targets:
            job.log.line(
                f"{name}: eval.chunk_tokens={protocol.chunk_tokens} holds the whole text, so "
                "nothing is learned; take smaller chunks"
            )
    return score_all(job, protocols, scorable)


def _keep(
    folder: Path,
    dataset: Dataset,
    protocols: dict[str, Eval],
    found: dict[str, Score],
    log: Log,
) -> None:
    """Add the evaluations to the run's folder, beside what is there."""
    text = dataset.fingerprint
    path = folder / (SUMMARY if (folder / SUMMARY).exists() else OTHER_EVALS)
    try:
        names = free_names(folder, found, protocols, text)
        with resealing(folder):
            content = read_json(path) if path.exists() else {"evals": {}}
            if not isinstance(content.get("evals"), dict):
                raise DamagedFile(f"{path} is damaged: it has no evals")
            for name, score in found.items():
                content["evals"][names[name]] = entry_of(score, dataset)
            write_scores(folder, found, protocols, text, names)
            write_json(path, content)
    except (OSError, DamagedFile) as error:
        # A score of somebody else's folder is worth printing although it cannot be kept.
        log.line(f"not kept in {folder}: {getattr(error, 'strerror', None) or error}")
        return
    log.line(f"kept in {path} as {', '.join(names.values())}")


def _asked(run: Run, overrides: Sequence[str]) -> tuple[Run, dict[str, Eval]]:
    """The finished Run with the data asked for, and every protocol asked for."""
    from recurgolf.composing import compose_parts

    check_parts(overrides, PARTS, "evaluate")
    common: list[str] = []
    each: list[list[str]] = []
    for override in overrides:
        if override.startswith("eval="):
            each.append([override])
        elif group_of(override) == "eval" and each:
            each[-1].append(override)
        else:
            common.append(override)
    wanted = [[line[0], *common, *line[1:]] for line in each] or [common]
    runs = [compose_parts(run, line) for line in wanted]
    return runs[0], named_protocols([one.eval for one in runs], run.trainer.seq_len)
