"""One damaged or diverged run among others: it is named and left out, the others' figures stand."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import recurgolf
from run_folders import write_metrics, write_run

from recurgolf.compare.board import board_data
from recurgolf.compare.comparison import compare
from recurgolf.compare.runs import find_runs
from recurgolf.compare.sweep import finish_sweep
from recurgolf.config import ConfigError
from recurgolf.disk import DamagedFile
from recurgolf.eval.several import kept_settings

BPB = {"1": [1.60, 1.62, 1.58], "2": [1.50, 1.51, 1.49]}
CONTENTS = {
    "empty": b"",
    "cut": b'{"val_bpb": 1.5, "val',
    "garbage": b"\x00\xff\xfe" * 40,
    "null": b"null",
    "list": b"[1, 2]",
    "NaN": b"NaN",
    "text": b'"finished"',
    "deep": b"[" * 200_000,
    "deep and closed": b'{"a":' * 3_000 + b"1" + b"}" * 3_000,
}
LINES = {name: content + b"\n" for name, content in CONTENTS.items() if name != "empty"}
LINES["no step"] = b'{"event": "metrics"}\n'
LINES["no values"] = b'{"event": "start"}\n'


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Two settings by three seeds, as jobs 0 to 5."""
    documents = np.random.default_rng(0)
    jobs = []
    for rank, bpbs in BPB.items():
        for seed, bpb in enumerate(bpbs, 1):
            folder = tmp_path / str(len(jobs))
            sizes = np.full(30, 100.0)
            nats = bpb * np.log(2) * sizes + documents.normal(0, 1, 30)
            write_run(folder, seed, bpb, f"lora.rank={rank}", nats=nats, sizes=sizes)
            write_metrics(folder, 100, [3.0, 2.0])
            (folder / "ledger.json").write_text(json.dumps({"components": [], "code": {}}))
            (folder / ".hydra").mkdir()
            overrides = [f"lora.rank={rank}", f"seed={seed}"]
            (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
            jobs.append({"overrides": overrides, "folder": str(folder), "status": "finished"})
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs, "groups": []}))
    return tmp_path


def means(found) -> dict[str, tuple[int, float]]:
    """Setting -> number of runs and mean."""
    return {g.label: (len(g.runs), round(g.spread("val_bpb")[0], 6)) for g in found.groups}


@pytest.mark.parametrize("name", ["run.json", "summary.json"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_a_run_without_its_facts_is_left_out_by_name(sweep, name, kind):
    (sweep / "4" / name).write_bytes(CONTENTS[kind])
    found = compare([sweep], "lora.rank=1")
    assert means(found) == {"lora.rank=1": (3, 1.6), "lora.rank=2": (2, 1.495)}
    assert any(f"4/{name} is damaged" in note for note in found.notes)
    left_out: list[str] = []
    runs = find_runs([sweep], left_out)
    data = board_data(runs, sweep, "title", left_out)
    assert [run["folder"] for run in data["runs"]] == ["0", "1", "2", "3", "5"]
    assert [f"4/{name} is damaged" in line for line in left_out] == [True]
    assert finish_sweep(sweep) == 1
    told = json.loads((sweep / "sweep.json").read_text())
    assert [group["n"] for group in told["groups"]] == [3, 2]
    assert f"4/{name} is damaged" in told["jobs"][4]["error"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("val_bpb", value) for value in ("1.5", [], True, {})],
        *[("artifact_bytes", value) for value in (None, "many")],
        *[("evals", value) for value in ([], "x", {"sliding": 3})],
        *[("text", []), ("environment", "here"), ("within_budget", "yes"), ("by_passes", 3)],
    ],
)
def test_a_figure_of_another_type_is_left_out_by_name(sweep, key, value):
    path = sweep / "4" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    if value == []:
        path.write_text(json.dumps({**json.loads(path.read_text()), key: [1]}))
    found = compare([sweep], "lora.rank=1")
    assert means(found) == {"lora.rank=1": (3, 1.6), "lora.rank=2": (2, 1.495)}
    assert any("4/summary.json is damaged" in note for note in found.notes)


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.json"])
@pytest.mark.parametrize("kind", LINES)
def test_what_the_board_alone_reads_costs_a_run_only_that(sweep, name, kind):
    (sweep / "4" / name).write_bytes(LINES[kind])
    left_out: list[str] = []
    data = board_data(find_runs([sweep]), sweep, "title", left_out)
    assert [run["val_bpb"] for run in data["runs"]] == [*BPB["1"], *BPB["2"]]
    assert [f"4/{name}" in line for line in left_out] == [True]
    json.dumps(data, allow_nan=False)


