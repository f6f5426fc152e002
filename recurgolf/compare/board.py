"""The board: one HTML file about many runs, with everything in it, and pictures of its plots.

`board_data` makes plain data of the runs' folders, `page` puts it into page/board.html together
with the drawing library; the page's script (page/board.js) draws and answers questions. Nothing is
fetched from anywhere, and the page forbids itself to.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from recurgolf.compare import statistics
from recurgolf.compare.comparison import Rules, judged
from recurgolf.compare.groups import ABSENT, TEXT, Group, differing_settings, grouped
from recurgolf.compare.runs import FoundRun, find_runs, is_figure
from recurgolf.config import ConfigError
from recurgolf.disk import DamagedFile, read_json, write_file
from recurgolf.record import history, read_jsonl

FIGURES = (
    *("val_bpb", "pre_quant_val_bpb", "val_bpb_raw", "val_loss", "artifact_bytes", "bytes_model"),
    *("bytes_code", "budget_bytes", "params", "effective_params", "steps", "tokens"),
    *("train_seconds", "tokens_per_second", "peak_memory_bytes"),
)
"""What the page knows of a summary."""
LINKS = ("train.log", "summary.json", "run.json", "metrics.jsonl", "ledger.json", "score.py")
POINTS = 150_000
"""Of all curves together; each run gets its share, so that a board of 1,000 runs opens at once."""
BASELINES = 16
"""With more settings than these, verdicts are made against the first one only."""
MOMENTS = 5
"""Times in training at which a run's visits are shown, from the first to the last."""
_VISIT = re.compile(r"loop/(\w+)/(?:visit|pass)(\d+)$")
_SAMPLED_PASSES = re.compile(r"loop/bpb/passes(\d+)$")
_PASSES = re.compile(r"(?:^|/)passes=(\d+)$")


def write_board(
    folders: Sequence[Path],
    out: Path,
    say: Callable[[str], None] = print,
    baseline: str | None = None,
    reload_seconds: float | None = None,
) -> list[Path]:
    """Write the board of all runs below folders.

    Args:
        say: told of runs and files that are damaged, and so left out.
        baseline: words of a setting, as in `lora.rank=0`; the page lets one choose another.
        reload_seconds: after so long the page loads itself again, and no pictures are made.

    Returns:
        The HTML file, then its pictures.
    """
    drawing = plotting_library()
    from recurgolf.compare.pictures import write_pictures

    left_out: list[str] = []
    runs = find_runs(folders, left_out)
    title = " ".join(map(str, folders))
    data = board_data(runs, out.resolve().parent, title, left_out, baseline)
    data["reload_seconds"] = reload_seconds
    for line in left_out:
        say(line)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, page(data, drawing))
        return [out] if reload_seconds else [out, *write_pictures(data, out)]
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"{out}: {why}; --out FILE writes the page elsewhere") from None


def plotting_library() -> str:
    """The source of plotly.js, as the package plotly brings it along."""
    try:
        import matplotlib  # noqa: F401 # pyright: ignore[reportMissingImports]
        from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"recurgolf board draws with plotly and matplotlib, and {error.name} is not installed: "
            "pip install 'recurgolf[board]'"
        ) from None
    return get_plotlyjs()


