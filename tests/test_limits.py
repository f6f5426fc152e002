"""Every limit that an option declares is kept: one step beyond is refused in the same words."""

import dataclasses
import math
import typing

import pytest

import recurgolf.run
from recurgolf import compose
from recurgolf.config import REGISTRY, ConfigError
from recurgolf.eval import Eval
from recurgolf.limits import Choice, NotEmpty, Range, limits_of
from recurgolf.looping import CycleLooping


def option_classes():
    """Registered dataclasses and those that their fields hold, each with its place."""
    found = {}
    for group, kinds in REGISTRY.items():
        for cls in filter(dataclasses.is_dataclass, kinds.values()):
            found[cls] = group.replace("/", ".")
    waiting = [*found, recurgolf.run.Run]
    while waiting:
        for hint in typing.get_type_hints(waiting.pop()).values():
            for inner in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(inner) and inner not in found:
                    found[inner] = ""
                    waiting.append(inner)
    return found


PLACES = option_classes()
LIMITS = [
    (cls, name, limit)
    for cls in PLACES
    for name, limits in limits_of(cls).items()
    for limit in limits
]


def named(value):
    return value.__name__ if isinstance(value, type) else str(value)


def is_whole(cls, name):
    return "int" in str(typing.get_type_hints(cls)[name])


def is_list(cls, name):
    return typing.get_origin(typing.get_type_hints(cls)[name]) is list


def beside(end, step, whole):
    """The next number below (-1) or above (1) one."""
    return end + step if whole else math.nextafter(end, step * math.inf)


def samples(cls, name, limit):
    """Values just within a limit, and just beyond it."""
    if isinstance(limit, NotEmpty):
        return ([], [[]]) if is_list(cls, name) else (["x"], [""])
    if isinstance(limit, Choice):
        return [*limit.words], ["", limit.words[0] + "_"]
    assert isinstance(limit, Range)
    whole, within, beyond = is_whole(cls, name), [], [math.inf, math.nan]
    for end, is_out, step in (
        (limit.low, limit.low_is_out, -1),
        (limit.high, limit.high_is_out, 1),
    ):
        if math.isfinite(end):
            within.append(beside(end, -step, whole) if is_out else end)
            beyond.append(end if is_out else beside(end, step, whole))
    return within, beyond


def test_most_options_declare_limits():
    """The tests below look at all there are; here it is said that this is not nothing."""
    assert len(LIMITS) > 150
    assert {"passes", "phases", "targets"} <= {name for _, name, _ in LIMITS}


@pytest.mark.parametrize(("cls", "name", "limit"), LIMITS, ids=named)
def test_a_value_just_beyond_is_refused_with_key_value_and_rule(cls, name, limit):
    key = f"{PLACES[cls]}.{name}" if PLACES[cls] else name
    for value in samples(cls, name, limit)[1]:
        several = is_list(cls, name) and not isinstance(limit, NotEmpty)
        given = [value] if several else value
        with pytest.raises(ConfigError) as refused:
            cls(**{name: given})
        said = str(refused.value)
        assert said.startswith(f"{key}={given!r}: {'each ' if several else ''}{limit}")


@pytest.mark.parametrize(("cls", "name", "limit"), LIMITS, ids=named)
def test_a_value_just_within_is_taken(cls, name, limit):
    for value in samples(cls, name, limit)[0]:
        given = [value] if is_list(cls, name) else value
        try:
            assert getattr(cls(**{name: given}), name) == given
        except ConfigError as error:  # another field or limit forbids it
            assert f"{name}={given!r}: {limit}" not in str(error)


def test_a_near_word_is_suggested():
    with pytest.raises(ConfigError) as refused:
        compose(["eval=early_exit", "looping=cycle", "eval.measure=tob"])
    assert str(refused.value) == "eval.measure='tob': kl or top (did you mean 'top'?)"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("looping=cycle looping.passes=0", "looping.passes=0: at least 1"),
        ("quant.rules.1.bits=9", "quant.rules.1.bits=9: from 1 to 8"),
        ("quant.qat.snap.strength=1.5", "quant.qat.snap.strength=1.5: from 0 to 1"),
        ("eval=ttt_sgd eval.sgd.momentum=1", "eval.sgd.momentum=1.0: from 0 to below 1"),
        ("artifact.codec.quality=12", "artifact.codec.quality=12: from 0 to 11"),
        (
            "model/mixer=attention model.mixer.num_heads=0",
            "model.mixer.num_heads=0: at least 1",
        ),
        (
            "budget=track_10min_16mb budget.caps.evaluation.phases=[evaluaton]",
            "budget.caps.evaluation.phases=['evaluaton']: each one of setup, warmup, training, "
            "checkpoint, validation, calibration, quantization, packing, evaluation, base "
            "(did you mean 'evaluation'?)",
        ),
    ],
)
def test_the_key_is_the_one_to_write(overrides, said):
    with pytest.raises(ConfigError) as refused:
        compose(overrides.split())
    assert str(refused.value) == said


def test_a_subclass_that_changes_a_default_keeps_the_limits():
    @dataclasses.dataclass
    class Thrice(CycleLooping):
        passes: int = 3

    assert Thrice().passes == 3
    with pytest.raises(ConfigError, match="passes=0: at least 1"):
        Thrice(passes=0)


def test_null_passes_where_the_type_allows_it():
    assert Eval(seq_len=None).seq_len is None
