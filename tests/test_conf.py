"""Every YAML composes by the command in its first lines, and comes back whole from run.json."""

import json
import re
import shlex
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import yaml
from smoke_runs import composed

from recurgolf import compose
from recurgolf.composing import register
from recurgolf.conf import SYSTEMS, about, conf_folder, options, system_options
from recurgolf.config import REGISTRY, ConfigError
from recurgolf.eval import PlainEval
from recurgolf.looping import NoLooping
from recurgolf.lora import LoRA
from recurgolf.model.transformer import Model
from recurgolf.optim import AllAdamW, FractionSchedule, NoAveraging
from recurgolf.quant import NoQuant
from recurgolf.run import Run

CONF = conf_folder()
FILES = sorted(p for p in CONF.glob("*/**/*.yaml") if p.relative_to(CONF).parts[0] != "hydra")
PAGES = [path for path in FILES if path.parent.name == SYSTEMS]
OPTIONS = {g: names for g, names in options().items() if g.partition("/")[0] != "hydra"}
EXPERIMENTS = OPTIONS["experiment"]
RECORDED = Path(__file__).parent / "fingerprints.json"
FINGERPRINTS = json.loads(RECORDED.read_text())


def name_of(path: Path) -> str:
    return str(path.relative_to(CONF))


def commands(path: Path) -> list[list[str]]:
    """The commands in the comments at a file's head: for a sweep, its first job."""
    found = []
    for line in re.sub(r"\\\n# *", "", path.read_text()).splitlines():
        match = re.match(r"# +recurgolf( .*)?$", line)
        if match:
            words = shlex.split(re.split(r"\s{2,}\(", match.group(1) or "")[0])
            # Verbs and their folders go; what they change composes alone.
            found.append([first_of_sweep(w) for w in words if "=" in w])
    return found


def first_of_sweep(word: str) -> str:
    key, _, value = word.partition("=")
    if value[:1] in "[{'\"":
        return word
    return f"{key}={value.removeprefix('range(').partition(',')[0]}"


def only_its_option(path: Path) -> bool:
    """Whether a file's command asks for its option alone: exchanging options composes that too."""
    return commands(path) == [[f"{name_of(path.parent)}={path.stem}"]]


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow) if only_its_option(p) else p for p in FILES],
    ids=name_of,
)
def test_the_commands_of_a_file_compose_and_round_trip(path):
    lines = commands(path)
    assert lines, "a YAML begins with the command that uses it: # recurgolf group=option ..."
    group = "experiment" if path in PAGES else name_of(path.parent)
    option = f"{group}={path.stem}"
    if not any(option in line for line in lines):
        lines.append([*lines[0], option])
    for line in lines:
        run = composed(*line)
        again = Run.from_dict(json.loads(json.dumps(run.to_dict())))
        assert again == run
        assert type(again.model) is type(run.model)
        assert again.fingerprint == run.fingerprint


CONTENTS = {
    (name_of(path.parent), path.stem): yaml.safe_load(path.read_text())
    for path in FILES
    if path not in PAGES
} | {(option.group, option.name): option.content for option in system_options()}
# A budget's numbers are what it is named after; an experiment has no schema of its own.
SETTINGS = [key for key in CONTENTS if key[0] not in ("budget", "experiment")]


@pytest.mark.parametrize(("group", "name"), SETTINGS)
def test_an_option_says_nothing_that_its_schema_says_already(group, name):
    content = CONTENTS[group, name]
    opening = content["defaults"][0]
    changes_another = (group, opening) in CONTENTS
    inherited = {}
    while (group, opening) in CONTENTS:
        inherited = {**CONTENTS[group, opening], **inherited}
        opening = CONTENTS[group, opening]["defaults"][0]
    assert not {k for k, v in content.items() if k != "defaults" and inherited.get(k) == v}
    match = re.fullmatch(
        r"/schema/(.+)/([^/]+)@_here_", opening if isinstance(opening, str) else ""
    )
    assert match is not None, "an option begins with its schema, or with the option it changes"
    if changes_another:
        return  # what the schema says may be said again where the changed option says otherwise
    schema = REGISTRY[match.group(1)][match.group(2)]
    defaults = {f.name: f.default for f in fields(schema) if f.default is not MISSING}
    repeated = {k for k, v in content.items() if k in defaults and v == defaults[k]}
    assert not repeated


