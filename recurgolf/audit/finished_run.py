"""A finished run under audit: its files, its score measured again, and what the score may know."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recurgolf.artifact.score import text_of
from recurgolf.audit.accounts import byte_check, limits_check
from recurgolf.audit.check import FAIL, PASS, Audit, Check
from recurgolf.audit.isolated import Rescored, differences, rescore, text_alone
from recurgolf.audit.prediction import POSITIONS, prediction_checks, worst_of
from recurgolf.audit.scorer import Hints, Scored
from recurgolf.audit.scoring_process import scoring_process
from recurgolf.audit.texts import other_than_raw, raw_texts_of, separation_of
from recurgolf.budget import Budget
from recurgolf.config import ConfigError, from_dict
from recurgolf.counted.code import COUNTED
from recurgolf.data import DataError, Dataset
from recurgolf.data.dataset import open_dataset
from recurgolf.data.tokenizer import SPACE, PieceKind, Tokenizer
from recurgolf.disk import DamagedFile, read_json
from recurgolf.eval import Text
from recurgolf.eval.several import DAMAGES, FOLDER, file_name, kept_settings
from recurgolf.seal import audited, broken, signature_of, strangers
from recurgolf.trust import check_trusted

ROUNDING = 1e-5
"""Share by which a score may differ on another machine, or with several ranks."""

FIGURES = ("steps", "train_seconds", "artifact_bytes")
"""Of a summary, numbers that the checks calculate with; of all others they ask for equality."""

Say = Callable[[str], None]


def audit_run(
    folder: Path,
    say: Say = lambda line: None,
    *,
    positions: int = POSITIONS,
    chance: str | None = None,
    trust: bool = False,
) -> Audit:
    """Audit a finished run by its folder; several ranks' runs are audited by one process.

    This process imports no plugin of the run: what a plugin takes part in happens in another one
    (`scoring_process`), which hands over arrays.

    Args:
        say: told what is being done, a line at a time.
        positions: changed texts that causality is measured on; time is proportional to it.
        chance: where the audit looks, in hex, as an earlier one printed it; None: the system's
            source of chance, so that no artifact can know.
        trust: run plugins that are not installed, and a score.py of another version.

    Raises:
        ConfigError: no finished run, a damaged artifact, data that are not the run's, or plugins
            that lie beside the run and are not trusted.
    """
    began, config = time.perf_counter(), _run_json(folder)
    if not (folder / "artifact.bin").exists():
        raise ConfigError(f"{folder} has no artifact.bin: the run did not finish")
    check_trusted(config.get("plugins") or [], trust)
    summary, chance = read_summary(folder), chance or os.urandom(16).hex()
    threads = int((summary.get("environment") or {}).get("threads") or 1)
    found: list[list[Check]] = []
    scored: dict[str, Scored] = {}
    other: list[str] = []
    scorings = 0
    with scoring_process(folder, threads) as process:
        facts = process.facts
        dataset = open_dataset(Path(facts["data"]), Path(facts["tokenizer"]), facts["vocab_size"])
        text, kinds = text_of(dataset), kinds_of(dataset.tokenizer)
        windows = _windows(folder, config)
        say("audit: scoring again with the counted program alone ...")
        again = _rescored(folder, facts, dataset, dataset.validation_tokens(), threads, trust)
        for number, (name, scorer) in enumerate(process.scorers.items()):
            seconds = (summary.get("evals") or {}).get(name, {}).get("seconds", 0.0)
            say(f"audit: {name} on changed text (about {2 * positions + 1} x {seconds:.0f} s) ...")
            places = np.random.default_rng([*bytes.fromhex(chance), number])
            scorer.hints = _bounded(scorer.hints, windows, dataset.tokenizer.vocab_size)
            headline = name == facts["kind"]
            checks, trials = prediction_checks(
                scorer, text, places, positions, kinds if headline else None
            )
            found.append(checks)
            scored[name], scorings = trials.plain, scorings + trials.scorings
            if headline and trials.witness is not None:
                other = _other_text(folder, facts, dataset, *trials.witness, threads, trust)
        calibration = process.calibration()
    other += sums_that_do_not_follow(text, scored)
    other += _kept_scores(folder, dataset, text, scored)
    names = list(scored)
    checks = [worst_of(own, names) for own in zip(*found, strict=True)]
    say(f"audit: comparing {dataset.train_tokens:,} training tokens with validation ...")
    texts = raw_texts_of(config, dataset)
    checks += [
        byte_check(
            dataset,
            summary.get("evals") or {},
            {name: one.times for name, one in scored.items()},
            None if texts is None else sum(len(text.encode()) for text in texts),
            other_than_raw(dataset, texts),
        ),
        separation_of(config, dataset, calibration),
        _limits(folder, config, summary, facts["code"]),
        rescored_check(summary, again, scored, facts, config, other),
        files_check(folder, config, summary, facts, dataset),
    ]
    return Audit(
        checks,
        {
            "fingerprint": facts["fingerprint"],
            "signature": signature_of(folder),
            "audited": audited(folder),
            "text": dataset.fingerprint,
            "protocols": names,
            "plugins": facts["plugins"],
            "chance": chance,
            "positions": positions,
            "scorings": scorings,
            "seconds": round(time.perf_counter() - began, 3),
        },
    )


def _windows(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """Every length of window that a run's files name."""
    evals = config.get("eval") or {}
    named = [(config.get("trainer") or {}).get("seq_len"), evals.get("seq_len")]
    named += [one.get("seq_len") for one in evals.get("also") or [] if isinstance(one, dict)]
    for path in (folder / FOLDER).glob("*.npz"):
        named.append(kept_settings(path)[0].get("seq_len"))
    return [length for length in named if isinstance(length, int)]


