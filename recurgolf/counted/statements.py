"""What a statement says, and how it is written, found once for all programs of a process.

Modules are minified once, and the same statements stand in every program; so what is cached here is
cached by the statement itself.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from typing import NamedTuple

from recurgolf.counted.minify import dense


class Facts(NamedTuple):
    """What a statement says.

    Attributes:
        imports: the imports inside of it.
        mentions: names that it reads, each with the attribute accessed on it, or None.
        attributes: names of attributes, whatever object they belong to.
        texts: its string constants.
    """

    imports: list[ast.Import | ast.ImportFrom]
    mentions: list[tuple[str, str | None]]
    attributes: set[str]
    texts: set[str]


@functools.cache
def facts_of(node: ast.AST) -> Facts:
    """Read a statement, or a part of one."""
    facts = Facts([], [], set(), set())
    bases: set[ast.AST] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute):
            facts.attributes.add(inner.attr)
            if isinstance(inner.value, ast.Name):
                bases.add(inner.value)
                facts.mentions.append((inner.value.id, inner.attr))
        elif isinstance(inner, ast.Name) and inner not in bases:
            facts.mentions.append((inner.id, None))
        elif isinstance(inner, (ast.Import, ast.ImportFrom)):
            facts.imports.append(inner)
        elif isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            facts.texts.add(inner.value)
    return facts


def head_of(node: ast.ClassDef) -> list[ast.AST]:
    """All of a class but its body."""
    return [*node.decorator_list, *node.bases, *node.keywords]


def bound_by(node: ast.stmt) -> Iterator[str]:
    """Top-level names that a statement binds."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        if not (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        # Assignments to an item or attribute bind no name and are kept with the module.
        if all(isinstance(target, (ast.Name, ast.Tuple)) for target in targets):
            for target in targets:
                yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))
    else:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                yield inner.id
            elif isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
                yield inner.name
            elif isinstance(inner, (ast.Import, ast.ImportFrom)):
                yield from (alias.asname or alias.name.partition(".")[0] for alias in inner.names)


def is_wanted(node: ast.Import | ast.ImportFrom, alias: ast.alias, mentioned: set[str]) -> bool:
    """Whether an import's name is needed, by the names that the module mentions."""
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return True
    return alias.name == "*" or (alias.asname or alias.name.partition(".")[0]) in mentioned


@functools.cache
def text_of(node: ast.stmt) -> str:
    """A statement, minified."""
    return _written(node)


@functools.cache
def text_of_class(node: ast.ClassDef, body: tuple[ast.stmt, ...]) -> str:
    """A class with these of its statements."""
    lines = list(body) or [ast.Pass()]
    return _written(ast.ClassDef(node.name, node.bases, node.keywords, lines, node.decorator_list))


@functools.cache
def text_of_import(node: ast.Import | ast.ImportFrom, names: tuple[ast.alias, ...]) -> str:
    """An import of these names of it."""
    own = list(names)
    alone = isinstance(node, ast.Import)
    return _written(ast.Import(own) if alone else ast.ImportFrom(node.module, own, node.level))


def _written(node: ast.stmt) -> str:
    return dense(ast.unparse(node))
