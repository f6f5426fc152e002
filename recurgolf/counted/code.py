"""The code that counts: single-file programs that run without this package installed.

`score.py` loads and scores an artifact; `train_gpt.py` also trains, packs and writes one. Each
contains the modules it needs, minified and compressed, as base-122 digits in ASCII source, so that
its size in bytes is the same in whatever encoding it is read. What goes in follows from the entry
point and the classes that the Run uses (see `tree_shaking.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recurgolf.artifact.decode import DECODERS, library
from recurgolf.config import REGISTRY, kind_of
from recurgolf.counted.programs import LIBRARIES, LOADED, replaced
from recurgolf.counted.tree_shaking import Shaken, Shaker, Target, module_source, named_options
from recurgolf.disk import write_file

if TYPE_CHECKING:
    from recurgolf.run import Run

PACKED_NAME = "score.py"
TRAIN_NAME = "train_gpt.py"
COUNTED = {"score": PACKED_NAME, "train": TRAIN_NAME}
"""`artifact.code` -> the program whose size counts."""

SCORE = Target("recurgolf.artifact.score", "main")
TRAIN = Target("recurgolf.standalone.main", "main")
DECODER_TABLE = Target("recurgolf.artifact.decode", "DECODERS")
HEADER = ("brotli", "zlib", "none")
"""Codecs that an artifact's header may use, whatever the codec of its tensors."""

_STUB = '''"""{doc}"""
import brotli, functools, importlib.abc, importlib.util, json, sys
TEXT = "{text}"
SIGNS = {{chr(s): n for n, s in enumerate(s for s in range(1, 128) if s not in {unused})}}
def part(i):
    digits = TEXT[i:i + {digits}]
    return functools.reduce(lambda n, s: n * {base} + SIGNS[s], digits, 0).to_bytes({block}, "big")
BLOB = b"".join(map(part, range(0, len(TEXT), {digits})))
BOOT, HEAD, *SOURCES = brotli.decompress(BLOB[:{size}]).decode().split("\\0")
exec(BOOT)
'''
_BOOT = """
MODULES, ARGUMENTS = json.loads(HEAD)
CODE = dict(zip(MODULES, SOURCES))
class Packed(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
 def find_spec(self, name, path=None, target=None):
  if name in CODE:
   return importlib.util.spec_from_loader(name, self, is_package=self.is_package(name))
 def get_source(self, name):
  return CODE[name]
 def is_package(self, name):
  return MODULES[name] % 2
sys.meta_path.insert(0, Packed())
for name in CODE:
 if MODULES[name] > 1:
  importlib.import_module(name)
if __name__ == "__main__":
 importlib.import_module({entry!r}).main(*ARGUMENTS)
"""
"""Compressed together with the modules: makes them importable, then calls the entry point."""
_UNUSED = (10, 13, 26, 34, 92)
"""ASCII that is not safe inside a quoted string: line ends, ^Z, quote, backslash."""
_SIGNS = "".join(chr(n) for n in range(1, 128) if n not in _UNUSED)
_BLOCK = 128
_DIGITS = math.ceil(8 * _BLOCK / math.log2(len(_SIGNS)))
_SCORE_DOC = "Scores an artifact: python score.py artifact.bin --data FOLDER [--tokenizer FILE]"
_TRAIN_DOC = "Trains {name}; --evaluate scores the artifact beside it; --help says the rest."


@dataclasses.dataclass(frozen=True)
class PackedCode:
    """A packed program.

    Attributes:
        source: the program, in ASCII.
        modules: names of the modules in it.
        raw_bytes: size of their original sources.
        libraries: third-party modules that it imports, at the start or when needed.
    """

    source: str
    modules: list[str]
    raw_bytes: int
    libraries: list[str] = dataclasses.field(default_factory=list)

    @property
    def packed_bytes(self) -> int:
        return len(self.source.encode())


class Codes:
    """The programs of a Run, packed when they are asked for; `artifact.code` says which counts."""

    def __init__(self, run: Run):
        self.run = run
        self.counted_name = COUNTED[run.artifact.code]

    @cached_property
    def score(self) -> PackedCode:
        return code_of(self.run)

    @cached_property
    def train(self) -> PackedCode:
        return training_code_of(self.run, self.score)

    @property
    def counted(self) -> PackedCode:
        return self.train if self.counted_name == TRAIN_NAME else self.score

    def write(self, folder: Path) -> None:
        """Write score.py, and the program that counts if that is another one."""
        write_file(folder / PACKED_NAME, self.score.source)
        write_file(folder / self.counted_name, self.counted.source)

    def to_json(self) -> dict[str, Any]:
        """The entry `code` of ledger.json: sizes of both programs, and which one counts."""
        files = {PACKED_NAME: self.score, TRAIN_NAME: self.train}
        return {
            "counted": f"{self.counted_name}, packed",
            "packed": self.counted.packed_bytes,
            "raw": self.counted.raw_bytes,
            "files": {
                name: {"packed": code.packed_bytes, "raw": code.raw_bytes}
                for name, code in files.items()
            },
            "modules": self.counted.modules,
        }