def _bounded(hints: Hints, windows: Sequence[int], vocab_size: int) -> Hints:
    """What a protocol says of itself, as far as the run's files bear it out."""
    length = min(hints.length, max(windows, default=hints.length))
    size = min(hints.vocab_size, vocab_size)
    return replace(hints, length=length, stride=min(hints.stride, length), vocab_size=size)


def kinds_of(tokenizer: Tokenizer) -> np.ndarray:
    """Kind of every token [v]: those of a kind may be exchanged in a text, and it is still one that
    the tokenizer counts right; 0: those that may not."""
    kinds = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for token, piece in enumerate(tokenizer.pieces()):
        if piece.kind is PieceKind.TEXT and piece.text != SPACE:
            kinds[token] = 2 if piece.text.startswith(SPACE) else 1
        elif piece.kind is PieceKind.BYTE:
            sign = tokenizer.decode([np.array([token], dtype=np.uint16)])[0]
            kinds[token] = 3 if sign.isascii() and sign.isalnum() else 0
    return kinds


def _other_text(
    folder: Path,
    facts: Mapping[str, Any],
    dataset: Dataset,
    tokens: np.ndarray,
    scored: Scored,
    threads: int,
    trust: bool,
) -> list[str]:
    """Where the counted program, with another text in the place of the real one, differs from what
    the trials measured on that text: a score that knows when it counts, and cheats then."""
    try:
        dataset.byte_count.check(tokens, dataset.tokenizer)
    except DataError:
        return []
    again = _rescored(folder, facts, dataset, tokens, threads, trust)
    if again.error or scored.error:
        return [f"another text cannot be scored: {again.error or scored.error}"]
    same = ("val_loss", "tokens")
    wrong = differences(again.entry, scored.entry, ROUNDING, same, "in the trials it is")
    return [f"on another text in its place {line}" for line in wrong]


def _rescored(
    folder: Path,
    facts: Mapping[str, Any],
    dataset: Dataset,
    tokens: np.ndarray,
    threads: int,
    trust: bool,
) -> Rescored:
    program = COUNTED[facts["code"]]
    path = folder / program
    if path.is_file() and not trust:
        own = hashlib.sha256(path.read_bytes()).hexdigest()
        if own != facts["program"]:
            return Rescored(
                {},
                f"{program} is not the program that this version packs for the run; it is run "
                "only with --trust",
                "",
            )
    with text_alone(dataset, tokens) as (data, tokenizer):
        return rescore(folder, facts["code"], data, tokenizer, facts["kind"], threads)


