"""Packed modules keep what is reached and mean what they meant."""

import ast
import random
import sys
from pathlib import Path

import pytest

import recurgolf
from recurgolf.counted.minify import dense, minified, stripped_tree
from recurgolf.counted.tree_shaking import Shaker, Target

MODULES = sorted(Path(recurgolf.__file__).parent.rglob("*.py"))

FILES = {
    "__init__.py": "from shaken.tools import wanted, unwanted",
    "main.py": """
import math
import json
import shaken.tools
from shaken import wanted
from shaken.tools import Shape, TABLE
from shaken import whole

LIMIT = 3
UNUSED = math.inf

def main(n):
    shape = Shape(n)
    return [wanted(LIMIT), shape.area(), TABLE["a"](n), whole_sum(whole)]

def whole_sum(module):
    return module.one() + module.two()
""",
    "tools.py": """
import os
from json import dumps

def wanted(n):
    return _helper(n) + 1

def unwanted(n):
    return os.getcwd()

def _helper(long_name, other=0):
    another_long_name = [item * 2 for item in range(long_name)]
    return sum(another_long_name) + other

class Base:
    def area(self):
        raise NotImplementedError

class Shape(Base):
    def __init__(self, side):
        self.side = side

    def area(self):
        return self.side ** 2

    def never_called(self):
        return unwanted(1)

def first(n):
    return n + 1

def second(n):
    return dumps(n)

TABLE = {"a": first, "b": second}
""",
    "whole.py": "def one():\n    return 1\n\ndef two():\n    return 2\n",
    "instead.py": "def short(n):\n    return -n\n",
    "never.py": "raise SystemExit",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "shaken"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [m for m in sys.modules if m.partition(".")[0] == "shaken"]:
        del sys.modules[name]


def shaken(**options):
    shaker = Shaker({"shaken"}, **options)
    shaker.reach([Target("shaken.main", "main")])
    return {name: source for name, (_, source) in shaker.result().code.items()}


def test_only_what_is_reached_is_kept(package):
    code = shaken()
    assert "shaken.never" not in code and "shaken.instead" not in code
    for gone in ("UNUSED", "math", "json"):
        assert gone not in code["shaken.main"]
    for gone in ("unwanted", "never_called", "os"):
        assert gone not in code["shaken.tools"].replace("another", "")
    for kept in ("class Base", "def area", "def first", "def second", "_helper"):
        assert kept in code["shaken.tools"]


def test_a_module_that_is_handled_as_a_value_stays_whole(package):
    assert {"def one", "def two"} <= {line[:7] for line in shaken()["shaken.whole"].splitlines()}


def run_packed(code, monkeypatch, tmp_path):
    """The result of main(4) with the packed sources alone."""
    folder = tmp_path / "packed" / "shaken"
    folder.mkdir(parents=True)
    for name, source in code.items():
        file = "__init__" if name == "shaken" else name.partition(".")[2]
        (folder / f"{file}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path / "packed")
    for name in [m for m in sys.modules if m.partition(".")[0] == "shaken"]:
        del sys.modules[name]
    from shaken.main import main  # type: ignore[import-not-found]

    assert str(folder) in sys.modules["shaken.main"].__file__  # type: ignore[operator]
    return main(4)


def test_what_is_kept_gives_the_same_results(package, monkeypatch, tmp_path):
    assert run_packed(shaken(), monkeypatch, tmp_path) == [7, 16, 5, 3]


def test_a_table_keeps_the_entries_that_can_be_asked_for(package, monkeypatch, tmp_path):
    code = shaken(tables={Target("shaken.tools", "TABLE"): {"a"}})
    assert "second" not in code["shaken.tools"] and "dumps" not in code["shaken.tools"]
    assert run_packed(code, monkeypatch, tmp_path) == [7, 16, 5, 3]


def test_another_definition_stands_in_for_a_function_or_a_method(package, monkeypatch, tmp_path):
    other = Target("shaken.instead", "short")
    replaced = {
        Target("shaken.tools", "wanted"): other,
        Target("shaken.tools", "Shape.area"): Target("shaken.instead", "area"),
    }
    with (tmp_path / "shaken" / "instead.py").open("a") as file:
        file.write("def area(self):\n    return 100\n")
    code = shaken(replaced=replaced)
    assert "_helper" not in code["shaken.tools"]
    assert run_packed(code, monkeypatch, tmp_path) == [-3, 100, 5, 3]


def test_a_stand_in_that_is_missing_is_told_when_packing(package):
    missing = {Target("shaken.tools", "wanted"): Target("shaken.instead", "nothing_of_the_kind")}
    with pytest.raises(LookupError, match=r"shaken\.instead has no nothing_of_the_kind"):
        shaken(replaced=missing)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: "/".join(p.parts[-2:]))
def test_dense_source_means_what_it_meant(path):
    text = ast.unparse(minified(path.read_text()))
    assert ast.dump(ast.parse(dense(text))) == ast.dump(ast.parse(text))


def test_short_names_change_no_result():
    source = """
import builtins
total = 5
def outer(first, *rest, key=2):
    total_here, list = first, rest
    def inner(first, value):
        nonlocal_free = [first + v for v in (value, total)]
        return sum(nonlocal_free)
    try:
        found = {name: inner(name, key) for name in range(first)}
        raise ValueError(total_here)
    except ValueError as problem:
        text = str(problem)
    for index, number in enumerate(list):
        found[index] = number + (lambda number: number * key)(index)
    return found, text, f"{total_here=} {key}"
def _private(wide_name, other_name=1):
    wide_name += other_name
    return wide_name
result = [outer(3, 7, 8, key=4), _private(2), _private(2, 3)]
"""
    short = dense(ast.unparse(minified(source)))
    assert "wide_name" not in short and "key" in short
    scopes: list[dict] = [{}, {}]
    for text, scope in zip((source, short), scopes, strict=True):
        exec(text, scope)
    # `=` in an f-string spells a variable's name.
    plain = [str(scope["result"]).replace("total_here=", "=") for scope in scopes]
    assert plain[0].split("=")[0] == plain[1].split("=")[0]
    assert scopes[0]["result"][0][:2] == scopes[1]["result"][0][:2]
    assert scopes[0]["result"][1:] == scopes[1]["result"][1:]


def test_an_option_does_not_refuse_itself_again():
    source = """
class Kind:
    size: int = 0
    def __post_init__(self):
        for name in ("size",):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is too small")
        self.double = 2 * self.size
    def check(self, length):
        if length < self.size:
            raise ConfigError(f"{length} is short of {self.size}")
"""
    scope: dict = {"ConfigError": ValueError}
    exec(ast.unparse(stripped_tree(source)), scope)
    made = scope["Kind"]()
    made.__post_init__()
    assert made.double == 0
    made.size = random.Random(0).randrange(2, 9)
    with pytest.raises(ValueError, match=r"Kind\.check"):
        made.check(1)
