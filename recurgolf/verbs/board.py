"""recurgolf board: a self-contained HTML page about runs and sweeps, and pictures of its plots."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from recurgolf.compare.board import write_board


def main(arguments: Sequence[str]) -> int:
    """Make an HTML page of runs and sweeps; it opens anywhere, without a network."""
    parser = argparse.ArgumentParser(prog="recurgolf board", description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="runs are found in and below them")
    parser.add_argument("--out", type=Path, help="default: board.html in the first folder")
    asked = parser.parse_args(arguments)
    out = asked.out or asked.folders[0] / "board.html"
    for path in write_board(asked.folders, out):
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
