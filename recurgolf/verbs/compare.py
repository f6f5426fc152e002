"""recurgolf compare: settings over seeds against a baseline, with tests and a plain verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from recurgolf.compare.comparison import METRICS, TESTS, Comparison, Rules, as_json, compare
from recurgolf.compare.groups import ABSENT, Group, seed_list
from recurgolf.compare.statistics import MARGIN_NATS, Test
from recurgolf.compare.sweep import table
from recurgolf.disk import json_text
from recurgolf.log import plain_console
from recurgolf.verbs import add_json, parser_of

EPILOG = """\
  recurgolf compare outputs/sweeps/2026-11-23_20-57-15 --baseline lora.rank=0
  recurgolf compare outputs/demo --baseline outputs/flat_control --seeds 1-5
"""


def main(arguments: Sequence[str]) -> int:
    """Compare settings over seeds, from folders of runs and sweeps."""
    parser = parser_of("compare", main.__doc__, EPILOG)
    parser.add_argument("folders", nargs="+", type=Path, help="runs are found in and below them")
    parser.add_argument("--baseline", help="a folder, or words of a setting, as in lora.rank=0")
    parser.add_argument("--seeds", help="seeds declared beforehand (1-5 or 1,2,9); others are out")
    parser.add_argument("--metric", default=METRICS[0], help=" or ".join(METRICS))
    parser.add_argument("--test", default="welch", help=f"for the verdict: {' or '.join(TESTS)}")
    parser.add_argument("--margin", type=float, default=MARGIN_NATS, help="nats per token")
    parser.add_argument("--alpha", type=float, default=0.01, help="level of the verdict")
    add_json(parser)
    asked = parser.parse_args(arguments)
    rules = Rules(asked.metric, asked.margin, asked.alpha, asked.test)
    seeds = None if asked.seeds is None else seed_list(asked.seeds)
    found = compare(asked.folders, asked.baseline, seeds, rules)
    if asked.json:
        print(json_text(as_json(found)))
    else:
        # Where no terminal sets a width, a table is as wide as it likes.
        show(found, plain_console(width=200))
    return 0


def show(found: Comparison, console: Console) -> None:
    """Print a comparison."""
    rules = found.rules
    console.print(
        table(found.groups, rules.metric, found.baseline, failed=False, width=console.width)
    )
    for line in lines(found):
        console.print(line, markup=False)


def lines(found: Comparison) -> list[str]:
    """Everything below the table."""
    rules = found.rules
    text = [f"protocol  {found.protocol}"]
    measured = {group.label: _measured(group) for group in found.groups}
    if len(set(measured.values())) == 1:
        measured = {"all": next(iter(measured.values()))}
    text += [f"measured  {label}: {how}" for label, how in measured.items()]
    text += _what_differs(found.groups)
    if found.baseline is not None:
        text.append("")
        text.append(
            f"margin    {rules.margin_nats:g} nats per token = {found.margin_bpb:.5f} bpb with "
            f"this tokenizer; verdicts by {rules.test} at {rules.alpha:g}"
        )
    for verdict in found.verdicts:
        assert found.baseline is not None
        label = f"{verdict.group.label} against {found.baseline.label}"
        text += ["", f"{label}: {verdict.word.upper()} ({verdict.why})"]
        for name, test in verdict.tests.items():
            text.append(f"  {name:<9} {_told(test, found)}")
        if verdict.p is not None and len(found.verdicts) > 1:
            text.append(f"  p with Holm's correction for {len(found.verdicts)}: {verdict.p:.4g}")
    if found.baseline is None and len(found.groups) > 1:
        text.append("no tests without a baseline: --baseline FOLDER or --baseline 'lora.rank=0'")
    return [*text, *(f"note: {note}" for note in found.notes)]


def _told(test: Test, found: Comparison) -> str:
    low, high = test.interval
    n = f"n = {test.n[0]}" if test.method != "welch" else f"n = {test.n[0]} and {test.n[1]}"
    freedom = "" if test.t is None else f", t = {test.t:.3f}, df = {test.df:.2f}"
    return (
        f"gain {test.gain:+.5f} bpb ({test.gain * found.nats_per_bpb:+.5f} nats per token), "
        f"{test.confidence:.0%} interval {low:+.5f} to {high:+.5f}, "
        f"{n}{freedom}, p(better by the margin) = {test.p_better:.4g}, p(worse by it) = "
        f"{test.p_worse:.4g}"
    )


def _measured(group: Group) -> str:
    """Where, with how many steps, and in what time the figures of a group were made."""
    if not group.runs:
        return "nothing finished"
    steps, seconds = (_range(group.values(name)) for name in ("steps", "train_seconds"))
    return f"{'; '.join(group.told('hardware'))}; {steps} steps in {seconds} s"


def _what_differs(groups: Sequence[Group]) -> list[str]:
    """Settings with their value in every group, where the labels are too short to tell."""
    if not any(group.shortened for group in groups):
        return []
    text = ["differs   " + " | ".join(group.label for group in groups)]
    for key in groups[0].differs:
        text.append(f"  {key}: " + " | ".join(g.differs.get(key, ABSENT) for g in groups))
    return text


def _range(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low} to {high}"