def code_of(run: Run) -> PackedCode:
    """Pack the program that scores a run's artifact."""
    parts = [run.model, run.looping, run.lora, run.eval.alone]
    return pack_code(parts, without=LOADED, codec=run.artifact.codec)


def training_code_of(run: Run, score: PackedCode | None = None) -> PackedCode:
    """Pack the program that trains this Run, writes its artifact and scores it.

    It has no tracker and only writes the local record.
    """
    from recurgolf.tracker import NoTracking

    alone = dataclasses.replace(run, tracker=NoTracking(), plugins=[])
    doc = _TRAIN_DOC.format(name=run.name)
    counted = None if run.artifact.code == "train" else score or code_of(run)

    def arguments(raw_bytes: int) -> list[Any]:
        # The code size that the run's bytes include; the program measures its own size itself.
        size = {"name": TRAIN_NAME, "packed": None, "raw": raw_bytes}
        if counted is not None:
            size = {"name": PACKED_NAME, "packed": counted.packed_bytes, "raw": counted.raw_bytes}
        return [without_defaults(alone), size]

    return pack_code(alone, TRAIN, doc, arguments, replaced(run), run.artifact.codec)


def pack_code(
    parts: Any,
    entry: Target = SCORE,
    doc: str = _SCORE_DOC,
    arguments: Callable[[int], Sequence[Any]] = lambda raw_bytes: (),
    without: Mapping[Target, Target] | None = None,
    codec: Any = None,
) -> PackedCode:
    """Pack a program.

    Args:
        parts: option objects (nested dataclasses) whose classes it must find by kind. A class from
            outside this package brings its whole module along.
        entry: the function that the program calls.
        arguments: from the program's raw bytes to the JSON-ready arguments of that function.
        without: definitions and the stubs that replace them.
        codec: of the artifact that it reads; None: any.
    """
    classes = {Target(cls.__module__, cls.__qualname__) for cls in classes_of(parts)}
    kinds = set() if codec is None else {kind_of(codec), *texts_of(codec)}
    # A decoder from another module than the table registers itself when imported.
    classes |= {
        Target(decoder.__module__, decoder.__qualname__)
        for decoder in map(DECODERS.get, kinds)
        if decoder is not None and decoder.__module__ != DECODER_TABLE.module
    }
    options = frozenset(
        (group, kind, Target(cls.__module__, cls.__qualname__))
        for group, known in REGISTRY.items()
        for kind, cls in known.items()
    )
    named = {name for group, kind, _ in options for name in (group, kind)}
    needs = _Needs(
        entry,
        frozenset(classes),
        frozenset((without or {}).items()),
        frozenset({*kinds, *HEADER} if kinds else ()),
        frozenset(named & set(texts_of(parts))),
        options,
    )
    packages = needs.packages
    # Modules of plugins may be edited and reloaded while this process lives: no cache for them.
    shake = _shaken if packages == {"recurgolf"} else _shaken.__wrapped__
    shaken, at_once = shake(needs, _state_of_sources())
    # Bit 1: import at the start, so that its options register; bit 0: a package.
    marks = {name: package + 2 * (name in at_once) for name, (package, _) in shaken.code.items()}
    head = json.dumps([marks, list(arguments(shaken.raw_bytes))], separators=(",", ":"))
    boot = _BOOT.format(entry=entry.module)
    text = "\0".join([boot, head, *(source for _, source in shaken.code.values())])
    blob = _compressed(text)
    source = _STUB.format(
        doc=doc,
        text=_as_text(blob),
        unused=_UNUSED,
        base=len(_SIGNS),
        digits=_DIGITS,
        block=_BLOCK,
        size=len(blob),
    )
    used = {name for _, text in shaken.code.values() for name in libraries_of(text)}
    libraries = sorted({"brotli", *used} - packages - set(sys.stdlib_module_names))
    return PackedCode(source, list(shaken.code), shaken.raw_bytes, libraries)


