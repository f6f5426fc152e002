"""quant.tolerance: what packing may cost where the budget has room."""

import pytest
from command_line import recurgolf
from smoke_runs import RunFolder, train

COARSE = (
    "quant=int6_tiny",
    "quant.rules=[{pattern: '*', bits: 4, clip: {kind: sigma, k: 7}}]",
    "budget.artifact_bytes=100000",
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    base = train("trainer.steps=64", "optimizer.ns_dtype=float32")

    def pack(*asked: str) -> RunFolder:
        folder = tmp_path_factory.mktemp("packed") / "new"
        said = recurgolf("pack", str(base.path), str(folder), *COARSE, *asked, cwd=folder.parent)
        assert said.code == 0, said.err
        return RunFolder(folder, said)

    return pack


def lost(run: RunFolder) -> float:
    return run.summary["val_bpb"] - run.summary["pre_quant_val_bpb"]


def share(run: RunFolder) -> float:
    return run.summary["quantization"]["step_share"]


def test_steps_become_as_fine_as_the_network_needs_and_the_budget_allows(packed):
    as_said, fitted = packed("quant.tolerance=null"), packed("quant.tolerance=0.004")
    assert lost(as_said) > 0.02 and share(as_said) == 1
    assert 0.001 < lost(fitted) < 0.005
    assert "more than quant.tolerance=0.004" in fitted.ended.out
    room = (as_said.summary["artifact_bytes"] + fitted.summary["artifact_bytes"]) // 2
    tight = packed("quant.tolerance=0.004", f"budget.artifact_bytes={room}")
    assert 0.98 * room < tight.summary["artifact_bytes"] <= room
    assert lost(fitted) < lost(tight) < lost(as_said)
    assert share(fitted) < share(tight) < 1


def test_steps_that_cost_little_stay_as_they_are(packed):
    roomy, as_said = packed("quant.tolerance=0.5"), packed("quant.tolerance=null")
    assert share(roomy) == 1
    tensors = [run.path.joinpath("artifact.bin").read_bytes() for run in (roomy, as_said)]
    assert len(tensors[0]) == pytest.approx(len(tensors[1]), abs=8)
    assert roomy.summary["val_bpb"] == as_said.summary["val_bpb"]