@pytest.mark.parametrize(("group", "name"), CONTENTS)
def test_a_comment_says_what_an_option_is(group, name):
    assert about(group, name), f"`recurgolf --help {group}` shows it"


def test_every_registered_option_has_a_file_that_uses_it():
    register()
    used = {
        match.groups()
        for content in CONTENTS.values()
        for match in re.finditer(r"/schema/(.+?)/([^/@]+)@_here_", str(content.get("defaults")))
    }
    # Kinds within a list (rules of a quantizer) are chosen by their `kind`, not by a file.
    for group, kinds in REGISTRY.items():
        if (CONF / group).is_dir():
            assert {(group, kind) for kind in kinds} <= used


def test_every_experiment_is_the_recorded_one():
    """Fingerprints move where keys are renamed; then `python tests/test_conf.py` records them."""
    assert {name: composed(f"experiment={name}").fingerprint for name in EXPERIMENTS} == (
        FINGERPRINTS["experiments"]
    )


@pytest.mark.parametrize("line", FINGERPRINTS["exchanges"])
def test_an_exchanged_option_gives_the_recorded_run(line):
    assert compose(shlex.split(line)).fingerprint == FINGERPRINTS["exchanges"][line]


EXCHANGED = [group for group in OPTIONS if group.partition("/")[0] not in ("experiment", "tracker")]


def exchanges(experiment):
    """Options for all groups at once: every experiment meets others, all of them meet several."""
    known = {group: OPTIONS[group] for group in EXCHANGED if group.partition("/")[0] != "data"}
    turns = max(map(len, known.values())) // len(EXPERIMENTS) + 1
    for turn in range(turns):
        number = EXPERIMENTS.index(experiment) * turns + turn
        yield [f"{group}={names[number % len(names)]}" for group, names in known.items()]


def refused_for_its_numbers(message):
    two = re.search(r"\d|'|use one of the two", message)
    return two and not re.search("no key|no such option|no key or", message)


SMALLER = {f"{name}_cpu" for name in EXPERIMENTS} & {*EXPERIMENTS}
"""Systems at a size for processors: what they exchange, those at full size do as well."""


def slowly(experiment: str):
    return pytest.param(experiment, marks=pytest.mark.slow if experiment in SMALLER else [])


@pytest.mark.parametrize("experiment", [slowly(name) for name in EXPERIMENTS])
def test_exchanging_options_never_leaves_a_key_behind(experiment):
    for line in exchanges(experiment):
        try:
            compose([f"experiment={experiment}", *line])
        except ConfigError as error:
            assert refused_for_its_numbers(str(error)), (line, str(error))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_option_can_be_exchanged_alone(experiment):
    for group in EXCHANGED:
        for name in OPTIONS[group]:
            try:
                compose([f"experiment={experiment}", f"{group}={name}"])
            except ConfigError as error:
                assert refused_for_its_numbers(str(error)), (group, name, str(error))


@pytest.mark.parametrize("experiment", [slowly(name) for name in EXPERIMENTS if "_" in name])
def test_an_exchanged_option_keeps_nothing_of_the_one_it_replaces(experiment):
    plain = ["looping=none", "lora=none", "averaging=none", "quant=none", "optimizer=adamw"]
    run = compose(
        [f"experiment={experiment}", *plain, "model=parameter_golf_baseline", "eval=plain"]
    )
    assert run.looping == NoLooping()
    assert run.lora == LoRA()
    assert run.averaging == NoAveraging()
    assert run.quant == NoQuant()
    assert replace(run.optimizer, schedule=FractionSchedule()) == AllAdamW(
        schedule=FractionSchedule()
    )
    expected = Model(vocab_size=run.data.vocab_size, dim=512, num_blocks=9, skips="unet")
    assert run.model == expected
    lengths = {"seq_len": run.eval.seq_len, "batch_tokens": run.eval.batch_tokens}
    assert run.eval == PlainEval(**lengths)


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


if __name__ == "__main__":
    anew = {
        "experiments": {name: compose([f"experiment={name}"]).fingerprint for name in EXPERIMENTS},
        "exchanges": {
            line: compose(shlex.split(line)).fingerprint for line in FINGERPRINTS["exchanges"]
        },
    }
    RECORDED.write_text(json.dumps(anew, indent=1) + "\n")
