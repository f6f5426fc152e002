"""Folders that version 0.1.0 wrote are read, keep their fingerprints, and give the same network.

`fixtures/older_runs` holds run.json files as that version wrote them, each with the fingerprint
that it gave the Run and the number of parameters of the network that it built from it.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from recurgolf.run import Run

FILES = sorted((Path(__file__).parent / "fixtures" / "older_runs").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_run_of_an_earlier_version_keeps_its_fingerprint_and_its_network(path, tmp_path):
    told = json.loads(path.read_text())
    (tmp_path / "run.json").write_text(json.dumps(told["run"]))
    run = Run.read(tmp_path)
    assert run.fingerprint == told["fingerprint"]
    assert sum(p.numel() for p in run.build_model().parameters()) == told["parameters"]
    # Written again it is a run of today, and the folder's records are still known as its own.
    again = Run.from_dict(run.to_dict())
    assert again == run
    assert again.known_as(tmp_path) == {again.fingerprint, told["fingerprint"]}
    assert replace(run, seed=8).known_as(tmp_path).isdisjoint({told["fingerprint"]})
