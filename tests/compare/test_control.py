"""Flat controls: no loop, no adapters, and the looped run's bytes, FLOPs or seconds."""

import pytest
from command_line import recurgolf
from smoke_runs import composed

from recurgolf.compare.control import flat_control
from recurgolf.config import ConfigError
from recurgolf.plan import flops_per_token, make_plan

LOOPED = {
    "all blocks": ["experiment=smoke", "looping.passes=3"],
    "a band, late": ["experiment=per_iteration_lora_cpu", "lora.rank=8"],
    "noise for looped blocks": ["experiment=universal_rank1_cpu"],
    "more passes when scored": ["experiment=parallel_recurrent_cpu"],
    "residual adapters": ["experiment=depth_recurrent_qat_cpu"],
}
SLOW = ("noise for looped blocks", "residual adapters")


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(own, id=name, marks=pytest.mark.slow if name in SLOW else [])
        for name, own in LOOPED.items()
    ],
)
def test_bytes_are_equal_and_nothing_loops(overrides):
    looped = composed(*overrides)
    flat = composed(*flat_control(overrides, "bytes", lambda own: composed(*own)).overrides)
    assert flat.plan(1.0).blocks == tuple(range(looped.model.num_blocks))
    assert flat.lora.rank == 0
    wanted = make_plan(looped).total_bytes
    assert make_plan(flat).total_bytes == pytest.approx(wanted, rel=0.01)
    assert flat.trainer == looped.trainer and flat.data == looped.data


def test_flops_are_those_of_the_whole_training():
    overrides = ["experiment=per_iteration_lora_cpu"]
    looped = composed(*overrides)
    flat = composed(*flat_control(overrides, "flops", lambda own: composed(*own)).overrides)
    # A loop that starts late: counted step by step.
    steps = looped.trainer.steps
    wanted = sum(flops_per_token(looped, looped.plan(step / steps)) for step in range(steps))
    found = flops_per_token(flat, flat.plan(1.0)) * flat.trainer.steps
    assert found == pytest.approx(wanted, rel=0.01)
    assert make_plan(flat).total_bytes == pytest.approx(make_plan(looped).total_bytes, rel=0.01)


def test_seconds_give_the_cheaper_network_more_steps():
    overrides = ["experiment=smoke", "looping.passes=8", "trainer.steps=200"]
    control = flat_control(overrides, "seconds", lambda own: composed(*own))
    flat = composed(*control.overrides)
    assert control.ratio == pytest.approx(1, rel=0.01)
    # Sixteen visits against two: far more steps, though not quite eight times.
    assert 2 * 200 < flat.trainer.steps < 8 * 200


@pytest.mark.parametrize(
    ("overrides", "match", "words"),
    [
        (["experiment=smoke", "looping=none", "lora=none"], "bytes", "its own flat control"),
        (["experiment=smoke"], "flop", "did you mean 'flops'"),
        (["experiment=smoke", "quant.fill_budget=true"], "bytes", "as large as the budget"),
    ],
)
def test_what_has_no_control_is_said(overrides, match, words):
    with pytest.raises(ConfigError, match=words):
        flat_control(overrides, match, lambda own: composed(*own))


def test_the_last_line_of_the_command_is_an_override_list(tmp_path):
    ended = recurgolf("control", "experiment=smoke", "compare.match=flops", cwd=tmp_path).finished()
    flat = composed(*ended.out.strip().splitlines()[-1].split())
    assert flat.name == "smoke_flat" and flat.trainer.steps > 20
