"""What `--help`, `--version` and the tab key say."""

import dataclasses
import shutil
import subprocess
import time

import pytest
from command_line import recurgolf

import recurgolf as package
from recurgolf.conf import options
from recurgolf.config import REGISTRY
from recurgolf.help import VERBS, group_help
from recurgolf.run import Run  # noqa: F401 - fills the registry
from recurgolf.verbs import MODULES


def test_every_verb_has_a_module_and_a_line():
    assert set(VERBS) == {*MODULES, "train", "plan"}


@pytest.mark.parametrize("group", [g for g in options() if not g.startswith("hydra")])
def test_help_of_a_group_has_every_option_and_every_key_of_every_kind(group):
    text = group_help(group)
    assert all(f"  {name}" in text for name in options()[group])
    for kind, cls in REGISTRY.get(group, {}).items():
        for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else []:
            assert f"\n  {field.name} " in text, (kind, field.name)
    assert all(len(line) <= 100 for line in text.splitlines() if line[:8].isspace())


def test_a_key_has_type_default_and_meaning(tmp_path):
    text = recurgolf("--help", "looping", cwd=tmp_path).finished().out
    told = text.partition("  passes_eval ")[2].splitlines()[:2]
    assert told[0].strip() == "int or null, at least 1; default null"
    assert told[1].strip() == "How often when scoring; null: as in training."


def test_the_version_is_ours(tmp_path):
    assert recurgolf("--version", cwd=tmp_path).finished().out == (
        f"recurgolf {package.__version__}\n"
    )


def completed(script: str, line: str) -> list[str]:
    """What bash offers behind a line."""
    program = f"""{script}
COMP_LINE={line!r} COMP_POINT={len(line)}
_recurgolf
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", program], capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return done.stdout.split()


def test_bash_completes_verbs_options_and_keys_in_a_moment(tmp_path):
    script = recurgolf("completion", "bash", cwd=tmp_path).finished().out
    assert completed(script, "recurgolf samp") == ["sample"]
    # Bash takes what stands behind = for a word of its own.
    assert completed(script, "recurgolf -m looping=cy") == ["cycle"]
    assert completed(script, "recurgolf artifact/cod") != []
    assert "lora.rank=" in completed(script, "recurgolf lora.")
    began = time.monotonic()
    completed(script, "recurgolf ")
    assert time.monotonic() - began < 0.4


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_of_other_shells_have_the_words_and_are_read_where_there_is_one(shell, tmp_path):
    script = recurgolf("completion", shell, cwd=tmp_path).finished().out
    assert "looping=cycle" in script and "sample" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_another_shell_is_refused(tmp_path):
    assert "one of bash, zsh, fish" in recurgolf("completion", "tcsh", cwd=tmp_path).refused()
