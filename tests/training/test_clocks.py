"""What the clocks count, what they forbid, and what is said about it in time."""

import json
import time

import pytest
import torch
from smoke_runs import small, train

import recurgolf
from recurgolf.budget import PHASES, Budget, Cap
from recurgolf.config import ConfigError
from recurgolf.training.clock import Caps, Clock


@pytest.mark.serial
def test_phases_add_up_and_do_not_overlap():
    clock = Clock()
    began = time.perf_counter()
    with clock.phase("training"):
        time.sleep(0.02)
        with clock.phase("checkpoint"):
            assert clock.running == "checkpoint"
            time.sleep(0.03)
        time.sleep(0.02)
    passed = time.perf_counter() - began
    assert clock.total(PHASES) == pytest.approx(passed, abs=0.01)
    assert clock.seconds["checkpoint"] == pytest.approx(0.03, abs=0.02)
    earlier = clock.state_dict()
    clock.add(earlier)
    assert clock.seconds["training"] == pytest.approx(2 * earlier["training"])


def test_a_cap_counts_its_phases_and_no_others():
    budget = Budget(train_seconds=10, caps={"evaluation": Cap(5, ["evaluation"])})
    clock = Clock()
    clock.add({"training": 6, "checkpoint": 1, "calibration": 4, "packing": 100})
    clock.add({"evaluation": 4.5})
    used = Caps(budget, clock, print).used()
    assert (used["training"]["used"], used["training"]["kept"]) == (11, False)
    assert (used["evaluation"]["used"], used["evaluation"]["kept"]) == (4.5, True)
    alone = Budget(train_seconds=10, caps={"training": Cap(None, ["training"])})
    assert Caps(alone, clock, print).used()["training"]["used"] == 6
    assert Caps(Budget(), clock, print).used() == {}


@pytest.mark.parametrize(
    "name, cap, words",
    [
        ("evaluation", lambda: Cap(5, ["evaluaton"]), "did you mean 'evaluation'"),
        ("evaluation", lambda: Cap(None, ["evaluation"]), "seconds=null: above 0"),
        ("evaluation", lambda: Cap(5, []), "must not be empty"),
        ("training", lambda: Cap(7, ["training"]), "leave the former out"),
        ("training", lambda: Cap(None, ["checkpoint"]), "lacks 'training'"),
    ],
)
def test_caps_that_cannot_be_are_refused(name, cap, words):
    with pytest.raises(ConfigError, match=words):
        Budget(train_seconds=10, caps={name: cap()})


def test_the_challenge_has_two_caps_of_ten_minutes():
    budget = recurgolf.compose(["budget=track_10min_16mb"]).budget
    assert {name: cap.seconds for name, cap in budget.all_caps.items()} == {
        "training": 600,
        "evaluation": 600,
    }
    assert "calibration" in budget.all_caps["training"].phases
    assert not {"validation", "packing", "warmup"} & set(budget.all_caps["training"].phases)


def test_a_cap_that_will_be_broken_is_told_once():
    said = []
    clock = Clock()
    clock.add({"evaluation": 4.0})
    caps = Caps(Budget(caps={"evaluation": Cap(5, ["evaluation"])}), clock, said.append)
    caps.warn("evaluation", 0.5, "-")
    caps.warn("training", 100, "-")
    assert said == []
    caps.warn("evaluation", 2.0, "take fewer windows")
    caps.warn("evaluation", 3.0, "take fewer windows")
    assert len(said) == 1
    assert "evaluation will take about 6 s" in said[0]
    assert "take fewer windows" in said[0]


@pytest.mark.serial
def test_a_run_that_the_clock_will_cut_short_says_so_long_before_and_what_it_used():
    run = train("budget.train_seconds=2", "trainer.steps=5000", "trainer.log_every=10")
    foreseen = run.ended.out.index("training will take about")
    assert foreseen < run.ended.out.index("the training clock reached its cap")
    assert run.ended.out.count("training will take about") == 1
    lines = [line for line in run.ended.out[:foreseen].splitlines() if line.startswith("step")]
    assert int(lines[-1].split()[1].partition("/")[0]) < run.summary["steps"] / 2
    used = run.summary["caps"]["training"]
    assert used["used"] == pytest.approx(
        sum(run.summary["seconds"][phase] for phase in used["phases"]), abs=0.01
    )
    assert used["seconds"] == 2


def test_warm_up_restores_averages_random_states_and_optimizers(tmp_path, trainer_in):
    late = "optimizer.lora_warmup_steps=5"
    trainer = trainer_in(tmp_path, "averaging=ema", "trainer.warmup_steps=2", late)
    before = {k: v.clone() for k, v in trainer.state.model.state_dict().items()}
    averages = {k: v.clone() for k, v in trainer.state.averager.state_dict().items()}
    rng, loader = torch.get_rng_state(), trainer.state.loader.state_dict()
    trainer.warm_up()
    for name, tensor in trainer.state.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, tensor in trainer.state.averager.state_dict().items():
        assert torch.equal(tensor, averages[name])
    assert trainer.state.optimizers.state_dict().keys() == {"steps:lora"}
    assert int(trainer.state.optimizers.state_dict()["steps:lora"]) == 0
    assert torch.equal(torch.get_rng_state(), rng)
    assert trainer.state.loader.state_dict() == loader


def graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def test_nothing_is_compiled_after_the_clock_starts(tmp_path, trainer_in):
    """Adapters that begin halfway, gains, a falling rate, a validation: all graphs are there."""
    compiled = ("trainer.compile=true", "trainer.compile_backend=eager", "trainer.warmup_steps=1")
    late = ("looping.start_fraction=0.5", "lora.visits=repeats", "model.visit_gains=true")
    asked = (*compiled, *late, "trainer.steps=6", "trainer.val_every=4")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = trainer_in(tmp_path / "compiled", *asked)
    trainer.warm_up()
    warm = graphs()
    assert warm >= 2
    trainer.fit()
    assert graphs() == warm
    plain = trainer_in(tmp_path, *late, "trainer.steps=6")
    plain.fit()
    for name, tensor in plain.state.model.state_dict().items():
        torch.testing.assert_close(
            trainer.state.model.state_dict()[name], tensor, rtol=0, atol=2e-5
        )
    events = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("train/loss" in event for event in events)


def test_a_resumed_run_that_keeps_its_cap_is_not_warned_of_it():
    """The pace is that of all steps so far, those before the resumption included."""
    run = recurgolf.compose(small("trainer.steps=100", "budget.train_seconds=20"))
    said = []
    clock = Clock()
    clock.add({"training": 9.0})
    visits = 50 * run.plan(1.0).num_visits
    Caps(run.budget, clock, said.append).warn_of_training(run, 50, visits)
    assert said == []
    Caps(run.budget, clock, said.append).warn_of_training(run, 50, visits // 2)
    assert "it will end before step 100" in said[0]
