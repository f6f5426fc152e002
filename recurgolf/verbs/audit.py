"""recurgolf audit: check that a finished run's score is one that the rules allow."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from recurgolf.audit import audit_and_show
from recurgolf.log import Log


def main(arguments: Sequence[str]) -> int:
    """Check causality, normalisation, order, bytes, separation and limits of a finished run.

    Writes audit.json into its folder. Exit code 1 if a check fails.
    """
    parser = argparse.ArgumentParser(prog="recurgolf audit", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of a finished run")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, all else on stderr"
    )
    asked = parser.parse_args(arguments)
    found = audit_and_show(asked.folder, Log(None, stderr=asked.json))
    if asked.json:
        print(json.dumps(found.to_dict()))
    return 0 if found.passed else 1