# 0.1 s, and a run needs the same program before it starts and at its end.
@functools.lru_cache(maxsize=4)
def _compressed(text: str) -> bytes:
    return library("brotli", "brotli").compress(text.encode(), quality=11, lgwin=22)


class _Needs(NamedTuple):
    """Everything that determines which code goes into a program: the cache key.

    Attributes:
        decoded: codecs whose decoders are included; empty: all.
        strings: names of groups and kinds that occur as strings in the run.
        options: group, kind and class of every registered option.
    """

    entry: Target
    classes: frozenset[Target]
    without: frozenset[tuple[Target, Target]]
    decoded: frozenset[str]
    strings: frozenset[str]
    options: frozenset[tuple[str, str, Target]]

    @property
    def packages(self) -> set[str]:
        return {target.module.partition(".")[0] for target in {self.entry, *self.classes}}


# 0.5 s, and a run needs it three times: before it starts, for its plan, and at its end.
@functools.lru_cache(maxsize=16)
def _shaken(needs: _Needs, sources: int) -> tuple[Shaken, set[str]]:
    """The code of a program, and the modules that it imports at the start.

    Args:
        sources: `_state_of_sources()`, so that edits invalidate the cache.
    """
    classes, packages = set(needs.classes), needs.packages
    shaker = Shaker(
        packages,
        whole=packages - {"recurgolf"},
        libraries=LIBRARIES,
        replaced=dict(needs.without),
        tables={DECODER_TABLE: needs.decoded} if needs.decoded else {},
        strings=needs.strings,
    )
    shaker.reach({needs.entry, *classes})
    # Options that kept code names as strings bring in code that may name more.
    while True:
        named = set(named_options(shaker, REGISTRY)) - shaker.seen
        if not named:
            break
        classes |= named
        shaker.reach(named)
    return shaker.result(), {target.module for target in classes}


def _state_of_sources() -> int:
    """A hash that changes when a file of this package is written."""
    files = Path(__file__).parents[1].rglob("*.py")
    return hash(frozenset((str(path), path.stat().st_mtime_ns) for path in files))


def _as_text(blob: bytes) -> str:
    """Base-122 digits of the bytes, block by block; the last block is padded with zeros."""
    text = []
    for start in range(0, len(blob), _BLOCK):
        number = int.from_bytes(blob[start : start + _BLOCK].ljust(_BLOCK, b"\0"), "big")
        digits = []
        for _ in range(_DIGITS):
            number, digit = divmod(number, len(_SIGNS))
            digits.append(_SIGNS[digit])
        text.append("".join(reversed(digits)))
    return "".join(text)


def libraries_of(source: str) -> set[str]:
    """Top-level modules that a packed source imports, also through `decode.library`."""
    return set(_IMPORT.findall(source)) | set(_LIBRARY.findall(source))


_IMPORT = re.compile(r"^ *(?:from|import) (\w+)", re.MULTILINE)
_LIBRARY = re.compile(r"\blibrary\(['\"](\w+)")


def write_readable(code: PackedCode, folder: Path) -> None:
    """Write the original sources of a program's modules below a folder."""
    for name in code.modules:
        is_package, text = module_source(name)
        path = folder.joinpath(*name.split("."))
        path = path / "__init__.py" if is_package else path.with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)


def without_defaults(node: Any) -> Any:
    """`config.to_dict` without fields that have their default value."""
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        if isinstance(node, dict):
            return {key: without_defaults(item) for key, item in node.items()}
        return [without_defaults(item) for item in node] if isinstance(node, list) else node
    found = {"kind": kind_of(node)} if hasattr(type(node), "kind") else {}
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        usual = item.default
        if item.default_factory is not dataclasses.MISSING:
            usual = item.default_factory()
        if type(value) is not type(usual) or value != usual:
            found[item.name] = without_defaults(value)
    return found


def classes_of(node: Any) -> Iterator[type]:
    """Types of the dataclasses in an option tree."""
    for item in _nodes(node):
        if dataclasses.is_dataclass(item):
            yield type(item)


def texts_of(node: Any) -> Iterator[str]:
    """Strings in an option tree: some name a clip or a method."""
    yield from (item for item in _nodes(node) if isinstance(item, str))


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        for item in dataclasses.fields(node):
            yield from _nodes(getattr(node, item.name))
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from _nodes(item)
    elif isinstance(node, Mapping):
        for item in node.values():
            yield from _nodes(item)
