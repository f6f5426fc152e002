"""Every verb on a folder whose files are no longer what a run wrote there: a line, no traceback."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import recurgolf
from smoke_runs import train

from recurgolf.audit.check import Check
from recurgolf.audit.finished_run import _limits, files_check, read_summary, rescored_check
from recurgolf.audit.isolated import Rescored
from recurgolf.audit.scoring_process import Scoring
from recurgolf.config import ConfigError

CONTENTS = {
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "garbage": b"\x00\xff\xfe" * 40,
    "empty": b"",
}
VERBS = {
    "audit": "audit run",
    "board": "board . --out page.html",
    "compare": "compare .",
    "evaluate": "evaluate run",
    "export": "export run out",
    "pack": "pack run packed quant=int8 --no-score",
    "plan": "plan run",
    "resume": "resume run",
    "sample": "sample run",
    "sweep show": "sweep show .",
}
SLOW = {"audit", "board", "pack", "plan", "resume"}
FACTS = ("run.json", "summary.json")
BESIDE = (
    *("ledger.json", "metrics.jsonl", "seal.json", "audit.json", "evals.json"),
    *("packed_from.json", "scores/plain.npz", "state.json"),
)
CASES = [
    (verb, (file,), kind)
    for verb in VERBS
    for file in FACTS
    for kind in (["deep"] if verb in SLOW - {"audit"} else CONTENTS)
]
CASES += [(verb, BESIDE, "deep") for verb in VERBS]
ALONE = [(verb, (file,), "deep") for verb in VERBS if verb not in SLOW for file in BESIDE]
"""Files that are damaged together above; one at a time, in case one hides the others."""


def case(verb: str, files: tuple[str, ...], kind: str):
    marks = pytest.mark.slow if (verb, files, kind) in ALONE else []
    return pytest.param(verb, files, kind, id=f"{verb}-{','.join(files)[:12]}-{kind}", marks=marks)


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a finished run in `run`."""
    shutil.copytree(train().path, tmp_path / "run")
    return tmp_path


@pytest.mark.parametrize(("verb", "files", "kind"), [case(*each) for each in [*CASES, *ALONE]])
def test_a_damaged_file_ends_in_a_line(place, verb, files, kind):
    for file in files:
        (found,) = (
            (place / "run").glob("checkpoints/*/" + file)
            if file == "state.json"
            else (place / "run" / file,)
        )
        found.write_bytes(CONTENTS[kind])
    ended = recurgolf(*VERBS[verb].split(), cwd=place)
    assert "Traceback" not in ended.out + ended.err
    assert ended.code in (0, 1, 2)
    assert len(ended.err.strip().splitlines()) <= 2, ended.err
    if files == ("run.json",):
        assert ended.code == (1 if verb == "sweep show" else 2)
        assert "run.json is damaged" in ended.out + ended.err


@pytest.fixture(scope="module")
def scoring():
    return Scoring(train().path)


def shapes(told: dict):
    """The summary with one value of another type, at any of its keys, and one level below."""
    for value in (3, "x", [], [1], {}, {"a": "x"}, None, True):
        for key, own in told.items():
            yield {**told, key: value}
            if isinstance(own, dict):
                yield from ({**told, key: {**own, below: value}} for below in own)


def test_a_summary_of_any_shape_is_judged_or_refused_by_name(place, scoring):
    """The audit's checks calculate with nothing that they have not looked at."""
    folder, facts = place / "run", scoring.facts()
    config = json.loads((folder / "run.json").read_text())
    told = json.loads((folder / "summary.json").read_text())
    again = Rescored(dict(told["evals"]["plain"]), "", "")
    refused = judged = 0
    for summary in shapes(told):
        (folder / "summary.json").write_text(json.dumps(summary))
        try:
            read = read_summary(folder)
        except ConfigError as error:
            assert "summary.json is damaged: " in str(error)
            refused += 1
            continue
        checks = [
            rescored_check(read, again, {}, facts, config),
            files_check(folder, config, read, facts, scoring.dataset),
            _limits(folder, config, read, facts["code"]),
        ]
        assert all(isinstance(check, Check) for check in checks)
        judged += 1
    assert refused > 50 and judged > 50
