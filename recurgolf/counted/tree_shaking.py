"""Tree shaking: which definitions of a package a program can reach; the others are left out.

Modules are split into top-level statements. From the names asked for, every name that a kept
statement mentions is followed, through imports into other modules of the same packages.
Definitions, assignments, imports and methods that nothing mentions are dropped; other statements (a
bare call, a try) stay if their module does. The analysis is conservative: a name counts as
mentioned whatever its scope, an attribute whatever object it belongs to, and a module that is used
as a value is kept whole.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from recurgolf.counted.minify import minified
from recurgolf.counted.statements import (
    bound_by,
    facts_of,
    head_of,
    is_wanted,
    text_of,
    text_of_class,
    text_of_import,
)


class Target(NamedTuple):
    """A name in a module; None stands for the module itself."""

    module: str
    name: str | None


@dataclass
class Module:
    """A module's minified statements, indexed by the top-level names that they bind.

    Attributes:
        bodies: statements in order.
        definers: name -> indices of the statements that bind it.
        imports: imported name -> what it refers to in another module of the packages.
        roots: indices of the statements that are kept whenever the module is.
    """

    is_package: bool
    raw: str
    bodies: list[ast.stmt]
    definers: dict[str, list[int]] = field(default_factory=dict)
    imports: dict[str, Target] = field(default_factory=dict)
    roots: list[int] = field(default_factory=list)


@dataclass
class Shaken:
    """The result: module -> (is a package, shaken source), and the size of the original sources."""

    code: dict[str, tuple[bool, str]]
    raw_bytes: int


class Shaker:
    """The search for reachable definitions in one or several packages.

    Args:
        packages: top-level packages to follow; everything else is a library.
        whole: packages whose modules are kept whole (plugins may do anything when imported).
        libraries: library -> our module that is imported in its place.
        replaced: definition (`name`, `Class.method`) -> the stub that replaces it.
        tables: dict literal in a module -> the keys of it that are needed.
        strings: option kinds that the run names by string; see `named_options`.
    """

    def __init__(
        self,
        packages: Collection[str],
        whole: Collection[str] = (),
        libraries: Mapping[str, str] | None = None,
        replaced: Mapping[Target, Target] | None = None,
        tables: Mapping[Target, Collection[str]] | None = None,
        strings: Collection[str] = (),
    ):
        self.packages, self.whole = set(packages), set(whole)
        self.libraries, self.replaced = dict(libraries or {}), dict(replaced or {})
        self.tables, self.strings = dict(tables or {}), set(strings)
        self.modules: dict[str, Module] = {}
        self.kept: dict[str, set[int]] = {}
        self.seen: set[Target] = set()
        self.waiting: list[Target] = []
        self.names: set[str] = set()
        self.methods: dict[str, list[tuple[str, ast.stmt]]] = {}
        self.dropped: set[ast.stmt] = set()

    def reach(self, targets: Iterable[Target]) -> None:
        """Keep these names and everything they mention, recursively."""
        self.waiting.extend(targets)
        while self.waiting:
            target = self.waiting.pop()
            if target not in self.seen:
                self.seen.add(target)
                self._follow(target)

    def result(self) -> Shaken:
        """The sources of everything kept so far, with empty modules for the packages above."""
        code = {
            name: (module.is_package, self._source(name)) for name, module in self.modules.items()
        }
        raw = sum(len(module.raw.encode()) for module in self.modules.values())
        for name in list(code):
            parts = name.split(".")
            for n in range(1, len(parts)):
                code.setdefault(".".join(parts[:n]), (True, ""))
        return Shaken(dict(sorted(code.items())), raw)

    def _load(self, name: str) -> Module:
        if name not in self.modules:
            is_package, raw = module_source(name)
            bodies = [self._changed(name, node) for node in minified(raw).body]
            module = self.modules[name] = Module(is_package, raw, bodies)
            self.kept[name] = set()
            everything = name.partition(".")[0] in self.whole
            for index, node in enumerate(module.bodies):
                self._index(module, index, node, everything)
            for index in module.roots:
                self._keep(name, index)
        return self.modules[name]

    def _index(self, module: Module, index: int, node: ast.stmt, everything: bool) -> None:
        names = list(bound_by(node))
        for name in names:
            module.definers.setdefault(name, []).append(index)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module.imports.update(self._imported(node))
        if everything or not names or not isinstance(node, _REMOVABLE):
            module.roots.append(index)

    def _changed(self, module: str, node: ast.stmt) -> ast.stmt:
        """The statement with libraries replaced and tables reduced to the needed keys."""
        top = (
            node.module.partition(".")[0]
            if isinstance(node, ast.ImportFrom) and node.module
            else ""
        )
        if isinstance(node, ast.ImportFrom) and top in self.libraries:
            return ast.ImportFrom(self.libraries[top], node.names, 0)
        wanted = [self.tables[t] for n in bound_by(node) if (t := Target(module, n)) in self.tables]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and wanted:
            pairs = zip(node.value.keys, node.value.values, strict=True)
            kept = [
                (k, v) for k, v in pairs if isinstance(k, ast.Constant) and k.value in wanted[0]
            ]
            table = ast.Dict([key for key, _ in kept], [value for _, value in kept])
            return ast.fix_missing_locations(ast.Assign(node.targets, table, lineno=1))
        return node

    def _imported(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, Target]]:
        """Names that an import binds, as far as they come from these packages."""
        for alias in node.names:
            bound = alias.asname or alias.name.partition(".")[0]
            if isinstance(node, ast.Import):
                if self._is_ours(alias.name):
                    yield bound, Target(alias.name, None)
            elif node.module and self._is_ours(node.module):
                submodule = f"{node.module}.{alias.name}"
                if exists(submodule):
                    yield bound, Target(submodule, None)
                else:
                    yield bound, Target(node.module, alias.name)

    def _is_ours(self, module: str) -> bool:
        return module.partition(".")[0] in self.packages

    def _follow(self, target: Target) -> None:
        module = self._load(target.module)
        if target in self.replaced:
            self.waiting.append(self.replaced[target])
            return
        if target.name is None:
            return
        indices = module.definers.get(target.name)
        if indices is None:
            if exists(f"{target.module}.{target.name}"):
                self.waiting.append(Target(f"{target.module}.{target.name}", None))
                return
            raise LookupError(f"{target.module} has no {target.name}, which is to be packed")
        for index in indices:
            self._keep(target.module, index)
        if target.name in module.imports:
            self.waiting.append(module.imports[target.name])

    def _keep(self, name: str, index: int) -> None:
        if index in self.kept[name]:
            return
        self.kept[name].add(index)
        node = self.modules[name].bodies[index]
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            self._keep_all(node.module or "")
        # Names of a top-level import are followed from the statements that use them.
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if name.partition(".")[0] in self.whole:
                self.waiting.extend(target for _, target in self._imported(node))
            return
        if isinstance(node, ast.ClassDef) and name.partition(".")[0] not in self.whole:
            self._keep_class(name, node)
        else:
            self._read(name, [node], isinstance(node, (ast.Assign, ast.AnnAssign)))

    def _keep_class(self, name: str, node: ast.ClassDef) -> None:
        """Keep a class with the methods that may be called; the others wait for a mention."""
        inherited = _library_names(name, node.name)
        later: list[ast.FunctionDef] = []
        rest: list[ast.stmt] = []
        for line in node.body:
            if not isinstance(line, ast.FunctionDef):
                rest.append(line)
            elif Target(name, f"{node.name}.{line.name}") in self.replaced:
                self.dropped.add(line)
                self.seen.add(Target(name, f"{node.name}.{line.name}"))
                self.waiting.append(self.replaced[Target(name, f"{node.name}.{line.name}")])
            elif line.name[:2] == "__" or line.name in inherited:
                rest.append(line)
            else:
                later.append(line)
        self._read(name, [*head_of(node), *rest])
        for line in later:
            if line.name in self.names:
                self._read(name, [line])
            else:
                self.dropped.add(line)
                self.methods.setdefault(line.name, []).append((name, line))

    def _read(self, name: str, nodes: Sequence[ast.AST], constant: bool = False) -> None:
        """Follow all names that a kept statement, here in its parts, mentions."""
        module = self.modules[name]
        local = dict(module.imports)
        read = [facts_of(node) for node in nodes]
        for inner in (line for facts in read for line in facts.imports):
            found = dict(self._imported(inner))
            local.update(found)
            self.waiting.extend(found.values())
        found_here = [mention for facts in read for mention in facts.mentions]
        for mention, attribute in found_here:
            if mention in module.definers:
                self.waiting.append(Target(name, mention))
            if mention not in local:
                continue
            target = local[mention]
            self.waiting.append(target)
            if target.name is None and attribute is None:
                self._keep_all(target.module)
            elif target.name is None:
                self.waiting.append(Target(target.module, attribute))
        names = {mention for mention, _ in found_here}
        texts = {text for facts in read for text in facts.texts}
        if "REGISTRY" in names:
            self.strings |= texts
        attributes = {name for facts in read for name in facts.attributes}
        # Strings may be attribute names: next to getattr and the like, and in constants.
        if constant or names & _BY_NAME:
            attributes |= texts
        fresh = attributes - self.names
        self.names |= fresh
        for called in fresh & self.methods.keys():
            for owner, method in self.methods.pop(called):
                self.dropped.discard(method)
                self._read(owner, [method])

    def _keep_all(self, name: str) -> None:
        self.waiting += [Target(name, defined) for defined in self._load(name).definers]

    def _source(self, name: str) -> str:
        module, kept = self.modules[name], self.kept[name]
        mentioned = {
            mention
            for index in kept
            if not isinstance(module.bodies[index], (ast.Import, ast.ImportFrom))
            for part in self._parts_of(module.bodies[index])
            for mention, _ in facts_of(part).mentions
        }
        # Other modules may import from here a name that this module imports itself.
        mentioned |= {target.name for target in self.seen if target.module == name and target.name}
        whole = name.partition(".")[0] in self.whole
        lines: list[str] = []
        for index, node in enumerate(module.bodies):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = tuple(a for a in node.names if whole or is_wanted(node, a, mentioned))
                if names:
                    lines.append(text_of_import(node, names))
            elif isinstance(node, ast.ClassDef):
                if index in kept:
                    lines.append(text_of_class(node, tuple(self._body_of(node))))
            elif index in kept:
                lines.append(text_of(node))
        # At the end, since the stub's module may import from this one.
        for target in sorted(self.seen & self.replaced.keys()):
            if target.module == name:
                lines += map(text_of, _stand_in(target.name or "", self.replaced[target]))
        return "\n".join(lines)

    def _parts_of(self, node: ast.stmt) -> list[ast.AST]:
        """The parts of a statement that are kept."""
        is_class = isinstance(node, ast.ClassDef)
        return [*head_of(node), *self._body_of(node)] if is_class else [node]

    def _body_of(self, node: ast.ClassDef) -> list[ast.stmt]:
        return [line for line in node.body if line not in self.dropped]


_REMOVABLE = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
    ast.Import,
    ast.ImportFrom,
)


_BY_NAME = {"getattr", "setattr", "hasattr", "attrgetter", "methodcaller"}


def named_options(shaker: Shaker, options: Mapping[str, Mapping[str, type]]) -> list[Target]:
    """Registered classes named by string: in the run, or in kept code that uses REGISTRY.

    Classes of modules that are not reached otherwise count only if kept code looks up their group.
    """
    return [
        Target(cls.__module__, cls.__qualname__)
        for group, kinds in options.items()
        for kind, cls in kinds.items()
        if kind in shaker.strings and (cls.__module__ in shaker.modules or group in shaker.strings)
    ]


def _stand_in(name: str, other: Target) -> list[ast.stmt]:
    """Statements that import the stub under the replaced name, or assign it as a method."""
    bound = name.replace(".", "_")
    alias = ast.alias(other.name or "", bound)
    lines: list[ast.stmt] = [ast.ImportFrom(other.module, [alias], 0)]
    return lines if bound == name else [*lines, *ast.parse(f"{name} = {bound}").body]


def _library_names(module: str, name: str) -> set[str]:
    """Attributes of the base classes that come from other packages.

    A library may call such methods although our code never mentions them.
    """
    cls = getattr(importlib.import_module(module), name)
    package = module.partition(".")[0]
    return {
        attribute
        for base in cls.__mro__
        if base.__module__.partition(".")[0] != package and base is not object
        for attribute in dir(base)
    }


def exists(name: str) -> bool:
    """Whether a module of that name exists."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def module_source(name: str) -> tuple[bool, str]:
    """Whether a module is a package, and its source."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, name
    return spec.submodule_search_locations is not None, Path(spec.origin).read_text()
