"""Looping schedules are pure functions that give the visits their papers describe."""

from itertools import pairwise

import pytest

from recurgolf.config import REGISTRY, ConfigError
from recurgolf.looping import CycleLooping, NoLooping, PreludeCoreCoda, SegmentLooping

VARIANTS = [
    SegmentLooping(start=1, end=2, passes=3),
    CycleLooping(passes=4, start_fraction=0.35, ramp_fraction=0.3),
    PreludeCoreCoda(prelude=1, coda=1, passes=3, backprop_passes=2),
]
SCHEDULES = [*(schedule() for schedule in REGISTRY["looping"].values()), *VARIANTS]


def test_golf_band_gives_the_published_visit_list():
    # systems.md 2.b: blocks 3 to 5 twice more, 17 visits, encoder of the first eight.
    plan = SegmentLooping(start=3, end=5, passes=3).plan(11)
    assert plan.blocks == (0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10)
    assert plan.blocks[:8] == (0, 1, 2, 3, 4, 5, 3, 4)


def test_universal_transformer_gives_the_published_visit_list():
    plan = PreludeCoreCoda(prelude=1, coda=1, passes=3).plan(6)
    assert plan.blocks == (0, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 5)
    assert plan.core == (1, 13)
    assert plan.looped_blocks == (1, 2, 3, 4)


def test_visit_number_counts_the_visits_of_its_block():
    plan = SegmentLooping(start=1, end=1, passes=3).plan(3)
    assert [(v.block, v.nth) for v in plan.visits] == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_plan_depends_on_the_fraction_alone(schedule):
    plans = [schedule.plan(5, f / 100) for f in range(101)]
    again = [schedule.plan(5, f / 100) for f in reversed(range(101))][::-1]
    assert plans == again
    assert len({hash(p) for p in plans}) == len(set(plans)) == len(schedule.all_plans(5))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_every_plan_visits_every_block_and_repeats_whole_passes(schedule):
    for plan in schedule.all_plans(5):
        start, stop = plan.core
        assert set(plan.blocks) == set(range(5))
        if stop > start:
            core = plan.blocks[start:stop]
            width = len(set(core))
            assert core == core[:width] * (len(core) // width)


def test_delayed_looping_starts_at_its_fraction_and_ramps_one_pass_at_a_time():
    schedule = CycleLooping(passes=4, start_fraction=0.5, ramp_fraction=0.3)
    passes = [schedule.plan(1, f / 1000).num_visits for f in range(1001)]
    assert passes[:500] == [1] * 500
    assert passes[500] == 2
    assert passes[800:] == [4] * 201
    assert all(b - a in (0, 1) for a, b in pairwise(passes))


def test_truncated_backpropagation_keeps_the_last_passes():
    plan = PreludeCoreCoda(prelude=1, coda=1, passes=4, backprop_passes=1).plan(4)
    assert plan.grad_from == 1 + 2 * 3
    assert plan.blocks[plan.grad_from :] == (1, 2, 3)


def test_scoring_may_use_another_number_of_passes():
    schedule = CycleLooping(passes=2, passes_eval=5)
    assert schedule.eval_plan(2).num_visits == 10
    assert schedule.eval_plan(2, passes=3).num_visits == 6
    assert schedule.largest_plan(2).num_visits == 10


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (lambda: SegmentLooping(start=2, end=4), "looping.start=2 to looping.end=4"),
        (lambda: SegmentLooping(start=2, end=1), "looping.start=2 to looping.end=1"),
        (lambda: PreludeCoreCoda(prelude=2, coda=2), "leaves no core in a model of 4 blocks"),
        (lambda: CycleLooping(passes=0), "looping.passes=0"),
        (lambda: CycleLooping(start_fraction=1.5), "looping.start_fraction=1.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_impossible_schedules_are_refused_with_their_numbers(schedule, text):
    with pytest.raises(ConfigError, match=text.replace(".", r"\.")):
        schedule().check(4)


def test_passes_are_refused_where_nothing_repeats():
    with pytest.raises(ConfigError, match="looping=none has 1 and nothing else"):
        NoLooping().eval_plan(4, passes=3)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_every_schedule_scores_with_the_passes_it_is_asked_for_or_refuses(schedule):
    schedule.check_passes(5, [])
    for passes in range(1, 6):
        try:
            plan = schedule.eval_plan(5, passes)
        except ConfigError as error:
            assert f"passes={passes}" in str(error)
        else:
            assert max(visit.nth for visit in plan.visits) == passes - 1


def test_a_schedule_that_ignores_its_passes_is_refused():
    class Twice(CycleLooping):
        kind = "twice"

        def eval_plan(self, num_blocks, passes=None):
            return self.plan(num_blocks)

    class AtMostThree(CycleLooping):
        kind = "at_most_three"

        def eval_plan(self, num_blocks, passes=None):
            return super().eval_plan(num_blocks, min(passes or 2, 3))

    with pytest.raises(ConfigError, match=r"looping=twice plans the same visits for 1 and for 2"):
        Twice().check_passes(4, [])
    AtMostThree().check_passes(4, [1, 2, 3])
    with pytest.raises(ConfigError, match=r"same visits for 4 and for 5 passes \(\(0 1 2 3\)x3\)"):
        AtMostThree().check_passes(4, [1, 2, 5])
