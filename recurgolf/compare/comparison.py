"""Settings against a baseline: tables over seeds, tests, and a plain verdict."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recurgolf.compare import statistics
from recurgolf.compare.groups import (
    ABSENT,
    Group,
    differing_settings,
    grouped,
    name_by_options,
    spread,
)
from recurgolf.compare.runs import FoundRun, find_runs
from recurgolf.compare.statistics import Test
from recurgolf.config import ConfigError
from recurgolf.eval.several import DAMAGES

METRICS = ("val_bpb", "pre_quant_val_bpb")
EQUAL = "equal within the margin"
TESTS = {"welch": statistics.welch, "paired": statistics.paired}
"""What a verdict may rest on. The bootstrap over documents is always shown beside it: it knows
nothing of the chance in training."""


@dataclass(frozen=True)
class Rules:
    """How a verdict is found.

    Attributes:
        metric: figure of the summaries that is compared, bits per byte.
        margin_nats: nats per token by which a candidate has to be better.
        alpha: largest probability of a wrong verdict, over all candidates together.
        test: welch | paired.
    """

    metric: str = "val_bpb"
    margin_nats: float = statistics.MARGIN_NATS
    alpha: float = 0.01
    test: str = "welch"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ConfigError(f"--metric {self.metric!r}: {' or '.join(METRICS)}")
        if self.test not in TESTS:
            raise ConfigError(f"--test {self.test!r}: {' or '.join(TESTS)}")
        if not 0 < self.alpha < 0.5:
            raise ConfigError(f"--alpha {self.alpha}: above 0 and below 0.5")
        if self.margin_nats < 0:
            raise ConfigError(f"--margin {self.margin_nats}: 0 or more nats per token")


@dataclass
class Verdict:
    """A candidate against the baseline.

    Attributes:
        tests: by name: welch, paired (where seeds are shared), documents (where both sides kept
            their scores per document).
        word: better | worse | equal within the margin | cannot tell.
        p: of the verdict's test for `better`, raised for the number of candidates.
        seeds_needed: per setting, where more seeds could decide; None where they are unknown or
            too many.
        why: half a sentence behind the word.
    """

    group: Group
    tests: dict[str, Test]
    word: str = "cannot tell"
    p: float | None = None
    seeds_needed: int | None = None
    why: str = ""


@dataclass
class Comparison:
    """All that `recurgolf compare` has to say."""

    rules: Rules
    groups: list[Group]
    baseline: Group | None
    margin_bpb: float
    nats_per_bpb: float
    """Nats per token that are one bit per byte, with this tokenizer on this text."""
    protocol: str
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(
    folders: Sequence[Path],
    baseline: str | None = None,
    seeds: Sequence[str] | None = None,
    rules: Rules | None = None,
) -> Comparison:
    """Group the runs below folders, and test every group against the baseline.

    Args:
        baseline: a folder, or words of a group's setting such as `lora.rank=0`.
        seeds: the seeds that were meant to be run; only they count. None: as sweep.json says, for
            information, and all count.
    """
    rules = rules or Rules()
    left_out: list[str] = []
    runs = find_runs(folders, left_out)
    apart = Path(baseline).is_dir() if baseline else False
    own = find_runs([Path(baseline)], left_out) if baseline and apart else []
    paths = {run.folder for run in own}
    others = [run for run in runs if run.folder not in paths]
    check_comparable([run for run in (*own, *others) if run.summary is not None])
    groups, base = _groups(others, own, baseline)
    for group in groups:
        _declare(group, seeds)
    if not any(group.runs for group in groups):
        raise ConfigError(
            f"no finished run with the seeds asked for: nothing to compare{_why_none(groups)}"
        )
    some = next(run for group in groups for run in group.runs)
    assert some.summary is not None
    sizes = some.summary["val_tokens"], some.summary["val_bytes"]
    found = Comparison(
        rules,
        groups,
        base,
        margin_bpb=statistics.margin_bpb(*sizes, rules.margin_nats),
        nats_per_bpb=1 / statistics.margin_bpb(*sizes, 1.0),
        protocol=some.protocol,
        notes=[*dict.fromkeys(left_out), *notes(groups)],
    )
    if base is not None:
        if not base.runs:
            raise ConfigError(f"the baseline {base.label} has no finished run{_why_none([base])}")
        candidates = [group for group in groups if group is not base and group.runs]
        found.verdicts = judged(candidates, base, found.margin_bpb, rules)
    return found


def _why_none(groups: Sequence[Group]) -> str:
    """` (2 of 3 runs diverged)`, where some did."""
    diverged, count = sum(g.diverged for g in groups), sum(len(g.unfinished) for g in groups)
    return f" ({diverged} of {count} runs diverged)" if diverged else ""


def check_comparable(runs: Sequence[FoundRun]) -> None:
    """Refuse figures of different tokenizers, validation texts or protocols."""
    if not all((run.summary or {}).get("text") for run in runs):  # of an older version: by sizes
        runs = [dataclasses.replace(r, summary={**(r.summary or {}), "text": {}}) for r in runs]
    for what in ("tokenizer", "validation text", "protocol"):
        values: dict[str, FoundRun] = {}
        for run in runs:
            values.setdefault(run.protocol if what == "protocol" else run.text[what], run)
        if len(values) > 1:
            shown = "; ".join(f"{_short(v)} in {run.folder}" for v, run in values.items())
            raise ConfigError(
                f"these runs do not compare: they differ in {what} ({shown}). Score them alike, "
                "as in recurgolf evaluate, or compare them apart"
            )


def judged(
    candidates: Sequence[Group],
    baseline: Group,
    margin: float,
    rules: Rules,
    documents: bool = True,
) -> list[Verdict]:
    """A verdict on every candidate.

    Args:
        margin: bits per byte.
        documents: whether to bootstrap over documents too, which takes long and decides nothing.
    """
    verdicts = [
        Verdict(group, tests_of(group, baseline, margin, rules, documents)) for group in candidates
    ]
    able = [verdict for verdict in verdicts if rules.test in verdict.tests]
    raised = {
        name: statistics.holm([getattr(v.tests[rules.test], name) for v in able])
        for name in ("p_better", "p_worse", "p_level")
    }
    words = {"p_better": "better", "p_worse": "worse", "p_level": EQUAL}
    for index, verdict in enumerate(able):
        verdict.p = raised["p_better"][index]
        decided = [word for name, word in words.items() if raised[name][index] < rules.alpha]
        if decided:
            verdict.word = decided[0]
    for verdict in verdicts:
        _explain(verdict, baseline, margin, rules, len(able))
    return verdicts


def tests_of(
    group: Group, baseline: Group, margin: float, rules: Rules, documents: bool = True
) -> dict[str, Test]:
    """Every test that the runs of a group and of the baseline allow."""
    found: dict[str, Test | None] = {}
    values = [group.values(rules.metric), baseline.values(rules.metric)]
    found["welch"] = statistics.welch(values[0], values[1], margin)
    pairs = _pairs(group, baseline, rules.metric)
    found["paired"] = statistics.paired([a for a, _ in pairs], [b for _, b in pairs], margin)
    if documents and rules.metric == "val_bpb":  # the scores kept are those of the packed file
        sides = [document_nats(group), document_nats(baseline)]
        if sides[0] and sides[1] and sides[0][0] == sides[1][0]:
            (_, mine, sizes), (_, theirs, _) = sides[0], sides[1]
            found["documents"] = statistics.over_documents(mine, theirs, sizes, margin)
    return {name: test for name, test in found.items() if test is not None}


def _pairs(group: Group, baseline: Group, metric: str) -> list[tuple[float, float]]:
    """A figure of a group and of the baseline under every seed that they share."""
    theirs = dict(zip(baseline.seeds, baseline.values(metric), strict=True))
    mine = zip(group.seeds, group.values(metric), strict=True)
    return [(value, theirs[seed]) for seed, value in mine if seed in theirs]


def document_nats(group: Group) -> tuple[str, np.ndarray, np.ndarray] | None:
    """Fingerprint of the text, nats per document as means over runs, bytes per document.

    None where no run has kept them (scores/<protocol>.npz), not all on one text, or a file is
    damaged: the test over documents is then left out.
    """
    texts, nats, sizes = set(), [], []
    for run in group.runs:
        path = run.folder / "scores" / f"{(run.config.get('eval') or {}).get('kind')}.npz"
        if not path.exists():
            continue
        try:
            with path.open("rb") as file, np.load(file) as kept:
                text, own, size = str(kept["text"]), kept["nats"], kept["bytes"]
            if own.ndim != 1 or own.shape != size.shape or not np.isfinite(own).all():
                return None
        except DAMAGES:
            return None
        texts.add(text)
        nats.append(own)
        sizes.append(size)
    if len(texts) != 1 or len({len(one) for one in nats}) != 1:
        return None
    return texts.pop(), np.mean(nats, axis=0), sizes[0]


def notes(groups: Sequence[Group]) -> list[str]:
    """What a reader has to know beside the figures."""
    found = []
    for group in groups:
        for what, seeds in (("missing", group.missing_seeds), ("extra", group.extra_seeds)):
            if seeds:
                found.append(f"{group.label}: seeds {what}: {', '.join(seeds)}")
        for run in group.unfinished:
            how = "diverged" if run.status == "diverged" else "did not finish"
            found.append(f"{group.label}: seed {run.seed} {how} ({run.folder})")
        if group.left_out:
            left_out = ", ".join(run.seed for run in group.left_out)
            found.append(f"{group.label}: not among the declared seeds, left out: {left_out}")
        for run in group.repeated:
            found.append(f"{group.label}: seed {run.seed} ran again; left out: {run.folder}")
        states = [run.audit for run in group.runs]
        for state in dict.fromkeys(states):
            told = state if state.startswith("not audited") else f"audit {state}"
            found.append(f"{group.label}: {states.count(state)} of {len(states)} runs: {told}")
        for what in ("hardware", "name"):
            told = group.told(what)
            if len(told) > 1:
                found.append(f"{group.label}: runs of different {what}: {'; '.join(told)}")
    machines = list(dict.fromkeys(value for group in groups for value in group.told("hardware")))
    if len(machines) > 1:
        found.append(f"measured on different hardware or precision: {'; '.join(machines)}")
    return found


def as_json(found: Comparison) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        **dataclasses.asdict(found.rules),
        "margin_bpb": found.margin_bpb,
        "nats_per_bpb": found.nats_per_bpb,
        "protocol": found.protocol,
        "baseline": found.baseline.label if found.baseline else None,
        "groups": [_group_json(group, found.rules.metric) for group in found.groups],
        "verdicts": [
            {
                "setting": verdict.group.label,
                "verdict": verdict.word,
                "why": verdict.why,
                "p": verdict.p,
                "seeds_needed": verdict.seeds_needed,
                "tests": {name: dataclasses.asdict(test) for name, test in verdict.tests.items()},
            }
            for verdict in found.verdicts
        ],
        "notes": found.notes,
    }


def _group_json(group: Group, metric: str) -> dict[str, Any]:
    mean, deviation = group.spread(metric) if group.runs else (None, None)
    return {
        "setting": group.label,
        "differs": group.differs,
        "n": len(group.runs),
        "diverged": group.diverged,
        "seeds": group.seeds,
        "declared_seeds": group.declared,
        "missing_seeds": group.missing_seeds,
        "extra_seeds": group.extra_seeds,
        metric: {"mean": mean, "deviation": deviation, "values": group.values(metric)},
        "artifact_bytes": group.values("artifact_bytes"),
        "steps": group.values("steps"),
        "train_seconds": group.values("train_seconds"),
        "hardware": group.told("hardware"),
        "audit": [run.audit for run in group.runs],
        "folders": [str(run.folder) for run in group.runs],
    }


def _groups(
    others: list[FoundRun], own: list[FoundRun], baseline: str | None
) -> tuple[list[Group], Group | None]:
    """All groups, the baseline first, and the baseline."""
    if own:  # a folder stands apart even where another one has the same settings
        differing = differing_settings([run.settings for run in (*own, *others)])
        bases = grouped(own)
        if len(bases) > 1:
            raise ConfigError(
                f"--baseline {baseline} holds several settings: {_labels(bases)}; name one of them"
            )
        base = _renamed(bases[0], differing)
        rest = [_renamed(group, differing) for group in (grouped(others) if others else [])]
        name_by_options([base, *rest])
        for group in rest:
            if group.differs == base.differs:  # the same settings: other code, another machine
                folders = [run.folder for run in (*group.runs, *group.unfinished)]
                group.differs["folder"] = os.path.commonpath(folders)
        return [base, *rest], base
    groups = grouped(others)
    if baseline is None:
        return groups, None
    wanted = baseline.split()
    matching = [g for g in groups if set(wanted) <= g.words]
    matching = matching or [g for g in groups if baseline in {r.name for r in g.runs}]
    if len(matching) != 1:
        number = "no" if not matching else "more than one"
        raise ConfigError(
            f"--baseline {baseline!r}: neither a folder, nor does it name one setting ({number} "
            f"match); there are {_labels(groups)}"
        )
    return [matching[0], *(g for g in groups if g is not matching[0])], matching[0]


def _declare(group: Group, seeds: Sequence[str] | None) -> None:
    """Hold a group against the declared seeds; others do not count, and are named."""
    if seeds is None:
        return
    group.declared = list(seeds)
    group.left_out = [run for run in group.runs if run.seed not in seeds]
    group.runs = [run for run in group.runs if run.seed in seeds]


def _explain(
    verdict: Verdict, baseline: Group, margin: float, rules: Rules, candidates: int
) -> None:
    """Fill in the reason and, where nothing could be told, how many seeds could tell."""
    group, n = verdict.group, (len(verdict.group.runs), len(baseline.runs))
    among = f" among {candidates} candidates" if candidates > 1 else ""
    test = verdict.tests.get(rules.test)
    if test is not None and verdict.word != "cannot tell":
        by = "" if verdict.word == EQUAL else "by more than the margin "
        verdict.why = f"{by}of {margin:.4f} bpb, at {rules.alpha:g}{among}"
        return
    deviation = _deviations(group, baseline, rules)
    if test is None and deviation is None:
        lacking = "shared seeds" if rules.test == "paired" else "seeds each"
        verdict.why = (
            f"n = {n[0]} and {n[1]}: a test needs at least 2 {lacking} that do not all agree"
        )
        return
    gain = np.mean(baseline.values(rules.metric)) - np.mean(group.values(rules.metric))
    gain = float(gain) if test is None else test.gain
    verdict.seeds_needed = statistics.seeds_needed(
        gain, deviation or (0.0, 0.0), margin, rules.alpha / max(1, candidates)
    )
    if verdict.seeds_needed is None:
        verdict.why = f"more than {statistics.MOST_SEEDS} seeds of each would be needed"
    else:
        more = [max(0, verdict.seeds_needed - have) for have in n]
        verdict.why = (
            f"about {verdict.seeds_needed} seeds of each would be needed, {more[0]} more of this "
            f"and {more[1]} more of the baseline, were the differences seen the true ones"
        )


def _deviations(group: Group, baseline: Group, rules: Rules) -> tuple[float, float] | None:
    """Deviations that the number of seeds depends on; one side's stands in for an unknown one."""
    if rules.test == "paired":
        gains = [theirs - mine for mine, theirs in _pairs(group, baseline, rules.metric)]
        found = spread(gains)[1] if gains else None
        return None if not found else (found, 0.0)
    both = [g.spread(rules.metric)[1] for g in (group, baseline)]
    known = [deviation for deviation in both if deviation]
    if not known:
        return None
    a, b = (known[0] if deviation is None else deviation for deviation in both)
    return a, b


def _renamed(group: Group, differing: Sequence[str]) -> Group:
    """A group by the settings that differ among more runs than its own."""
    settings = [*group.runs, *group.unfinished][0].settings
    return dataclasses.replace(group, differs={k: settings.get(k, ABSENT) for k in differing})


def _labels(groups: Sequence[Group]) -> str:
    return ", ".join(repr(group.label) for group in groups)


def _short(value: str) -> str:
    hashed = len(value) >= 16 and all(c in "0123456789abcdef" for c in value)
    return f"{value[:12]}…" if hashed else value
