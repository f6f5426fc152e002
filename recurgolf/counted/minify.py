"""Minify source code without changing what it does.

Removed are docstrings, comments, unused annotations, whitespace and long names of local variables;
also the checks that options make of themselves, since the options of a packed program were checked
when it was packed. Checks of data stay, but without their messages.
"""

from __future__ import annotations

import ast
import builtins
import functools
import io
import re
import string
import tokenize
from collections.abc import Iterator
from itertools import count


def stripped(source: str) -> str:
    """The source without comments, docstrings, and annotations of functions and variables."""
    return ast.unparse(stripped_tree(source))


def stripped_tree(source: str) -> ast.Module:
    """`stripped` as a syntax tree."""
    return _Stripper().visit(ast.parse(source))


def dense(source: str) -> str:
    """The source indented by one space per level, with spaces only where tokens would merge.

    Returned unchanged if it has multi-line strings, whose content must not be touched.
    """
    out, end, before = [], (1, 0), ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.NL):
            continue
        if token.end[0] > token.start[0] and token.type != tokenize.NEWLINE:
            return source
        word = token.string
        if token.start[0] != end[0]:
            out.append(" " * (token.start[1] // 4) if token.type != tokenize.NEWLINE else "")
        elif token.start[1] > end[1] and _is_word(before[-1:]) and _is_word(word[:1]):
            out.append(" ")
        out.append(word)
        end, before = token.end, word
    return re.sub(r"\n\n+", "\n", "".join(out))


def _is_word(letter: str) -> bool:
    # A word directly before a quote would be read as a string prefix.
    return letter.isalnum() or letter in "_\"'"


class _Stripper(ast.NodeTransformer):
    """Class fields keep their annotations, which dataclasses read."""

    def __init__(self) -> None:
        self.in_class = self.checks_itself = False
        self.where: list[str] = []

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._inside(node, True)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        call = node.exc
        checking = len(self.where) == 2 and _is_check(self.where[1])
        if checking and isinstance(call, ast.Call) and ast.unparse(call.func) == "ConfigError":
            call.args = [ast.Constant(".".join(self.where))]
            node.cause = None
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        node.returns = None
        known = node.args
        for argument in (*known.posonlyargs, *known.args, *known.kwonlyargs):
            argument.annotation = None
        for several in (known.vararg, known.kwarg):
            if several is not None:
                several.annotation = None
        before = self.checks_itself
        alone = len(known.posonlyargs + known.args + known.kwonlyargs) == 1
        self.checks_itself = self.in_class and _is_check(node.name) and alone
        try:
            done = self._inside(node, False)
        finally:
            self.checks_itself = before
        return None if self.in_class and _only_calls_super(node) else done

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if self.in_class:
            node.annotation = _without_limits(node.annotation)
            return self.generic_visit(node)
        if node.value is None:
            return None
        plain = ast.Assign([node.target], node.value)
        return ast.copy_location(self.generic_visit(plain), node)

    def visit_For(self, node: ast.For) -> ast.AST | None:
        self.generic_visit(node)
        empty = all(isinstance(line, ast.Pass) for line in node.body)
        return None if self.checks_itself and empty and not node.orelse else node

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt] | None:
        if self.checks_itself and not node.orelse and all(map(_refuses, node.body)):
            return None
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            kept = [self.visit(line) for line in node.orelse]
            return kept or None
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        had_body = isinstance(getattr(node, "body", None), list) and not isinstance(
            node, ast.Module
        )
        super().generic_visit(node)
        if had_body and not node.body:  # type: ignore[attr-defined]
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node

    def _inside(self, node: ast.ClassDef | ast.FunctionDef, in_class: bool) -> ast.AST:
        before, self.in_class = self.in_class, in_class
        self.where.append(node.name)
        try:
            return self.generic_visit(node)
        finally:
            self.in_class = before
            self.where.pop()


def _is_check(method: str) -> bool:
    return method in ("__post_init__", "check") or method.startswith("_check_")


def _only_calls_super(method: ast.FunctionDef) -> bool:
    """Whether all that is left of a check is the call of its base class's."""
    given = ", ".join(argument.arg for argument in method.args.args[1:])
    inherited = f"super().{method.name}({given})"
    return _is_check(method.name) and [ast.unparse(line) for line in method.body] == [inherited]


def _without_limits(annotation: ast.expr) -> ast.expr:
    """`Annotated[int, at_least(1)]` as `int`."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        assert isinstance(annotation.slice, ast.Tuple)
        return annotation.slice.elts[0]
    return annotation


def _refuses(node: ast.stmt) -> bool:
    call = node.exc if isinstance(node, ast.Raise) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func) == "ConfigError"


@functools.cache
def minified(source: str) -> ast.Module:
    """The minified source as a syntax tree, which is cached: do not modify it."""
    return shortened(stripped_tree(source))


def shortened(tree: ast.Module) -> ast.Module:
    """The module with short names for local variables.

    Parameters keep their names, since callers may pass them by keyword, except in private functions
    whose parameters no call in the module names. Names that also exist in the module or among the
    builtins are kept, so that no name changes its meaning.
    """
    written = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    outside = {n for line in tree.body for n in _top_names(line)} | set(dir(builtins))
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in members:
            if isinstance(function, ast.FunctionDef):
                _shorten(function, outside, written)
    return tree


_OPAQUE = (ast.ClassDef, ast.Match, ast.Global, ast.Nonlocal, ast.AsyncFunctionDef)
_REFLECTIVE = {"locals", "vars", "eval", "exec", "globals", "dir"}


def _shorten(function: ast.FunctionDef, outside: set[str], written: set[str | None]) -> None:
    nodes = list(ast.walk(function))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    if any(isinstance(node, _OPAQUE) for node in nodes) or used & _REFLECTIVE:
        return
    fixed = set(outside)
    stored: dict[str, None] = {}
    own: set[int] = set()
    if function.name[:1] == "_" and function.name[:2] != "__" and not function.decorator_list:
        own = {id(node) for node in (*function.args.posonlyargs, *function.args.args)}
    for node in nodes:
        if isinstance(node, ast.arg) and id(node) in own and node.arg not in written:
            stored.setdefault(node.arg)
        elif isinstance(node, ast.arg):
            fixed.add(node.arg)
        elif isinstance(node, ast.FunctionDef):
            fixed.add(node.name)
        elif isinstance(node, ast.alias):
            fixed.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stored.setdefault(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            stored.setdefault(node.name)
    taken = used | fixed
    fresh = (name for name in _letters() if name not in taken)
    renamed = {name: next(fresh) for name in stored if name not in fixed and len(name) > 1}
    for node in nodes:
        if isinstance(node, ast.Name):
            node.id = renamed.get(node.id, node.id)
        elif isinstance(node, ast.arg) and id(node) in own:
            node.arg = renamed.get(node.arg, node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            node.name = renamed.get(node.name, node.name)


def _letters() -> Iterator[str]:
    """a to z, then a1, b1, …"""
    for turn in count():
        yield from (letter + (str(turn) if turn else "") for letter in string.ascii_lowercase)


def _top_names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
        return
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            yield inner.id
        elif isinstance(inner, ast.alias):
            yield (inner.asname or inner.name).partition(".")[0]
        elif isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
            yield inner.name
