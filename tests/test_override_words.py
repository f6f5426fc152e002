"""Overrides that the grammar cannot read are refused with the override that it can."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from recurgolf.config import ConfigError
from recurgolf.override_errors import check_readable

VALUES = ["a=b.txt", "a#b", "a&b", "a(b", "!x", "é.txt", "a;b", "a{b", "~/d", "a<b", "it's", "a)b"]


def read(override: str):
    return OverridesParser.create().parse_override(override).value()


@pytest.mark.parametrize("value", VALUES)
def test_what_to_write_instead_gives_the_value_that_was_meant(value):
    with pytest.raises(ConfigError) as refused:
        check_readable([f"data.files={value}"])
    message = str(refused.value)
    right = message.partition(" needs quotes: ")[2].partition(" (in a shell ")[0]
    assert read(right) == value
    shell = message.partition(" (in a shell ")[2].removesuffix(")")
    assert shlex.split(shell) == [right]


def test_items_of_a_list_are_quoted_one_by_one():
    with pytest.raises(ConfigError) as refused:
        check_readable(["data.files=[a=1.txt,b.txt,3]"])
    assert "data.files=['a=1.txt',b.txt,3]" in str(refused.value)


@pytest.mark.parametrize(
    ("override", "right"),
    [
        ("eval.passes=[1,2", "eval.passes=[1,2]"),
        ("eval.also=[{kind:sliding}", "eval.also=[{kind:sliding}]"),
        ("x={a:[1,2", "x={a:[1,2"),
    ],
)
def test_a_bracket_that_is_not_closed(override, right):
    with pytest.raises(ConfigError) as refused:
        check_readable([override])
    words = "without ]" if right.endswith("]") else "needs quotes"
    assert words in str(refused.value) and right in str(refused.value)


def test_what_can_be_read_is_left_alone():
    fine = ["x='a=b'", "x=1,2", "x=[1,2]", "x=a b", "~x", "+x.y=1", "x=choice(1,2)", "x="]
    check_readable([*fine, "--config-dir", "a=(b", "--config-dir=a=(b"])