def rescored_check(
    summary: Mapping[str, Any],
    again: Rescored,
    scored: Mapping[str, Scored],
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
    other: Sequence[str] = (),
) -> Check:
    """Hold every figure of the score against the counted program's, and against trials' baseline.

    Args:
        scored: protocol -> scoring of the real text in the trials.
        other: what the counted program and the trials differ in on another text.
    """
    evals, kind = summary.get("evals") or {}, facts["kind"]
    told, wrong = evals.get(kind) or {}, []
    where = summary.get("environment") or {}
    elsewhere = where.get("ranks", 1) > 1 or (config.get("trainer") or {}).get("device") != "cpu"
    tolerance = ROUNDING if elsewhere else 0.0
    if not summary:
        wrong.append("there is no summary.json: nothing says what was scored")
    if again.error:
        wrong.append(again.error)
    elif summary:
        wrong += differences(again.entry, told, tolerance)
        headline = {"val_bpb": "val_bpb", "val_loss": "val_loss", "val_tokens": "tokens"}
        for key, of in {**headline, "val_bytes": "bytes"}.items():
            if summary.get(key) != told.get(of):
                wrong.append(f"{key} is {summary.get(key)!r}, evals has {told.get(of)!r}")
    for name, one in scored.items():
        if name in evals and not one.error:
            wrong += [f"{name}: {text}" for text in differences(one.entry, evals[name], tolerance)]
    wrong += other
    number = None
    if again.entry and isinstance(told.get("val_bpb"), float):
        number = abs(again.entry["val_bpb"] - told["val_bpb"])
    bpb = f" {again.entry['val_bpb']!r}" if again.entry else " nothing"
    line = (
        f"difference of val_bpb from summary.json: {COUNTED[facts['code']]} and artifact.bin alone "
        f"in a folder give{bpb}"
    )
    if again.network:
        line += f", {again.network}"
    line += ", every digit the same" if not tolerance else f", to {tolerance:g} of it"
    untried = [name for name in evals if name not in scored]
    if untried and scored:
        line += f"; not measured again: {', '.join(untried)}"
    if wrong:
        line = line.replace(", every digit the same", "")
    return Check("rescored", number, FAIL if wrong else PASS, "; ".join([line, *wrong]))


def files_check(
    folder: Path,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    facts: Mapping[str, Any],
    dataset: Dataset,
) -> Check:
    """Whether the files are those that one run left together, and no others."""
    wrong = broken(folder)
    beside = strangers(folder)
    if beside:
        wrong.append(f"beside the run lies what no run leaves and no count knows: {beside[0]}")
        wrong[-1] += f" and {len(beside) - 1} more" if len(beside) > 1 else ""
    header, own = facts["header"], facts["fingerprint"]
    made = {"artifact.bin": header.get("fingerprint"), "summary.json": summary.get("fingerprint")}
    for name, fingerprint in made.items():
        if fingerprint != own:
            wrong.append(f"{name} is of run {fingerprint}, run.json of run {own}")
    for part in facts["parts"]:
        if header.get(part) != facts["parts"][part]:
            wrong.append(f"artifact.bin has another {part} than run.json")
    texts = {
        "artifact.bin": header.get("text"),
        "summary.json": (summary.get("text") or {}).get("fingerprint"),
    }
    for name, text in texts.items():
        if text != dataset.fingerprint:
            wrong.append(f"{name} tells of another validation text than the one in the data")
    budget = (config.get("budget") or {}).get("artifact_bytes")
    for key, value in {"budget_bytes": budget, "seed": config.get("seed")}.items():
        if summary and summary.get(key) != value:
            wrong.append(f"summary.json says {key}={summary.get(key)}, run.json {value}")
    wrong += _derived(folder, summary, facts["code"], dataset)
    line = "files that are not as one run left them together under its seal; plugins: "
    line += ", ".join(f"{k} from {v}" for k, v in facts["plugins"].items()) or "none"
    return Check("files", len(wrong), FAIL if wrong else PASS, "; ".join([line, *wrong]))


def _derived(folder: Path, summary: Mapping[str, Any], code: str, dataset: Dataset) -> list[str]:
    """Figures of summary.json and ledger.json that follow from others and are not what follows."""
    try:
        ledger = read_json(folder / "ledger.json")
    except (OSError, DamagedFile):
        ledger = {}
    sizes = {
        name: path.stat().st_size if path.is_file() else 0
        for name, path in (("model", folder / "artifact.bin"), ("code", folder / COUNTED[code]))
    }
    total, budget = sum(sizes.values()), summary.get("budget_bytes")
    told = {"summary.json": summary, "ledger.json": ledger}
    follows: list[tuple[str, str, Any]] = [
        ("summary.json", "bytes_model", sizes["model"]),
        ("summary.json", "bytes_code", sizes["code"]),
        ("summary.json", "within_budget", isinstance(budget, int) and total <= budget),
        ("ledger.json", "actual_bytes", total),
        ("ledger.json", "budget_bytes", budget),
    ]
    wrong = [
        f"{file} says {key}={told[file][key]}, the files give {value}"
        for file, key, value in follows
        if summary and key in told[file] and told[file][key] != value
    ]
    raw, sidecar = dataset.val_raw_bytes, dataset.val_byte_sidecar
    if raw is None:
        return wrong
    share = (dataset.val_bytes if sidecar is None else int(sidecar.sum())) / raw
    evals = {f"evals.{n}.": entry or {} for n, entry in (summary.get("evals") or {}).items()}
    for name, entry in {"": summary, **evals}.items():
        bpb, of_raw = entry.get("val_bpb"), entry.get("val_bpb_raw")
        if isinstance(bpb, float) and of_raw is not None:
            same = isinstance(of_raw, float) and math.isclose(of_raw, bpb * share, rel_tol=1e-9)
            if not same:
                wrong.append(f"summary.json says {name}val_bpb_raw={of_raw}, {bpb * share} follows")
    return wrong


