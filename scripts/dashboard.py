"""Make a W&B workspace and report about a project's runs: Pareto scatter, curves, gaps, seeds.

    python scripts/dashboard.py --entity me                     # save both, print their addresses
    python scripts/dashboard.py --entity me --dry-run out/      # write what would be sent, as JSON
    python scripts/dashboard.py --entity me outputs/sweeps/rank # and a table of settings: mean ±
                                                                # deviation over seeds, Pareto front

Saving needs a network and an account (`wandb login`); a dry run needs neither. Both need the extra
`dashboard` (pip install 'recurgolf[dashboard]').
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

NEED = "dashboard.py needs the package wandb-workspaces: pip install 'recurgolf[dashboard]'"
SETTING = "setting"
"""Key of a run's config that all seeds of a setting share, and no other run."""
COLUMNS = (
    *(
        "run:group",
        "run:displayName",
        "config:setting.value",
        "config:seed.value",
        "summary:val_bpb",
    ),
    *("summary:pre_quant_val_bpb", "summary:quantization_gap", "summary:artifact_bytes"),
    *("summary:within_budget", "summary:steps", "summary:train_seconds"),
)
"""Of the table of seeds; the names are those of summary.json, which W&B's summary repeats."""


@dataclass(frozen=True)
class Where:
    """The project that both belong to."""

    entity: str
    project: str
    name: str = "recurgolf"


def library(part: str) -> Any:
    """A part of wandb-workspaces; its types do not tell what it exports."""
    return import_module(f"wandb_workspaces.{part}")


def panels() -> dict[str, list[Any]]:
    """Section -> its plots; workspace and report have the same."""
    wr = library("reports.v2")

    result, by_group = (
        wr.SummaryMetric,
        {"groupby": wr.Config(SETTING), "groupby_rangefunc": "stddev"},
    )
    axes = (("step", "steps"), ("tokens", "tokens"), ("train_seconds", "training seconds"))
    return {
        "Result": [
            wr.ScatterPlot(
                title="bits per byte against bytes (dashed: best so far)",
                x=result("artifact_bytes"),
                y=result("val_bpb"),
                running_ymin=True,
            ),
            wr.BarPlot(
                title="what packing costs, bits per byte",
                metrics=[result("quantization_gap")],
                **_summed(by_group),
            ),
            wr.ScatterPlot(
                title="packed against before packing",
                x=result("pre_quant_val_bpb"),
                y=result("val_bpb"),
            ),
            wr.BarPlot(
                title="artifact bytes", metrics=[result("artifact_bytes")], **_summed(by_group)
            ),
        ],
        "Curves": [
            wr.LinePlot(title=f"{key} over {text}", x=axis, y=[key], title_x=text, **by_group)
            for key in ("val/bpb", "train/loss")
            for axis, text in axes
        ],
        "Loop": [
            wr.LinePlot(title=title, x="step", metric_regex=f"loop/{key}/.*", max_runs_to_show=10)
            for key, title in (
                ("bpb", "bits per byte by passes (sample)"),
                ("contraction", "contraction of the passes"),
                ("cosine", "cosine between successive states"),
                ("residual_rms", "size of the state behind every visit"),
                ("adapter_norm", "adapter norms by visit"),
                ("grad_norm", "gradient norms by visit"),
            )
        ],
    }


def workspace(where: Where) -> Any:
    """The workspace: runs grouped by experiment, one section per kind of plot."""
    ws = library("workspaces")

    return ws.Workspace(
        entity=where.entity,
        project=where.project,
        name=where.name,
        sections=[
            ws.Section(name=name, panels=plots, is_open=name != "Loop")
            for name, plots in panels().items()
        ],
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=50),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Config(SETTING)],
            order=[ws.Ordering(ws.Summary("val_bpb"), ascending=True)],
            pinned_columns=[*COLUMNS],
        ),
    )


