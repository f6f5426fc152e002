"""What `--help`, `--version` and the tab key say."""

import dataclasses
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from command_line import recurgolf

import recurgolf as package
from recurgolf.conf import options
from recurgolf.config import REGISTRY, ConfigError
from recurgolf.help import VERBS, group_help, help_of
from recurgolf.run import Run  # noqa: F401 - fills the registry

OF_FINISHED_RUNS = sorted(VERBS.keys() - {"train", "plan"})


@pytest.mark.parametrize("group", [g for g in options() if not g.startswith("hydra")])
def test_help_of_a_group_has_every_option_and_every_key_of_every_kind_with_its_meaning(group):
    text = group_help(group)
    assert all(f"  {name}" in text for name in options()[group])
    for kind, cls in REGISTRY.get(group, {}).items():
        for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else []:
            assert f"\n  {field.name} " in text, (kind, field.name)
    assert all(len(line) <= 100 for line in text.splitlines())
    keys = text.partition("\nkeys")[2].split("\n  ")[1:]
    heads = [n for n, line in enumerate(keys) if line[:1] != " "]
    for head, following in zip(heads, [*heads, len(keys)][1:], strict=True):
        told = any(re.match(" {6}[^ ]", line) for line in keys[head:following])
        assert told or " see recurgolf --help " in keys[head], keys[head]


@pytest.mark.parametrize("verb", [verb for verb in OF_FINISHED_RUNS if verb != "control"])
def test_help_of_a_verb_says_what_may_be_left_out(verb, tmp_path):
    text = recurgolf(verb, "--help", cwd=tmp_path).finished().out
    assert "default: None" not in text and "%(" not in text
    told = {"sample": ["(default: 0.8)", "(default: a new document)"], "pack": ["(optional)"]}
    assert all(words in text for words in told.get(verb, []))


def test_a_key_has_type_default_and_meaning(tmp_path):
    text = recurgolf("--help", "looping", cwd=tmp_path).finished().out
    told = text.partition("  passes_eval ")[2].splitlines()[:2]
    assert told[0].strip() == "int or null, at least 1; default null"
    assert told[1].strip() == "Passes in scoring; null: as in training."


def test_help_of_a_key_has_that_key_alone_and_of_nothing_names_the_nearest():
    told = help_of("model.rope.base")
    assert "  rope.base " in told and "rope.dims" not in told
    assert "rules.N.bits" in help_of("quant.rules.0.bits") and "  seed " in help_of("seed")
    assert help_of("optimizer.schedule.min_lr").count("  min_lr ") == 2  # of steps and of fraction
    for wrong, right in {"rank": "lora.rank", "loopin": "looping"}.items():
        with pytest.raises(ConfigError, match=right):
            help_of(wrong)


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


def in_zsh(script: str, typed: str, folder: Path) -> str:
    """The command that an interactive zsh runs after a line, a tab and Enter."""
    echo = 'recurgolf() { print -r -- "<<recurgolf $*>>" }'
    setup = f"autoload -Uz compinit; compinit -u -D\n{script}\n{echo}\nprint ready"
    (folder / "script").write_text(setup)
    program = f"""
    zmodload zsh/zpty
    zpty -b shell zsh -f -i
    zpty -w shell {shlex.quote(f"source {folder}/script")}
    zpty -r -m shell seen '*ready*'
    zpty -w -n shell {shlex.quote(typed)}$'\\t\\n'
    zpty -r -m shell seen '*>>*'
    print -r -- "$seen"
    zpty -d shell
    """
    done = subprocess.run(
        ["zsh", "-f", "-c", program], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("<<")[2].partition(">>")[0]


def in_fish(script: str, typed: str, folder: Path) -> str:
    """What fish completes a line to, one candidate a line."""
    (folder / "script").write_text(script)
    program = f"source script; complete -C {shlex.quote(typed)}"
    done = subprocess.run(
        ["fish", "--no-config", "-c", program], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("shell", "completed"), [("zsh", in_zsh), ("fish", in_fish)])
def test_other_shells_complete_verbs_options_keys_and_files(shell, completed, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}: its completion is not tried")
    script = recurgolf("completion", shell, cwd=tmp_path).finished().out
    (tmp_path / "outputs").mkdir()
    for typed, found in {
        "recurgolf samp": "sample",
        "recurgolf -m looping=cy": "looping=cycle",
        "recurgolf experiment=smoke lora.ra": "lora.rank=",
        "recurgolf sample outp": "outputs",
    }.items():
        seen = completed(script, typed, tmp_path)
        assert found in seen, (typed, seen)


def test_another_shell_is_refused(tmp_path):
    assert "one of bash, zsh, fish" in recurgolf("completion", "tcsh", cwd=tmp_path).refused()
