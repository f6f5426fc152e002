"""The W&B workspace and report, by what would be sent; no network, no account."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from smoke_runs import train

from recurgolf.run import fingerprint_of

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "dashboard.py"


def dashboard(*arguments: str, env: dict | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, dict]:
    pytest.importorskip("wandb_workspaces")
    folder = tmp_path_factory.mktemp("dashboard")
    asked = ("--entity", "somebody", "--project", "golf", "--name", "the board")
    env = {"WANDB_API_KEY": "", "NETRC": str(folder / "none"), "HOME": str(folder)}
    ended = dashboard(*asked, "--dry-run", str(folder), env=env)
    assert ended.returncode == 0, ended.stderr
    return {
        name: json.loads((folder / f"{name}.json").read_text()) for name in ("workspace", "report")
    }


def nodes(tree):
    """Every object in a JSON tree."""
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from nodes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from nodes(value)


def plots(tree) -> list[dict]:
    return [node for node in nodes(tree) if "viewType" in node]


@pytest.mark.parametrize("view", ["workspace", "report"])
def test_bytes_are_scattered_against_bpb(written, view):
    scatters = [p["config"] for p in plots(written[view]) if p["viewType"] == "Scatter Plot"]
    assert ("summary:artifact_bytes", "summary:val_bpb") in {
        (config["xAxis"], config["yAxis"]) for config in scatters
    }


@pytest.mark.parametrize("view", ["workspace", "report"])
def test_curves_are_drawn_by_group_over_all_three_axes(written, view):
    lines = [p["config"] for p in plots(written[view]) if p["viewType"] == "Run History Line Plot"]
    curves = [config for config in lines if config["metrics"] == ["val/bpb"]]
    assert {config["xAxis"] for config in curves} == {"step", "tokens", "train_seconds"}
    assert all(config["groupBy"] == "setting.value" for config in curves)
    assert all(config["groupArea"] == "stddev" for config in curves)


@pytest.mark.parametrize("view", ["workspace", "report"])
def test_the_cost_of_packing_has_a_bar_for_every_group(written, view):
    (bars,) = [
        p["config"]
        for p in plots(written[view])
        if p["viewType"] == "Bar Chart" and "gap" in p["config"]["metrics"][0]
    ]
    assert bars["metrics"] == ["summary_metrics.quantization_gap"]
    assert bars["groupBy"] == "setting.value"


def test_both_belong_to_the_project_asked_for(written):
    workspace, report = written["workspace"], written["report"]
    assert (workspace["entity"], workspace["project"]) == ("somebody", "golf")
    assert (workspace["displayName"], report["displayName"]) == ("the board", "the board")
    assert report["project"] == {"name": "golf", "entityName": "somebody"}
    grouping = workspace["spec"]["section"]["runSets"][0]["grouping"]
    assert grouping == [{"section": "config", "name": "setting.value"}]


def test_the_report_lists_every_seed(written):
    runsets = [run for node in nodes(written["report"]) for run in node.get("runSets", [])]
    (seeds,) = [run for run in runsets if run["name"] == "seeds"]
    assert seeds["grouping"] == []
    assert seeds["runFeed"]["columnOrder"][:4] == [
        *("run:group", "run:displayName", "config:setting.value", "config:seed.value"),
    ]
    keys = [(sort["key"]["section"], sort["key"]["name"]) for sort in seeds["sort"]["keys"]]
    assert keys == [("run", "group"), ("run", "displayName")]


def test_every_figure_it_names_is_one_that_runs_leave(written):
    """In the summary, the config or the curves of a real run."""
    run = train("looping=cycle", "looping.passes=2", "lora.rank=2", "trainer.log_every=5")
    curves = {key for event in run.events for key in event}
    text = json.dumps(written)
    named = {
        word.removeprefix("summary:")
        for node in nodes(written)
        for word in node.get("columnOrder", [])
        if word.startswith("summary:")
    }
    assert named <= {*run.summary, "quantization_gap"}
    for config in (p["config"] for p in plots(written)):
        for metric in config.get("metrics", []):
            known = curves | {
                f"summary_metrics.{key}" for key in (*run.summary, "quantization_gap")
            }
            assert metric in known, metric
        if "metricRegex" in config:
            stem = config["metricRegex"].removesuffix(".*")
            assert any(key.startswith(stem) for key in curves), stem
    assert "config:seed.value" in text


def test_settings_have_means_deviations_and_the_front_of_the_means(tmp_path):
    pytest.importorskip("wandb_workspaces")
    # A larger file with a better mean, and one that is larger and worse.
    figures = {1: (100, [2.0, 2.2]), 2: (200, [1.9, 1.7]), 3: (300, [1.8, 2.0])}
    done = train()
    for rank, (size, scores) in figures.items():
        for seed, score in enumerate(scores, 1):
            folder = tmp_path / "runs" / f"{rank}_{seed}"
            folder.mkdir(parents=True)
            config, summary = done.json("run.json"), dict(done.summary)
            config["seed"], config["lora"]["rank"] = seed, rank
            (folder / "run.json").write_text(json.dumps(config))
            summary |= {"val_bpb": score, "pre_quant_val_bpb": score - 0.01 * seed}
            summary |= {"artifact_bytes": size, "seed": seed, "fingerprint": fingerprint_of(config)}
            (folder / "summary.json").write_text(json.dumps(summary))
    ended = dashboard("--entity", "x", "--dry-run", str(tmp_path), str(tmp_path / "runs"))
    assert ended.returncode == 0, ended.stderr
    text = (tmp_path / "report.json").read_text()
    for line in (
        "| lora.rank=1 | 2 | 2.1000 \\u00b1 0.1414 | +0.0150 \\u00b1 0.0071 "
        "| 100 \\u00b1 0 | yes |",
        "| lora.rank=2 | 2 | 1.8000 \\u00b1 0.1414 | +0.0150 \\u00b1 0.0071 "
        "| 200 \\u00b1 0 | yes |",
        "| lora.rank=3 | 2 | 1.9000 \\u00b1 0.1414 | +0.0150 \\u00b1 0.0071 | 300 \\u00b1 0 |  |",
    ):
        assert line in text, text


def test_without_the_package_it_says_what_to_install(tmp_path):
    (tmp_path / "wandb_workspaces").mkdir()
    (tmp_path / "wandb_workspaces" / "__init__.py").write_text(
        "raise ModuleNotFoundError('not here', name='wandb_workspaces')"
    )
    ended = dashboard("--entity", "x", "--dry-run", ".", env={"PYTHONPATH": str(tmp_path)})
    assert ended.returncode == 2
    assert "pip install 'recurgolf[dashboard]'" in ended.stderr
    assert "Traceback" not in ended.stderr
