"""recurgolf audit: check that a finished run's score is one that the rules allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recurgolf.audit import audit_and_show
from recurgolf.audit.prediction import POSITIONS
from recurgolf.config import ConfigError
from recurgolf.disk import json_text
from recurgolf.log import Log
from recurgolf.terminal import terminal_bar
from recurgolf.verbs import add_json, parser_of


def main(arguments: Sequence[str]) -> int:
    """Check a finished run: what its score may know when it predicts, that the counted files alone
    give it, that bytes, training text, clocks and sizes are counted right, and that the files
    belong together.

    Writes audit.json into its folder. Exit code 1 if a check fails.
    """
    parser = parser_of("audit", main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of a finished run")
    parser.add_argument(
        "--positions",
        type=int,
        default=POSITIONS,
        help="changed texts; an audit takes about twice as many scorings",
    )
    parser.add_argument("--chance", help="look where an earlier audit did, by what it printed")
    parser.add_argument(
        "--trust", action="store_true", help="run plugins that are not installed, any score.py"
    )
    add_json(parser)
    asked = parser.parse_args(arguments)
    if asked.positions < 1:
        raise ConfigError(f"--positions {asked.positions}: at least 1")
    if asked.chance is not None:
        try:
            bytes.fromhex(asked.chance)
        except ValueError:
            raise ConfigError(f"--chance {asked.chance!r}: hex digits, as printed") from None
    found = audit_and_show(
        asked.folder,
        Log(None, stderr=asked.json, bar=terminal_bar),
        positions=asked.positions,
        chance=asked.chance,
        trust=asked.trust,
    )
    if asked.json:
        print(json_text(found.to_dict()))
    return 0 if found.passed else 1