def page(data: Mapping[str, Any], drawing: str) -> str:
    """The HTML text."""
    files = resources.files("recurgolf.compare") / "page"
    parts = {
        "style": (files / "board.css").read_text(encoding="utf-8"),
        "drawing": drawing,
        "script": (files / "board.js").read_text(encoding="utf-8"),
        # `</script>` within a string would end the element.
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/"),
    }
    text = (files / "board.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], text)


def board_data(
    runs: Sequence[FoundRun],
    home: Path,
    title: str,
    left_out: list[str] | None = None,
    baseline: str | None = None,
) -> dict[str, Any]:
    """Everything that the page shows, as JSON's types.

    Args:
        home: folder of the page; links are relative to it.
        left_out: takes a line for every file that is damaged; the rest of its run is shown.
        baseline: words of a setting.
    """
    left_out = [] if left_out is None else left_out
    settings = [run.settings for run in runs if run.summary is not None]
    settings = settings or [run.settings for run in runs]
    differing = set(differing_settings(settings))
    groups = grouped(runs, by_text=True)
    numbers: dict[Path, int] = {}
    alike: dict[tuple[tuple[str, str], ...], int] = {}  # for unfinished attempts of a finished seed
    repeated: set[Path] = set()
    for number, group in enumerate(groups):
        repeated |= {run.folder for run in group.repeated}
        members = (*group.runs, *group.unfinished, *group.repeated)
        numbers |= {run.folder: number for run in members}
        alike |= {tuple(run.settings.items()): number for run in members}
    points = max(20, min(400, POINTS // (2 * max(1, len(runs)))))
    few = len(runs) <= 60
    number_of = [numbers.get(r.folder, alike.get(tuple(r.settings.items()), 0)) for r in runs]
    keys = sorted(differing | {key for group in groups for key in group.differs} - {TEXT})
    return {
        "title": title,
        "made": datetime.now().isoformat(sep=" ", timespec="minutes"),
        "groups": [group.label for group in groups],
        **_comparisons(groups, baseline),
        "common": {k: v for one in settings for k, v in one.items() if k not in differing},
        "runs": [
            {
                **_facts(run, home, left_out),
                "group": number,
                "repeated": run.folder in repeated,
                "settings": {
                    k: groups[number].differs.get(k, run.settings.get(k, ABSENT)) for k in keys
                },
                **_measured(run, points if few else min(points, 60), few, left_out),
            }
            for number, run in zip(number_of, runs, strict=True)
        ],
    }


def _comparisons(groups: Sequence[Group], baseline: str | None) -> dict[str, Any]:
    """Which groups compare, the baseline, and verdicts as `recurgolf compare` finds them.

    `sets`: per group the number of its set; only groups of one set share text, tokenizer and
    protocol. `verdicts`: baseline -> group -> verdict, by the groups' numbers.
    """
    rules = Rules()
    kinds: dict[tuple[str, ...], int] = {}
    sets = [
        kinds.setdefault((*g.runs[0].text.values(), g.runs[0].protocol), len(kinds))
        if g.runs
        else None
        for g in groups
    ]
    done = [number for number, group in enumerate(groups) if group.runs]
    if baseline is not None:
        words = set(baseline.split())
        named = [number for number in done if groups[number].label == baseline]
        done = named or [number for number in done if words <= groups[number].words]
        if len(done) != 1:
            labels = "; ".join(group.label for group in groups if group.runs)
            raise ConfigError(
                f"--baseline {baseline!r} names {len(done)} settings, not one; there are {labels}"
            )
    first = done[0] if done else None
    verdicts: dict[str, dict[str, Any]] = {}
    margins: list[float] = [0.0] * len(groups)
    for number, group in enumerate(groups):
        if not group.runs:
            continue
        summary = group.runs[0].summary or {}
        margins[number] = statistics.margin_bpb(
            summary["val_tokens"], summary["val_bytes"], rules.margin_nats
        )
        if len(groups) > BASELINES and number != first:
            continue
        others = {i: g for i, g in enumerate(groups) if i != number and sets[i] == sets[number]}
        found = judged(list(others.values()), group, margins[number], rules, documents=False)
        verdicts[str(number)] = {
            str(i): {
                "word": verdict.word,
                "why": verdict.why,
                "gain": test.gain if (test := verdict.tests.get(rules.test)) else None,
                "interval": test.interval if test else None,
                "p": verdict.p,
            }
            for i, verdict in zip(others, found, strict=True)
        }
    return {
        "sets": sets,
        "baseline": first,
        "verdicts": verdicts,
        "margins": margins,
        "rules": f"{rules.test} at {rules.alpha:g}, margin {rules.margin_nats:g} nats per token",
    }


def _facts(run: FoundRun, home: Path, left_out: list[str]) -> dict[str, Any]:
    summary = run.summary or {}
    relative = os.path.relpath(run.folder, home)
    links = [name for name in LINKS if (run.folder / name).exists()]
    links += [f"wandb/{p.name}" for p in sorted(run.folder.glob("wandb/*run-*"))]
    return {
        "name": run.name,
        "seed": run.seed,
        "folder": relative,
        "links": {name: quote(f"{relative}/{name}".replace(os.sep, "/")) for name in links},
        "status": run.status,
        "audit": run.audit if run.summary else ABSENT,
        "hardware": run.hardware if run.summary else ABSENT,
        "protocol": run.protocol,
        "text": run.scored_text[:12],
        "evals": {
            name: _figure(entry.get("val_bpb"))
            for name, entry in (summary.get("evals") or {}).items()
        },
        "by_passes": by_passes(summary),
        "bytes": (components := _components(run.folder / "ledger.json", left_out)),
        # The code has its size before training, so plan and file hold the same.
        "bytes_planned": sum(
            line["actual"] if line["planned"] is None else line["planned"] for line in components
        )
        or None,
        **{name: _figure(summary.get(name)) for name in FIGURES},
    }


def by_passes(summary: Mapping[str, Any]) -> dict[str, float]:
    """Number of passes -> val_bpb, of a summary's evaluations."""
    told = dict(summary.get("by_passes") or {})
    for name, entry in (summary.get("evals") or {}).items():
        match = _PASSES.search(name)
        if match:
            told.setdefault(match[1], entry.get("val_bpb"))
    known = [number for number in told if number.isdecimal() and is_figure(told[number])]
    return {number: told[number] for number in sorted(known, key=int)}


def _figure(value: Any) -> Any:
    """What the page may count with; anything else is a gap."""
    return value if is_figure(value) else None


def _components(path: Path, left_out: list[str]) -> list[dict[str, Any]]:
    """Component, predicted and actual bytes of a ledger; the code is one of them."""
    try:
        ledger = read_json(path)
        code = ledger.get("code") or {}
        found = [
            {
                "component": str(c["component"]),
                "planned": _figure(c["predicted"]),
                "actual": _figure(c["actual"]),
            }
            for c in ledger["components"]
        ]
        if "packed" in code:
            found.append({"component": "code", "planned": None, "actual": _figure(code["packed"])})
    except FileNotFoundError:
        return []
    except (DamagedFile, KeyError, TypeError) as error:
        known = isinstance(error, DamagedFile)
        left_out.append(f"left out: {error if known else f'{path} is damaged: {error!r}'}")
        return []
    return found


def _measured(run: FoundRun, points: int, everything: bool, left_out: list[str]) -> dict[str, Any]:
    """Curves, the figures of every visit at some moments, and the sampled scores by passes."""
    try:
        rows = history(read_jsonl(run.folder / "metrics.jsonl"))
    except FileNotFoundError:
        rows = []
    except (OSError, ValueError) as error:
        left_out.append(f"left out: {error}")
        rows = []
    keys = dict.fromkeys(key for row in rows for key in row)
    wanted = [
        key
        for key in keys
        if key in ("train/loss", "val/bpb")
        or (everything and "/" in key and not _VISIT.match(key) and not _SAMPLED_PASSES.match(key))
    ]
    watched = [row for row in rows if any(_VISIT.match(key) for key in row)]
    sampled = [row for row in rows if any(_SAMPLED_PASSES.match(key) for key in row)]
    last = sampled[-1] if sampled else {}
    return {
        "curves": {key: _curve(rows, key, points) for key in wanted},
        "visits": [_visits(row) for row in _spread(watched, MOMENTS if everything else 1)],
        "sampled_passes": {
            str(int(match[1])): _rounded(value)
            for key, value in last.items()
            if (match := _SAMPLED_PASSES.match(key))
        },
    }


def _curve(rows: Sequence[Mapping[str, Any]], key: str, points: int) -> dict[str, list[Any]]:
    """A metric against step, tokens and seconds: points that were measured, evenly chosen."""
    chosen = _spread([row for row in rows if isinstance(row.get(key), (int, float))], points)
    return {
        "step": [row["step"] for row in chosen],
        "tokens": [row.get("tokens") for row in chosen],
        "seconds": [_rounded(row.get("train_seconds")) for row in chosen],
        "y": [_rounded(row[key]) for row in chosen],
    }


def _visits(row: Mapping[str, Any]) -> dict[str, Any]:
    """Step, and figure -> {visit or pass: value}."""
    found: dict[str, Any] = {"step": row["step"]}
    for key, value in row.items():
        match = _VISIT.match(key)
        if match:
            found.setdefault(match[1], {})[str(int(match[2]))] = _rounded(value)
    return found


def _spread(rows: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the rows, evenly, the last one always among them."""
    if len(rows) <= count:
        return list(rows)
    if count == 1:
        return [rows[-1]]
    places: Iterable[int] = {round(i * (len(rows) - 1) / (count - 1)) for i in range(count)}
    return [rows[place] for place in sorted(places)]


def _rounded(value: Any) -> float | None:
    """Six digits are more than a curve shows; what is not finite is a gap."""
    if not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
        return None
    return float(f"{value:.6g}")