def settings_table(folders: Sequence[Path]) -> str:
    """A table in Markdown: per setting the mean ± deviation over seeds of score, gap and bytes.

    A setting whose mean score no smaller mean file reaches is on the Pareto front.
    """
    from recurgolf.compare.groups import grouped, spread
    from recurgolf.compare.runs import find_runs

    groups = [group for group in grouped(find_runs(folders)) if group.runs]
    groups.sort(key=lambda group: group.spread("artifact_bytes")[0])
    lines = [
        "| setting | n | val_bpb | packing costs | bytes | Pareto front |",
        "|---|---|---|---|---|---|",
    ]
    best = math.inf
    for group in groups:
        score = group.spread("val_bpb")
        pairs = zip(group.values("val_bpb"), group.values("pre_quant_val_bpb"), strict=True)
        gap = spread([packed - exact for packed, exact in pairs])
        on_front, best = score[0] < best, min(best, score[0])
        cells = [
            group.label.replace("|", "\\|"),
            str(len(group.runs)),
            _shown(score, ".4f"),
            _shown(gap, "+.4f"),
            _shown(group.spread("artifact_bytes"), ",.0f"),
            "yes" if on_front else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(figure: tuple[float, float | None], form: str) -> str:
    """`1.6712 ± 0.0031`; one seed has no deviation."""
    mean, deviation = figure
    return format(mean, form) + ("" if deviation is None else f" ± {deviation:{form.lstrip('+')}}")


def report(where: Where, table: str = "") -> Any:
    """The report: the same plots with words between them, and every seed in a table.

    Args:
        table: of settings, in Markdown; empty: none.
    """
    wr = library("reports.v2")

    words = {
        "Result": "Every point is a packed file that exists: val_bpb was measured on the file "
        "reloaded from disk, artifact_bytes are its size and that of its code.",
        "Curves": "Means over the seeds of an experiment, with their deviation.",
        "Loop": "What the loop does to the residual stream, visit by visit. The figures by "
        "passes are a sample; the headline is scored on the whole text.",
    }
    # A run set without a project takes the report's own, and needs no network to be written.
    grouped = wr.Runset(name="experiments", groupby=[f"config.{SETTING}"])
    blocks: list[Any] = [wr.H1(where.name), wr.TableOfContents()]
    if table:
        told = "Means ± deviations over seeds; the front is that of the means."
        blocks += [wr.H2("Settings"), wr.P(told), wr.MarkdownBlock(text=table)]
    for name, plots in panels().items():
        blocks += [wr.H2(name), wr.P(words[name]), wr.PanelGrid(runsets=[grouped], panels=plots)]
    seeds = wr.Runset(
        name="seeds",
        pinned_columns=[*COLUMNS],
        lock_columns=True,
        order=[wr.OrderBy(name="Group", ascending=True), wr.OrderBy(name="Name", ascending=True)],
    )
    told = "All seeds, the bad ones too. Tests and verdicts: recurgolf compare."
    blocks += [wr.H2("Seeds"), wr.P(told), wr.PanelGrid(runsets=[seeds])]
    return wr.Report(
        entity=where.entity,
        project=where.project,
        title=where.name,
        description="Bits per byte and bytes of depth-recurrent models",
        blocks=blocks,
        width="fluid",
    )


def serialised(view: Any) -> dict[str, Any]:
    """What would be sent to W&B."""
    return json.loads(view._to_model().model_dump_json(by_alias=True, exclude_none=True))


def _summed(by_group: dict[str, Any]) -> dict[str, Any]:
    return {**by_group, "groupby_aggfunc": "mean"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entity", required=True, help="W&B user or team")
    parser.add_argument("--project", default="recurgolf", help="as tracker.project (recurgolf)")
    parser.add_argument("--name", default="recurgolf", help="of workspace and report")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write JSON, send nothing")
    parser.add_argument("folders", nargs="*", type=Path, help="of runs here, for the table")
    asked = parser.parse_args()
    table = settings_table(asked.folders) if asked.folders else ""
    where = Where(asked.entity, asked.project, asked.name)
    try:
        made = {"workspace": workspace(where), "report": report(where, table)}
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("wandb_workspaces"):
            raise
        print(NEED, file=sys.stderr)
        return 2
    for name, view in made.items():
        if asked.dry_run is not None:
            asked.dry_run.mkdir(parents=True, exist_ok=True)
            path = asked.dry_run / f"{name}.json"
            path.write_text(json.dumps(serialised(view), indent=1) + "\n")
            print(path)
        else:
            print(f"{name}: {view.save().url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
