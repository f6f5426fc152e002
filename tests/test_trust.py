"""Code that a folder or an override names: what is run, and when."""

import json
import sys

import pytest
from command_line import recurgolf
from smoke_runs import small

from recurgolf import compose
from recurgolf.config import ConfigError
from recurgolf.trust import check_trusted


@pytest.fixture
def sent(tmp_path):
    """A folder that somebody sent, with a module beside its run.json."""
    run = compose(small()).to_dict()
    (tmp_path / "run.json").write_text(json.dumps({**run, "plugins": ["sneaky_part"]}))
    (tmp_path / "sneaky_part.py").write_text("open('ran', 'w').close()\n")
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        ["evaluate", "."],
        ["audit", "."],
        ["plan", "."],
        ["pack", ".", "new"],
        ["resume", "."],
        ["export", ".", "new"],
        ["export", "--check", "."],
        ["adapters", "save", ".", "new"],
    ],
    ids=" ".join,
)
def test_no_verb_runs_a_module_of_a_folder_that_was_sent(sent, line):
    if line[0] == "audit":
        (sent / "artifact.bin").touch()
    message = recurgolf(*line, cwd=sent).refused()
    assert "sneaky_part" in message and "--trust" in message
    assert not (sent / "ran").exists()


def test_with_trust_it_is_run(sent):
    recurgolf("plan", ".", "--trust", cwd=sent).finished()
    assert (sent / "ran").exists()


def test_a_part_of_a_package_that_is_installed_elsewhere_is_foreign(tmp_path, monkeypatch):
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "evil.py").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="apart"):
        check_trusted(["apart.evil"], trust=False)
    check_trusted(["numpy.linalg", "json", "sys"], trust=False)
    with pytest.raises(ConfigError, match="a list of names"):
        check_trusted("numpy", trust=False)
    assert "apart.evil" not in sys.modules


@pytest.mark.parametrize("verb", [["plan"], [], ["control"], ["-m"]])
def test_a_plugin_named_by_an_override_is_imported_by_every_path(verb, tmp_path):
    (tmp_path / "my_part.py").write_text("raise SystemExit(77)\n")
    assert recurgolf(*verb, *small("plugins=[my_part]"), cwd=tmp_path).code == 77
    message = recurgolf(*verb, *small("plugins=[my_prat]"), cwd=tmp_path).refused()
    assert "cannot import 'my_prat'" in message


def test_an_option_of_a_plugin_named_by_an_override_can_be_chosen(tmp_path):
    (tmp_path / "my_text_part.py").write_text(
        "from dataclasses import dataclass\nfrom recurgolf.config import option\n"
        "from recurgolf.looping import CycleLooping\n"
        "@option('looping', 'twirl')\n@dataclass\nclass Twirl(CycleLooping):\n    pass\n"
    )
    (tmp_path / "conf" / "looping").mkdir(parents=True)
    (tmp_path / "conf/looping/twirl.yaml").write_text("defaults: [/schema/looping/twirl@_here_]\n")
    line = [*small("plugins=[my_text_part]"), "looping=twirl", "--config-dir", "conf"]
    recurgolf("plan", *line, cwd=tmp_path).finished()