def sums_that_do_not_follow(text: Text, scored: Mapping[str, Scored]) -> list[str]:
    """Scores that are not the sums of what was entered target by target, over the bytes of those
    targets: a protocol can reach into its accumulator."""
    wrong = []
    for name, one in scored.items():
        count = int(one.times.sum())
        if one.error or not count or one.times.max() > 1:
            continue
        nats = float((one.nats * one.times).sum())
        size = int((text.bytes_of(0, text.num_targets) * one.times).sum())
        follows = {"tokens": count, "bytes": size, "val_loss": nats / count}
        follows["val_bpb"] = nats / math.log(2) / max(size, 1)
        for key, value in follows.items():
            said = one.entry.get(key)  # None where it is no finite number
            if not isinstance(said, int | float) or not math.isclose(said, value, rel_tol=1e-9):
                wrong.append(f"{name}: {key} is {said!r}, its targets give {value!r}")
    return wrong


def _kept_scores(
    folder: Path, dataset: Dataset, text: Text, scored: Mapping[str, Scored]
) -> list[str]:
    """Files of scores/ that hold other sums per document than were measured; by them runs are
    compared."""
    wrong = []
    for name, one in scored.items():
        path = folder / FOLDER / file_name(name)
        if one.error or not path.is_file() or one.times.max() > 1:
            continue
        found = np.add.reduceat(one.nats * one.times, text.starts)
        try:
            with np.load(path, allow_pickle=False) as kept:
                if str(kept["text"]) != dataset.fingerprint:
                    continue
                same = np.allclose(kept["nats"], found, rtol=1e-4, atol=1e-4)
        except DAMAGES:
            same = False
        if not same:
            wrong.append(f"scores/{path.name} holds other sums than were measured")
    return wrong


def _limits(
    folder: Path, config: Mapping[str, Any], summary: Mapping[str, Any], code: str
) -> Check:
    if not summary:
        return Check("limits", None, FAIL, "no summary.json: no ledger of the run's clocks")
    steps = max(int(summary.get("steps", 1)), 1)
    return limits_check(
        from_dict(Budget, config.get("budget") or {}),
        summary.get("seconds") or {},
        float(summary.get("train_seconds", 0.0)) / steps,
        {name: folder / name for name in ("artifact.bin", COUNTED[code])},
        {"artifact_bytes": summary.get("artifact_bytes", 0)},
    )


def _run_json(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "run.json")
    except FileNotFoundError:
        raise ConfigError(f"{folder} is not a run folder: it has no run.json") from None


def read_summary(folder: Path) -> dict[str, Any]:
    """What summary.json says; nothing where there is none."""
    path = folder / "summary.json"
    try:
        summary = read_json(path)
    except FileNotFoundError:
        return {}
    evals = _object(path, "evals", summary.get("evals"))
    entries = {f"evals.{name}": _object(path, name, entry) for name, entry in evals.items()}
    where = _object(path, "environment", summary.get("environment"))
    _object(path, "text", summary.get("text"))
    figures = dict(_object(path, "seconds", summary.get("seconds")))
    figures |= {name: summary[name] for name in FIGURES if name in summary}
    figures |= {name: where[name] for name in ("threads", "ranks") if name in where}
    figures |= {n: entry["seconds"] for n, entry in entries.items() if "seconds" in entry}
    for name, value in figures.items():
        if type(value) not in (int, float):
            raise DamagedFile(f"{path} is damaged: {name} is {value!r:.40} instead of a number")
    return summary


def _object(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise DamagedFile(f"{path} is damaged: {name} is {value!r:.40} instead of an object")
    return value or {}
