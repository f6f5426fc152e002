"""The package's own source, for tests of who does what."""

import ast
from collections.abc import Callable
from pathlib import Path

import recurgolf

PACKAGE = Path(recurgolf.__file__).parent


def modules_with(wanted: Callable[[ast.AST], bool]) -> set[str]:
    """Modules that have such a node, by their path in the package."""
    return {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(wanted(node) for node in ast.walk(ast.parse(path.read_text())))
    }