@pytest.mark.parametrize("kind", CONTENTS)
def test_damaged_scores_cost_the_test_over_documents_alone(sweep, kind):
    assert "documents" in compare([sweep], "lora.rank=1").verdicts[0].tests
    next((sweep / "4" / "scores").iterdir()).write_bytes(CONTENTS[kind])
    verdict = compare([sweep], "lora.rank=1").verdicts[0]
    assert sorted(verdict.tests) == ["paired", "welch"]


@pytest.mark.parametrize("cut", [10, 100, 200])
def test_scores_that_end_early_do_too(sweep, cut):
    path = next((sweep / "4" / "scores").iterdir())
    path.write_bytes(path.read_bytes()[:-cut])
    assert sorted(compare([sweep], "lora.rank=1").verdicts[0].tests) == ["paired", "welch"]


@pytest.mark.parametrize("name", ["seal.json", "audit.json", "../sweep.json"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_damaged_files_beside_the_result_change_no_figure(sweep, name, kind):
    (sweep / "4" / name).write_bytes(CONTENTS[kind])
    found = compare([sweep], "lora.rank=1")
    assert means(found) == {"lora.rank=1": (3, 1.6), "lora.rank=2": (3, 1.5)}
    assert board_data(find_runs([sweep]), sweep, "title")["runs"][4]["audit"] == "not audited"


def test_a_run_that_diverged_has_that_status_everywhere(sweep, capsys):
    """Also that of an earlier version, which wrote NaN and called it finished."""
    for number, changes in ((1, {"status": "diverged", "val_bpb": None}), (4, {})):
        path = sweep / str(number) / "summary.json"
        told = {**json.loads(path.read_text()), "val_bpb": float("nan"), **changes}
        path.write_text(json.dumps(told))
    found = compare([sweep], "lora.rank=1")
    assert means(found) == {"lora.rank=1": (2, 1.59), "lora.rank=2": (2, 1.495)}
    assert [group.diverged for group in found.groups] == [1, 1]
    assert sum("seed 2 diverged" in note for note in found.notes) == 2
    data = board_data(find_runs([sweep]), sweep, "title")
    statuses = [run["status"] for run in data["runs"]]
    assert statuses == ["finished", "diverged", "finished"] * 2
    assert finish_sweep(sweep) == 1
    assert "diverged" in capsys.readouterr().out
    told = json.loads((sweep / "sweep.json").read_text())
    assert [job["status"] for job in told["jobs"]] == statuses
    assert [group["diverged"] for group in told["groups"]] == [1, 1]


def test_names_with_markup_are_shown_as_they_are(tmp_path):
    folder = tmp_path / "a[" / "red]b"
    for seed, bpb in enumerate([1.5, 1.6], 1):
        write_run(folder / f"a[{seed}]", seed, bpb, name="a[/red]b")
    write_run(folder / "c", 3, None, name="a[/red]b")
    (folder / "d").mkdir()
    (folder / "d" / "run.json").write_text("[/red]")
    ended = recurgolf("compare", ".", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "a[/red]b" in ended.out
    assert "d/run.json is damaged" in ended.out


def test_nothing_but_damaged_runs_is_refused_by_name(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text("null")
    ended = recurgolf("compare", ".", cwd=tmp_path)
    assert ended.code == 2
    assert "a/run.json is damaged" in ended.err
    assert "Traceback" not in ended.err


def test_where_every_run_diverged_that_is_what_is_said(tmp_path):
    for seed in (1, 2):
        told = {"status": "diverged", "val_bpb": None}
        path = write_run(tmp_path / str(seed), seed, 1.5) / "summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **told}))
    with pytest.raises(ConfigError, match=r"nothing to compare \(2 of 2 runs diverged\)"):
        compare([tmp_path])


def test_garbage_in_scores_is_no_pickle(tmp_path):
    (tmp_path / "plain.npz").write_bytes(b"garbage")
    with pytest.raises(DamagedFile, match=r"plain\.npz is damaged: it holds no scores"):
        kept_settings(tmp_path / "plain.npz")
