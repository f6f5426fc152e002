"""Schedules against the multipliers and momenta recorded from the public systems."""

import json
from pathlib import Path

import pytest

from recurgolf.optim import (
    FractionSchedule,
    MuonAdam,
    Schedule,
    StepsSchedule,
    WallclockSchedule,
    training_fraction,
)

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
SYSTEMS = sorted(path.parents[1].name for path in GOLDEN.glob("*/optimizer/schedules.json"))
WALLCLOCK = [system for system in SYSTEMS if system != "per_iteration_lora"]  # of fractions


def recorded(system):
    return json.loads((GOLDEN / system / "optimizer" / "schedules.json").read_text())


def close(value):
    return pytest.approx(value, rel=1e-12, abs=0)


@pytest.mark.parametrize("system", WALLCLOCK)
def test_wallclock_schedule_is_the_recorded_one(system):
    for case in recorded(system)["lr_mul"]:
        schedule = WallclockSchedule(warmdown_steps=case["warmdown_iters"])
        limit = case["max_wallclock_seconds"] or None
        for step, elapsed_ms, expected in case["rows_step_elapsedms_mul"]:
            found = schedule.lr_scale(step, case["iterations"], elapsed_ms / 1000, limit)
            assert found == close(expected), (case["iterations"], step, elapsed_ms)


@pytest.mark.parametrize("system", WALLCLOCK)
def test_steps_schedule_is_the_recorded_one_without_a_clock(system):
    for case in recorded(system)["lr_mul"]:
        if case["max_wallclock_seconds"]:
            continue
        schedule = StepsSchedule(warmdown_steps=case["warmdown_iters"])
        for step, _, expected in case["rows_step_elapsedms_mul"]:
            if step < case["iterations"]:
                assert schedule.lr_scale(step, case["iterations"]) == close(expected)


def test_fraction_schedule_is_the_recorded_one():
    for case in recorded("per_iteration_lora")["lr_mul"]:
        schedule = FractionSchedule(warmdown_fraction=case["warmdown_frac"], min_lr=case["min_lr"])
        limit_ms = case["effective_max_wallclock_ms"]
        limit = limit_ms / 1000 if limit_ms else None
        for step, elapsed_ms, fraction, expected, _ in case["rows_step_elapsedms_frac_mul_looping"]:
            now = (step, case["iterations"], elapsed_ms / 1000, limit)
            assert training_fraction(*now) == close(fraction)
            assert schedule.lr_scale(*now) == close(expected)


@pytest.mark.parametrize("system", [s for s in SYSTEMS if "momentum" in recorded(s)])
def test_momentum_is_the_recorded_one(system):
    for case in recorded(system)["momentum"]:
        config = MuonAdam(
            momentum=case["muon_momentum"],
            momentum_start=case["muon_momentum_warmup_start"],
            momentum_warmup_steps=case["muon_momentum_warmup_steps"],
        )
        for step, expected in case["rows_step_momentum"]:
            assert config.momentum_at(step) == close(expected)


def test_warmup_grows_linearly_to_one():
    schedule = Schedule(warmup_steps=4)
    assert [schedule.lr_scale(step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize("kind", [StepsSchedule, FractionSchedule])
def test_the_factor_stays_at_min_lr_at_and_after_the_end(kind):
    schedule = kind(min_lr=0.1)
    assert schedule.lr_scale(2000, 2000) == schedule.lr_scale(2500, 2000) == 0.1
