"""The code that counts: the source needed to load and score an artifact, packed in one file.

The file is a Python program that carries the modules compressed and runs
`recurgolf.artifact.score`; it works where recurgolf is not installed. Which modules go in follows
from the imports, starting from that module and from the classes that the Run uses.
"""

from __future__ import annotations

import ast
import base64
import dataclasses
import importlib.util
import json
import lzma
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recurgolf.run import Run

ENTRY = "recurgolf.artifact.score"
PACKED_NAME = "score.py"

_STUB = '''"""Scores an artifact: python score.py artifact.bin --data FOLDER [--tokenizer FILE]"""
import base64, importlib, importlib.abc, importlib.util, json, lzma, runpy, sys
BLOB = base64.b85decode({blob!r})
CODE = json.loads(lzma.decompress(BLOB, lzma.FORMAT_RAW, filters={filters}))
class Packed(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    def find_spec(self, name, path=None, target=None):
        if name in CODE:
            return importlib.util.spec_from_loader(name, self, is_package=CODE[name][0])
    def get_source(self, name):
        return CODE[name][1]
    def is_package(self, name):
        return CODE[name][0]
sys.meta_path.insert(0, Packed())
for name in {classes}:
    importlib.import_module(name)
runpy.run_module({entry!r}, run_name="__main__")
'''
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


@dataclasses.dataclass
class PackedCode:
    """The packed program and its sizes in bytes."""

    source: str
    modules: list[str]
    raw_bytes: int

    @property
    def packed_bytes(self) -> int:
        return len(self.source.encode())


def code_of(run: Run) -> PackedCode:
    """Pack what scoring a run's artifact needs."""
    return pack_code([run.model, run.looping, run.lora, run.eval])


def pack_code(parts: Any) -> PackedCode:
    """Pack what scoring a model needs.

    Args:
        parts: option objects (dataclasses, nested) whose classes the artifact names. Where one is
            from a module outside this package, that module goes along.
    """
    # The program imports them first: an option is known once its module has been loaded.
    of_classes = sorted({cls.__module__ for cls in classes_of(parts)})
    names = closure({ENTRY, *of_classes})
    sources = {name: module_source(name) for name in sorted(names)}
    code = {name: [is_package, stripped(text)] for name, (is_package, text) in sources.items()}
    # Packages that nothing is imported from are there, but empty.
    code.update((name, [True, ""]) for name in sorted(parents(names) - names))
    blob = lzma.compress(
        json.dumps(code, separators=(",", ":")).encode(), lzma.FORMAT_RAW, filters=_FILTERS
    )
    source = _STUB.format(
        blob=base64.b85encode(blob).decode(),
        filters=repr(_FILTERS),
        classes=repr(of_classes),
        entry=ENTRY,
    )
    raw = sum(len(text.encode()) for _, text in sources.values())
    return PackedCode(source, list(code), raw)


def classes_of(node: Any) -> Iterator[type]:
    """The dataclasses in an option tree."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        yield type(node)
        for item in dataclasses.fields(node):
            yield from classes_of(getattr(node, item.name))
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from classes_of(item)
    elif isinstance(node, dict):
        for item in node.values():
            yield from classes_of(item)


def closure(names: set[str]) -> set[str]:
    """`names`, and the modules that they import from the same packages, directly or not."""
    found: set[str] = set()
    packages = {name.partition(".")[0] for name in names}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        waiting.extend(imports_of(module_source(name)[1], packages))
    return found


def parents(names: set[str]) -> set[str]:
    """The packages that modules lie in."""
    return {
        ".".join(parts[:n]) for parts in (m.split(".") for m in names) for n in range(1, len(parts))
    }


def imports_of(source: str, packages: Collection[str]) -> Iterator[str]:
    """Modules of certain packages that a source imports (absolutely, as everything here does)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and _package(node.module) in packages:
            module = node.module or ""
            submodules = {alias.name for alias in node.names if _exists(f"{module}.{alias.name}")}
            yield from (f"{module}.{name}" for name in submodules)
            if len(submodules) < len(node.names):
                yield module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if _package(a.name) in packages)


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def module_source(name: str) -> tuple[bool, str]:
    """Whether a module is a package, and its source."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, name
    return spec.submodule_search_locations is not None, Path(spec.origin).read_text()


def stripped(source: str) -> str:
    """The source without comments, docstrings and the annotations of functions."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
            known = node.args
            for argument in (*known.posonlyargs, *known.args, *known.kwonlyargs):
                argument.annotation = None
        if isinstance(node, ast.If) and _is_type_checking(node):
            node.body = [ast.Pass()]
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        kept = [line for line in body if not _is_text(line)]
        node.body = kept or ([ast.Pass()] if body else [])  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_type_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
