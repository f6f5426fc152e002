"""A Run is a value: it checks itself and is read back from its folder."""

import pytest

import recurgolf
from recurgolf.config import ConfigError
from recurgolf.run import Run

RUN = recurgolf.compose(["experiment=smoke", "tracker=none"])


def test_a_run_comes_back_from_its_folder(tmp_path):
    RUN.write(tmp_path)
    assert Run.read(tmp_path) == RUN


def test_a_folder_without_a_run_and_a_damaged_one_are_named(tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        Run.read(tmp_path)
    (tmp_path / "run.json").write_text('{"name": ')
    with pytest.raises(ConfigError, match=r"run\.json is damaged"):
        Run.read(tmp_path)


def test_a_key_that_this_version_does_not_know_is_named_with_the_nearest():
    data = RUN.to_dict()
    data["model"]["dimm"] = 3
    with pytest.raises(ConfigError, match=r"no field 'dimm' .did you mean 'dim'"):
        Run.from_dict(data)
    data = RUN.to_dict()
    data["looping"]["kind"] = "cicle"
    with pytest.raises(ConfigError, match=r"no Looping of kind 'cicle' .did you mean 'cycle'"):
        Run.from_dict(data)


def test_each_source_of_chance_follows_the_seed_unless_it_has_its_own():
    run = recurgolf.compose(["experiment=smoke", "seed=5", "seeds.data=9"])
    assert [run.seed_of(purpose) for purpose in ("init", "data", "noise")] == [5, 9, 5]


def test_the_same_seed_builds_the_same_weights():
    first, second = (RUN.build_model().state_dict() for _ in range(2))
    other = recurgolf.compose(["experiment=smoke", "seeds.init=8"]).build_model().state_dict()
    assert all(first[name].equal(second[name]) for name in first)
    assert not first["embed.weight"].equal(other["embed.weight"])


def test_tags_tell_the_kind_of_every_part():
    assert {"looping:cycle", "averaging:none", "data:embedded", "lora:1"} <= set(RUN.tags())


@pytest.mark.parametrize("name", ["", "a/b", "..", "a\tb"])
def test_a_name_is_a_word(name):
    with pytest.raises(ConfigError, match="a word without slashes"):
        recurgolf.compose([f"name='{name}'"])
