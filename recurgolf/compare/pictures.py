"""The board's main plots as PNG files, drawn by matplotlib; needs the extra `board`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from recurgolf.disk import write_file

COLOURS = (
    *("#3b76c4", "#d1731f", "#2e9a66", "#c24141", "#7d5bb5", "#8a6146", "#c9599b", "#6f7782"),
    *("#a39a1e", "#1e9bb0"),
)
"""Of the groups, in turn; page/board.js has the same. They keep apart on white and on black."""
NAMED_GROUPS = 12
"""With more groups than these a legend would hide the plot."""
CURVES = 40
"""As many runs have their curves drawn."""


def write_pictures(data: Mapping[str, Any], page: Path) -> list[Path]:
    """Write `<page>_pareto.png` and so on beside a board.

    Returns:
        The files; a plot without anything to show is left out.
    """
    drawers = {"pareto": pareto, "curves": curves, "bytes": bytes_by_component, "passes": passes}
    written = []
    for name, draw in drawers.items():
        figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        if draw(figure.subplots(), data):
            path = page.with_name(f"{page.stem}_{name}.png")
            figure.savefig(content := io.BytesIO())
            write_file(path, content.getvalue())
            written.append(path)
    return written


def pareto(axes: Axes, data: Mapping[str, Any]) -> bool:
    """Bits per byte against bytes: seeds faint, means of settings full, the best means joined.

    Only means of settings that compare (one text, tokenizer and protocol) share a line.
    """
    runs = _finished(data)
    means: dict[int, list[tuple[float, float]]] = {}
    for group, label in enumerate(data["groups"]):
        own = [run for run in runs if run["group"] == group]
        if not own:
            continue
        x, y = ([run[key] for run in own] for key in ("artifact_bytes", "val_bpb"))
        mean = (sum(x) / len(x), sum(y) / len(y))
        means.setdefault(data["sets"][group], []).append(mean)
        axes.scatter(x, y, s=16, color=_colour(group), alpha=0.3)
        axes.scatter(*mean, s=44, color=_colour(group), label=label)
    for points in means.values():
        axes.plot(*zip(*pareto_front(points), strict=True), color="#777777", lw=1, zorder=0)
    axes.set(xlabel="artifact bytes", ylabel="val_bpb", title="bits per byte against bytes")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    _legend(axes, data)
    return bool(runs)


def curves(axes: Axes, data: Mapping[str, Any]) -> bool:
    """Validation bits per byte, or the training loss where there is no such curve, by step."""
    lengths = [len(r["curves"].get("val/bpb", {}).get("y", [])) for r in data["runs"]]
    key = "val/bpb" if max(lengths, default=0) > 1 else "train/loss"
    named: set[int] = set()
    shown = [run for run in data["runs"] if run["curves"].get(key, {}).get("y")][:CURVES]
    for run in shown:
        curve, group = run["curves"][key], run["group"]
        label = None if group in named else data["groups"][group]
        named.add(group)
        axes.plot(curve["step"], curve["y"], color=_colour(group), label=label, lw=1, alpha=0.85)
    axes.set(xlabel="step", ylabel=key, title=f"{key} while training")
    _legend(axes, data)
    return bool(shown)


def bytes_by_component(axes: Axes, data: Mapping[str, Any]) -> bool:
    """Planned and actual bytes of the first finished run of every group."""
    firsts = []
    for group in range(min(len(data["groups"]), NAMED_GROUPS)):
        own = [run for run in data["runs"] if run["group"] == group and run["bytes"]]
        firsts += own[:1]
    names = list(dict.fromkeys(line["component"] for run in firsts for line in run["bytes"]))
    rows = [(run, kind) for run in firsts for kind in ("planned", "actual")]
    left = [0.0] * len(rows)
    for number, name in enumerate(names):
        widths = [
            next((line[kind] or 0 for line in run["bytes"] if line["component"] == name), 0)
            for run, kind in rows
        ]
        axes.barh(range(len(rows)), widths, left=left, color=_colour(number), label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    labels = [f"{data['groups'][run['group']]}, {kind}" for run, kind in rows]
    axes.set_yticks(range(len(rows)), [label[-50:] for label in labels])
    axes.invert_yaxis()
    axes.set(xlabel="bytes", title="bytes by component (the code is never planned)")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    if names:  # matplotlib warns of a legend of nothing
        axes.legend(fontsize="x-small", ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return bool(rows)


def passes(axes: Axes, data: Mapping[str, Any]) -> bool:
    """Bits per byte by number of passes; dashed: a sample of the validation text."""
    shown = 0
    named: set[int] = set()
    for run in data["runs"][:CURVES]:
        points = run["by_passes"] or run["sampled_passes"]
        if not points:
            continue
        group = run["group"]
        label = None if group in named else data["groups"][group]
        named.add(group)
        style = "o-" if run["by_passes"] else "o--"
        x = [int(number) for number in points]
        axes.plot(x, list(points.values()), style, color=_colour(group), label=label, ms=4)
        shown += 1
    axes.set(xlabel="passes", ylabel="bits per byte", title="bits per byte by number of passes")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes, data)
    return shown > 0


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (bytes, bpb) that nothing smaller beats, by size."""
    front: list[tuple[float, float]] = []
    for size, bpb in sorted(points):
        if not front or bpb < front[-1][1]:
            front.append((size, bpb))
    return front


def _finished(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [r for r in data["runs"] if r["val_bpb"] is not None and not r["repeated"]]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _legend(axes: Axes, data: Mapping[str, Any]) -> None:
    if 1 < len(data["groups"]) <= NAMED_GROUPS:
        axes.legend(fontsize="small")
