"""The report on the path of a quantized network: errors by hand, and where it is kept."""

import copy

import numpy as np
import pytest
import torch
from smoke_runs import composed, small, train

from recurgolf.training.trajectory import trajectory, trajectory_lines, validation_windows


def networks():
    run = composed(*small())
    exact = run.build_model().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in exact.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    other = copy.deepcopy(exact)
    for parameter in other.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return run, exact, other


def test_errors_and_scales_are_those_of_states_kept_by_hand():
    run, exact, other = networks()
    ids = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(0))
    found = trajectory(exact, other, run.eval_plan, ids, 0.25)
    states = []
    for model in (exact, other):
        kept = []
        with torch.no_grad():
            kept.append(model.hidden(ids, run.eval_plan, observe=lambda i, x, k=kept: k.append(x)))
        states.append([*kept[:-1], kept[-1]])
    assert len(found["visits"]) == run.eval_plan.num_visits == 4
    for row, x, y in zip([*found["visits"], found["readout"]], *states, strict=True):
        x, y = x.double().numpy(), y.double().numpy()
        assert row["relative_error"] == pytest.approx(
            np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-4
        )
        assert row["rms"] == pytest.approx(np.sqrt(np.mean(x**2)), rel=1e-4)
        assert row["rms_quantized"] == pytest.approx(np.sqrt(np.mean(y**2)), rel=1e-4)
    assert [(v["block"], v["visit"]) for v in found["visits"]] == [(0, 1), (1, 1), (0, 2), (1, 2)]
    assert found["gap_bpb"] == 0.25
    assert "0.2500 bpb" in trajectory_lines(found)[-1]


def test_a_network_does_not_stray_from_itself():
    run, exact, _ = networks()
    ids = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(0))
    found = trajectory(exact, copy.deepcopy(exact), run.eval_plan, ids, 0.0)
    assert all(visit["relative_error"] == 0 for visit in found["visits"])


def test_windows_lie_all_over_the_text():
    tokens = np.arange(1000, dtype=np.uint16)
    windows = validation_windows(tokens, 100)
    assert windows.shape == (8, 100)
    assert windows[0, 0] == 0 and windows[-1, -1] == 999
    assert validation_windows(tokens, 4000).shape == (1, 1000)


def test_a_run_reports_it_in_its_summary_and_log():
    run = train("trainer.steps=16", "quant=int6_tiny")
    found = run.summary["trajectory"]
    assert [visit["block"] for visit in found["visits"]] == [0, 1, 0, 1]
    assert all(0 < visit["relative_error"] < 1 for visit in found["visits"])
    gap = run.summary["val_bpb"] - run.summary["pre_quant_val_bpb"]
    assert found["gap_bpb"] == pytest.approx(gap, abs=1e-9)
    log = (run.path / "train.log").read_text()
    for line in trajectory_lines(found):
        assert line in log
