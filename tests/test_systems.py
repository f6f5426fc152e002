"""A system on one page: a block is an option, and the page is the experiment that selects them."""

import pytest
from command_line import recurgolf, recurgolf_process
from smoke_runs import composed

from recurgolf import compose
from recurgolf.conf import SYSTEMS, options
from recurgolf.config import ConfigError

PAGE = """\
# recurgolf experiment=mine
# Two blocks, three times over.
model:
  defaults: [transformer]
  dim: 32
  num_blocks: 2
# Heads of eight.
model/mixer:
  defaults: [attention]
  num_heads: 4
  num_kv_heads: 4
looping:
  defaults: [cycle]
  passes: 3
optimizer/schedule: constant
quant: int8
experiment:
  model: {block_pattern: [block, parallel]}
  trainer: {steps: 7}
"""


@pytest.fixture
def user(tmp_path):
    """A function that writes pages into a user's folder, and returns the folder."""

    def write(**pages):
        (tmp_path / "conf" / SYSTEMS).mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            (tmp_path / "conf" / SYSTEMS / f"{name}.yaml").write_text(text)
        return tmp_path / "conf"

    return write


def test_a_page_of_one_s_own_is_an_experiment_and_an_option_of_each_group(user):
    folder = user(mine=PAGE)
    run = compose(["experiment=mine"], config_dir=folder)
    said = ["model=transformer", "model.dim=32", "model.num_blocks=2", "model/mixer=attention"]
    said += [
        "model.mixer.num_heads=4",
        "model.mixer.num_kv_heads=4",
        "model.block_pattern=[block,parallel]",
    ]
    said += ["looping=cycle", "looping.passes=3"]
    said += ["optimizer/schedule=constant", "quant=int8", "trainer.steps=7", "name=mine"]
    assert run == compose(["~experiment", *said])
    alone = compose(["experiment=smoke", "looping=mine"], config_dir=folder)
    assert alone == composed("experiment=smoke", "looping=cycle", "looping.passes=3")


def test_an_exchanged_part_of_a_page_leaves_nothing_behind(user):
    page = PAGE.replace("  model: {block_pattern: [block, parallel]}\n", "")
    run = compose(["experiment=mine", "model=tiny", "looping=none"], config_dir=user(mine=page))
    plain = compose(["~experiment", "model=tiny", "looping=none"])
    assert (run.model, run.looping) == (plain.model, plain.looping)


def test_a_page_is_known_only_where_its_folder_is_given_and_as_it_stands_now(user):
    folder = user(mine=PAGE)
    assert compose(["experiment=mine"], config_dir=folder).trainer.steps == 7
    with pytest.raises(ConfigError, match="experiment=mine: no such option"):
        compose(["experiment=mine"])
    user(mine=PAGE.replace("steps: 7", "steps: 12"), other="quant: int6\n")
    assert compose(["experiment=mine"], config_dir=folder).trainer.steps == 12
    assert compose(["experiment=other"], config_dir=folder).name == "other"
    assert {"mine", "other"} <= set(options(folder)["experiment"])
    assert "mine" in options(folder)["model/mixer"]
    assert "mine" not in options()["model/mixer"]


def test_a_variant_changes_the_options_of_its_system_and_no_more(user):
    """Of a system's variant, too: the second page changes the block that the first implies."""
    first = "like: universal_rank1_cpu\nmodel/mixer: {num_heads: 8}\nexperiment: {seed: 3}\n"
    second = "like: first\nmodel: {num_blocks: 6}\n"
    folder = user(first=first, second=second)
    run = compose(["experiment=second"], config_dir=folder)
    said = ["model.mixer.num_heads=8", "model.num_blocks=6", "seed=3", "name=second"]
    assert run == compose(["experiment=universal_rank1_cpu", *said])
    plain = compose(["experiment=second", "model=tiny"], config_dir=folder)
    assert plain.model == compose(["experiment=universal_rank1_cpu", "model=tiny"]).model


def test_a_user_s_page_stands_for_the_package_s_of_the_same_name(user):
    folder = user(per_iteration_lora="quant: int8\n")
    assert compose(["experiment=per_iteration_lora"], config_dir=folder).quant.kind == "int8"
    assert "per_iteration_lora" not in options(folder)["looping"]


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("looping: {passes: 3}\n", "looping says no `defaults: [OPTION]`"),
        ("looping: [cycle]\n", "looping: ['cycle'] is neither a block nor an option's name"),
        ("looping: {defaults: [\n", "is not YAML"),
        ("[looping]\n", "a page has one block for each group"),
        ("like: mine\n", "like: mine leads back to itself"),
        ("like: nobody\n", "experiment=nobody: no such option"),
        ("like: universal_rnk1\n", "did you mean 'universal_rank1'?"),
        ("lopping: none\n", "no key or group 'lopping' (did you mean 'looping'?)"),
        ("looping: cycel\n", "looping=cycel: no such option (did you mean 'cycle'?)"),
        ("looping: {defaults: [cycle], passs: 3}\n", "looping has no key 'passs'"),
        ("model/mixer@other: {num_heads: 2}\n", "model/mixer@other says no `defaults: [OPTION]`"),
        ("plugins: [nowhere]\n", "plugins: cannot import 'nowhere'"),
    ],
)
def test_a_page_that_cannot_be_is_refused_with_what_is_wrong(user, page, said):
    with pytest.raises(ConfigError) as refused:
        compose(["experiment=mine"], config_dir=user(mine=page))
    assert said in str(refused.value)


def test_a_page_named_like_a_file_is_refused(user):
    with pytest.raises(ConfigError, match=r"looping=middle is also the file .*middle\.yaml"):
        compose(config_dir=user(middle="looping: {defaults: [cycle]}\n"))


def test_the_command_line_knows_the_options_of_pages(user, tmp_path):
    user(mine=PAGE)
    line = ["--config-dir", "conf", "experiment=mine", "looping=universal_rank1"]
    assert "(0 1)" in recurgolf("plan", *line, "looping=mine", cwd=tmp_path).finished().out
    assert "did you mean 'mine'?" in recurgolf(*line, "looping=min", cwd=tmp_path).refused()
    shown = recurgolf(*line, "--cfg", "job", cwd=tmp_path).finished().out
    assert "num_kv_heads: 4" in shown and "name: mine" in shown


def test_help_lists_the_systems_and_says_what_an_option_is(user, tmp_path):
    user(mine=PAGE)
    whole = recurgolf("--help", "--config-dir", "conf", cwd=tmp_path).finished().out
    (system,) = (line for line in whole.splitlines() if line.startswith("  universal_rank1 "))
    assert {"model,", "model/mixer,", "looping,", "quant"} <= set(system.split())
    assert "  mine " in whole
    mixers = recurgolf("--help", "model/mixer", "--config-dir", "conf", cwd=tmp_path).finished().out
    assert "mine                         Heads of eight\n" in mixers
    assert "attention   " in mixers


def test_tab_completes_the_options_of_pages(tmp_path):
    typed = "recurgolf looping=univ"
    line = {"COMP_LINE": typed, "COMP_POINT": str(len(typed))}
    ended = recurgolf_process("-sc", "query=bash", cwd=tmp_path, env=line).finished()
    assert ended.out.split() == ["looping=universal_rank1"]
