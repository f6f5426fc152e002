"""recurgolf export: a finished run as a folder in the challenge's form, which runs on its own.

The folder holds one program that trains and scores (`train_gpt.py`: packed, counted), the artifact,
`submission.json`, a README with the table of seeds, the logs, and the same source for reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recurgolf.audit.isolated import rescore
from recurgolf.compare.runs import read_run
from recurgolf.config import EXIT_OVER_BUDGET, ConfigError, kind_of
from recurgolf.counted.code import TRAIN_NAME, Codes, write_readable
from recurgolf.data import DataError
from recurgolf.data.dataset import tokenizer_of
from recurgolf.disk import read_json, write_file, write_json
from recurgolf.folders import made_whole
from recurgolf.log import Log, counted
from recurgolf.run import Run
from recurgolf.seal import FILE as SEAL
from recurgolf.seal import audit_state, broken
from recurgolf.training.own_data import check_own_data
from recurgolf.training.packing import ARTIFACT
from recurgolf.training.summary import FILE as SUMMARY
from recurgolf.training.summary import Summary
from recurgolf.verbs import add_trust, parser_of
from recurgolf.verbs.export_text import readme, requirements, submission


@dataclass
class Finished:
    """A finished run's folder, read."""

    folder: Path
    run: Run
    summary: Summary

    @property
    def audit(self) -> str:
        """What is known of its score, see `seal.audit_state`."""
        return audit_state(self.folder)


def main(arguments: Sequence[str]) -> int:
    """Write a finished run, or one per seed, as a folder that trains and scores on its own."""
    parser = parser_of("export", main.__doc__)
    parser.add_argument(
        "folders", nargs="+", type=Path, help="RUN [RUN …] DEST; with --check: DEST"
    )
    parser.add_argument("--check", action="store_true", help="score an exported folder and compare")
    parser.add_argument("--data", type=Path, help="--check: folder of the shards, if not the run's")
    parser.add_argument("--author", default="", help="for submission.json")
    parser.add_argument("--github-id", default="", help="for submission.json")
    parser.add_argument("--blurb", default="", help="for submission.json; default: what the run is")
    add_trust(parser)
    asked = parser.parse_args(arguments)
    log = Log(None)
    if asked.check:
        if len(asked.folders) != 1:
            raise ConfigError("export --check takes one folder, which `recurgolf export` has made")
        return check(asked.folders[0], asked.data, log, asked.trust)
    if len(asked.folders) < 2:
        raise ConfigError("export needs a finished run and a folder to make: export RUN DEST")
    *sources, folder = asked.folders
    runs = [read_finished(source, asked.trust) for source in sources]
    check_alike(runs)
    credits = {"author": asked.author, "github_id": asked.github_id, "blurb": asked.blurb}
    with made_whole(folder) as draft:
        codes = write(draft, runs, credits)
    return told(folder, runs, codes, log)


def told(folder: Path, runs: Sequence[Finished], codes: Codes, log: Log) -> int:
    """Say what has been written; the exit code."""
    first = runs[0]
    budget = first.summary.budget_bytes
    for name, code in (("train_gpt.py", codes.train), ("score.py", codes.score)):
        total = first.summary.bytes_model + code.packed_bytes
        left = budget - total
        verdict = f"{left:,} below" if left >= 0 else f"{-left:,} ABOVE"
        counts = " (artifact.code: this one counts)" if name == codes.counted_name else ""
        log.line(
            f"{ARTIFACT} {first.summary.bytes_model:,} + {name} {code.packed_bytes:,} "
            f"(raw {code.raw_bytes:,}) = {total:,} bytes: {verdict} the budget{counts}"
        )
    for one in runs:
        log.line(f"audit of {one.folder}: {one.audit}")
    log.line(f"exported to {folder}; recurgolf export --check {folder} scores it on its own")
    over = first.summary.bytes_model + codes.counted.packed_bytes > budget
    return EXIT_OVER_BUDGET if over else 0


def read_finished(folder: Path, trust: bool = False) -> Finished:
    """A run that has a result."""
    run = Run.read(folder, trust)
    for name in (SUMMARY, ARTIFACT):
        if not (folder / name).exists():
            raise ConfigError(f"{folder} has no {name}: the run did not finish")
    summary = Summary.read(folder)
    if summary.fingerprint != run.fingerprint:
        raise ConfigError(
            f"{folder}: summary.json is of run {summary.fingerprint}, run.json of {run.fingerprint}"
        )
    changed = broken(folder) if (folder / SEAL).exists() else []
    if changed:
        raise ConfigError(f"{folder}: {changed[0]}; an export holds only what the run itself left")
    return Finished(folder, run, summary)


