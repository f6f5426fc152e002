"""Verbs that work on what is finished: one module each, with `main(arguments) -> exit code`."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any


def run(verb: str, arguments: Sequence[str]) -> int:
    """Carry out a verb, whose module is imported only now; the exit code."""
    name = "import_checkpoint" if verb == "import" else verb
    return import_module(f"recurgolf.verbs.{name}").main(arguments)


class Help(argparse.HelpFormatter):
    """Says of everything that may be left out what stands there then, or that it is optional.

    Paragraphs are filled; indented ones, such as commands, stay as they are.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part if part.startswith(" ") else super(Help, self)._fill_text(part, width, indent)
            for part in text.strip("\n").split("\n\n")
        )

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "default" in text:
            return text
        # parse_intermixed_args puts the positionals' nargs aside while it reads the options.
        nargs = vars(action).get("save_nargs", action.nargs)
        if not action.option_strings and nargs in ("?", "*"):
            return f"{text} (optional)"
        left_out = action.default in (None, "") or isinstance(action.default, bool)
        hidden = left_out or action.default == argparse.SUPPRESS
        return text if hidden else f"{text} (default: %(default)s)"


class VerbParser(argparse.ArgumentParser):
    """The parser of a verb and, by argparse, of what stands below it."""

    def __init__(self, **settings: Any):
        super().__init__(**{"formatter_class": Help, **settings})


def parser_of(verb: str, about: str | None, epilog: str | None = None) -> VerbParser:
    """The parser of a verb."""
    return VerbParser(
        prog=f"recurgolf {verb}", description=inspect.cleandoc(about or ""), epilog=epilog
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The flag of every verb that reads a run's folder."""
    parser.add_argument("--trust", action="store_true", help="run plugins that are not installed")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The flag of verbs whose answer a program may read."""
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, all else on stderr"
    )
