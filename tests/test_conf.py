"""Every YAML composes by the command in its first lines, and comes back whole from run.json."""

import json
import re
import shlex
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml
from smoke_runs import composed

from recurgolf.cli import conf_folder, register
from recurgolf.config import REGISTRY
from recurgolf.run import Run

CONF = conf_folder()
FILES = sorted(p for p in CONF.rglob("*.yaml") if p.parent != CONF and p.parent.name != "hydra")


def name_of(path: Path) -> str:
    return str(path.relative_to(CONF))


def commands(path: Path) -> list[list[str]]:
    """The commands in the comments at a file's head: for a sweep, its first job."""
    found = []
    for line in re.sub(r"\\\n# *", "", path.read_text()).splitlines():
        match = re.match(r"# +recurgolf( .*)?$", line)
        if match:
            words = shlex.split(re.split(r"\s{2,}\(", match.group(1) or "")[0])
            found.append([first_of_sweep(w) for w in words if w != "-m"])
    return found


def first_of_sweep(word: str) -> str:
    key, _, value = word.partition("=")
    if value[:1] in "[{'\"":
        return word
    return f"{key}={value.removeprefix('range(').partition(',')[0]}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_commands_of_a_file_compose_and_round_trip(path):
    lines = commands(path)
    assert lines, "a YAML begins with the command that uses it: # recurgolf group=option ..."
    option = f"{name_of(path.parent)}={path.stem}"
    if not any(option in line for line in lines):
        lines.append([*lines[0], option])
    for line in lines:
        run = composed(*line)
        again = Run.from_dict(json.loads(json.dumps(run.to_dict())))
        assert again == run
        assert type(again.model) is type(run.model)
        assert again.fingerprint == run.fingerprint


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_says_nothing_that_its_schema_says_already(path):
    content = yaml.safe_load(path.read_text())
    opening = (content.get("defaults") or [""])[0]
    match = re.fullmatch(
        r"/schema/(.+)/([^/]+)@_here_", opening if isinstance(opening, str) else ""
    )
    if path.parent.name == "budget":
        return  # its numbers are what the file is named after
    if match is None:
        assert path.parent.name in ("experiment", "hydra"), "options begin with their schema"
        return
    schema = REGISTRY[match.group(1)][match.group(2)]
    defaults = {f.name: f.default for f in fields(schema) if f.default is not MISSING}
    repeated = {k for k, v in content.items() if k in defaults and v == defaults[k]}
    assert not repeated


def test_every_registered_option_has_a_file_that_uses_it():
    register()
    used = {
        match.groups()
        for path in FILES
        for match in re.finditer(r"/schema/(.+?)/([^/@]+)@_here_", path.read_text())
    }
    # Kinds within a list (rules of a quantiser) are chosen by their `kind`, not by a file.
    for group, kinds in REGISTRY.items():
        if (CONF / group).is_dir():
            assert {(group, kind) for kind in kinds} <= used


CHANGES = {
    "name": "name=other",
    "model": "model.dim=64",
    "looping": "looping.passes=3",
    "lora": "lora.rank=2",
    "optimizer": "optimizer.matrix_lr=0.5",
    "averaging": "averaging=ema",
    "quant": "quant=int8",
    "eval": "eval.keep_tail=true",
    "data": "data.vocab_size=600",
    "trainer": "trainer.steps=21",
    "budget": "budget.artifact_bytes=900_000",
    "artifact": "artifact/codec=zlib",
    "seed": "seed=7",
    "seeds": "seeds.data=7",
}


@pytest.mark.parametrize("part", [f.name for f in fields(Run)])
def test_the_fingerprint_follows_every_part_that_can_change_a_result(part):
    run = composed("experiment=smoke")
    if part == "tracker":
        assert composed("experiment=smoke", "tracker=none").fingerprint == run.fingerprint
    elif part != "plugins":  # whose components are told by their kinds
        changed = composed("experiment=smoke", CHANGES[part])
        assert getattr(changed, part) != getattr(run, part)
        assert changed.fingerprint != run.fingerprint


def test_the_fingerprint_is_the_same_on_every_start():
    run = composed("experiment=smoke")
    assert run.fingerprint == Run.from_dict(run.to_dict()).fingerprint
    shuffled = dict(reversed(run.to_dict().items()))
    assert Run.from_dict(shuffled).fingerprint == run.fingerprint


def test_an_override_reaches_the_run_and_the_rest_stays():
    run, changed = composed("experiment=smoke"), composed("experiment=smoke", "lora.rank=2")
    assert changed.lora.rank == 2
    expected = run.to_dict()
    expected["lora"]["rank"] = 2
    assert changed.to_dict() == expected


def test_no_option_is_named_twice_in_a_file():
    """YAML keeps the last of two equal keys without a word."""

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader, node):
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{loader.name}: {keys}"
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    for path in CONF.rglob("*.yaml"):
        with path.open() as file:
            yaml.load(file, Strict)
