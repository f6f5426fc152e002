"""Run folders that no training made: their summaries say all that a trained run's says."""

import json
from pathlib import Path

import pytest
from command_line import recurgolf
from smoke_runs import train

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
ASKED = ("budget.train_seconds=600", "eval.passes=[1,2]")
OF_TRAINING = {"steps", "tokens", "train_seconds", "tokens_per_second"}
"""Figures that weights from elsewhere do not have."""


def filled(summary: dict) -> set[str]:
    """Keys whose value says something, those one level below as `key/below`."""
    found = {key for key, value in summary.items() if value not in (None, "", 0, [], {})}
    for key in ("environment", "text", "caps", "quantization", "trajectory", "seconds"):
        found |= {f"{key}/{below}" for below in summary[key]}
    return found


@pytest.fixture(scope="module")
def trained():
    return train(*ASKED)


@pytest.fixture(scope="module")
def expected(trained):
    found = filled(trained.summary)
    assert {"text/fingerprint", "environment/precision", "caps/training", "by_passes"} <= found
    return found


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_a_packed_folder_tells_as_much_as_a_trained_one(trained, expected, tmp_path):
    recurgolf("pack", trained.path, "packed", cwd=tmp_path).finished()
    packed = summary_of(tmp_path / "packed")
    assert expected <= filled(packed)
    for key in ("by_passes", "text", "val_bpb"):
        assert packed[key] == trained.summary[key], key
    for key in packed["environment"].keys() - {"threads"}:
        assert packed["environment"][key] == trained.summary["environment"][key], key
    # The clocks go on, so the cap of training counts the training.
    spent = packed["caps"]["training"]["used"]
    assert spent >= trained.summary["train_seconds"] == packed["train_seconds"]
    assert packed["folder"].endswith("packed")


def test_so_do_folders_with_adapters_put_on_and_merged(trained, expected, tmp_path):
    def adapters(*arguments):
        recurgolf("adapters", *arguments, cwd=tmp_path).finished()

    adapters("save", trained.path, "adapter")
    adapters("load", trained.path, "adapter", "loaded", "--score")
    assert expected - OF_TRAINING <= filled(summary_of(tmp_path / "loaded"))
    assert summary_of(tmp_path / "loaded")["val_bpb"] == trained.summary["val_bpb"]
    adapters("merge", "--untie", trained.path, "adapter", "merged", "--score")
    # Where nothing loops any more there is one number of passes.
    assert expected - OF_TRAINING - {"by_passes"} <= filled(summary_of(tmp_path / "merged"))


def test_so_does_an_imported_folder(expected, tmp_path):
    source = GOLDEN / "per_iteration_lora" / "eval"
    data = [f"data.path={GOLDEN}/data/shards", f"data.tokenizer={GOLDEN}/data/tokenizer.model"]
    recurgolf(
        *("import", "per_iteration_lora", source / "weights.safetensors", source / "eval.json"),
        *("imported", "data=shards", *data, *ASKED, "quant=int8", "trainer.device=cpu", "--score"),
        cwd=tmp_path,
    ).finished()
    imported = summary_of(tmp_path / "imported")
    assert expected - OF_TRAINING - {"val_bpb_raw", "val_raw_bytes"} <= filled(imported)
    assert imported["pre_quant_val_bpb"] != imported["val_bpb"]