def check_alike(runs: Sequence[Finished]) -> None:
    """Refuse runs that are not one experiment with different seeds."""
    first = read_run(runs[0].folder).settings
    for other in runs[1:]:
        mine = read_run(other.folder).settings
        if differing := sorted(dict(mine.items() ^ first.items())):
            key = differing[0]
            raise ConfigError(
                f"{other.folder} is another experiment than {runs[0].folder}: {key} is "
                f"{mine.get(key)}, not {first.get(key)}; one export holds seeds of one run"
            )
    seeds = [one.run.seed for one in runs]
    twice = {seed for seed in seeds if seeds.count(seed) > 1}
    if twice:
        raise ConfigError(f"seed {min(twice)} comes twice; export one run for every seed")


def write(folder: Path, runs: Sequence[Finished], credits: dict[str, str]) -> Codes:
    """Write the folder; the first run's artifact is the one that is shipped."""
    first = runs[0]
    codes = Codes(first.run)
    write_file(folder / "train_gpt.py", codes.train.source)
    write_file(folder / "score.py", codes.score.source)
    for name in (ARTIFACT, SUMMARY, "run.json"):
        write_file(folder / name, (first.folder / name).read_bytes())
    for one in runs:
        log = one.folder / "train.log"
        if log.exists():
            write_file(folder / f"train_seed{one.run.seed}.log", log.read_bytes())
    write_readable(codes.train, folder / "source")
    summaries = [one.summary for one in runs]
    entry = submission(first.run, summaries, codes, credits)
    entry["audit"] = {str(one.run.seed): one.audit for one in runs}
    write_json(folder / "submission.json", entry)
    write_file(folder / "README.md", readme(first.run, summaries, codes, entry))
    write_file(folder / "requirements.txt", requirements(first.run, codes.train))
    return codes


def check(folder: Path, data: Path | None, log: Log, trust: bool = False) -> int:
    """Score an exported folder on its own, and compare with its summary.json digit for digit.

    Args:
        data: folder of the shards; None: where the run's own data are.
        trust: import plugins that are not installed.

    Returns:
        0, or 1 where the numbers differ or the program fails.
    """
    run, summary = Run.read(folder, trust), Summary.read(folder)
    if not (folder / TRAIN_NAME).exists():
        raise ConfigError(f"{folder} has no {TRAIN_NAME}: it was not made by recurgolf export")
    if data is None:
        dataset = run.data.prepare(log.line)
        check_own_data(folder, dataset)
        data, tokenizer = dataset.folder, dataset.tokenizer.path
    else:
        try:
            tokenizer = tokenizer_of(data, None).path
        except DataError as error:
            log.line(str(error))
            return 1
    threads = summary.environment.get("threads", 1)
    log.line(f"scoring {folder / TRAIN_NAME} alone, {counted(threads, 'thread')} ...")
    again = rescore(folder, "train", data, tokenizer, kind_of(run.eval), threads)
    if again.error:
        log.line(again.error)
        return 1
    code = compared(again.entry["val_bpb"], run, summary, log)
    return max(code, compared_entry(folder, run, summary, log))


def compared(found: float, run: Run, summary: Summary, log: Log) -> int:
    """Hold the printed score against the run's; the exit code."""
    told = summary.val_bpb
    if summary.environment.get("ranks", 1) > 1:
        # Ranks batched their windows otherwise than one process does: the last digits may differ.
        same, how = abs(found - told) <= 1e-7 * told, "to 1e-7 (the run had several ranks)"
    else:
        same, how = found == told, "digit for digit"
    if same:
        log.line(f"the exported program scores val_bpb {found!r}: summary.json's, {how}")
        return 0
    log.line(f"DIFFERENT: the exported program scores {found!r}, summary.json says {told!r}")
    return 1


def compared_entry(folder: Path, run: Run, summary: Summary, log: Log) -> int:
    """Hold submission.json against summary.json, and say how the audit stood; the exit code."""
    entry = read_json(folder / "submission.json")
    told = {"val_bpb": summary.val_bpb, "val_loss": summary.val_loss}
    evals = summary.evals[kind_of(run.eval)]["val_bpb"]
    if evals != summary.val_bpb:
        log.line(f"DIFFERENT: summary.json says {summary.val_bpb!r}, its evals {evals!r}")
        return 1
    own = (entry.get("seed_results") or {}).get(str(run.seed), entry)
    if len(entry.get("seeds") or []) == 1:
        own = {**own, **{key: entry[key] for key in told}}
    wrong = [key for key, value in told.items() if own.get(key) != value]
    for key in wrong:
        log.line(
            f"DIFFERENT: submission.json says {key} {own.get(key)!r}, summary.json {told[key]!r}"
        )
    for seed, state in (entry.get("audit") or {str(run.seed): "not audited"}).items():
        log.line(f"audit when it was exported, seed {seed}: {state}")
    return int(bool(wrong))
