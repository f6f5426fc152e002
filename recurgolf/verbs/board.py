"""recurgolf board: a self-contained HTML page about runs and sweeps, and pictures of its plots."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from recurgolf.compare.board import write_board
from recurgolf.config import ConfigError
from recurgolf.folders import walked
from recurgolf.verbs import parser_of

WATCHED = ("run.json", "metrics.jsonl", "summary.json", "failure.txt")


def main(arguments: Sequence[str]) -> int:
    """Make an HTML page of runs and sweeps; it opens anywhere, without a network."""
    parser = parser_of("board", main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="runs are found in and below them")
    parser.add_argument("--out", type=Path, help="default: board.html in the first folder")
    parser.add_argument("--baseline", help="words of a setting, as in lora.rank=0 (default: first)")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=30.0,
        metavar="SECONDS",
        help="rebuild the page while runs go on, at most every SECONDS (30), until Ctrl-C; an "
        "open page reloads itself",
    )
    asked = parser.parse_args(arguments)
    out = asked.out or asked.folders[0] / "board.html"
    if asked.watch is None:
        for path in write_board(asked.folders, out, baseline=asked.baseline):
            print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
        return 0
    if not asked.watch > 0:
        raise ConfigError(f"--watch {asked.watch:g}: a number of seconds above 0")
    try:
        watch(asked.folders, out, asked.baseline, asked.watch)
    except KeyboardInterrupt:
        print(f"stopped; the last page is {out}")
    return 0


def watch(folders: Sequence[Path], out: Path, baseline: str | None, seconds: float) -> None:
    """Rebuild the page whenever a run has written something, until interrupted."""
    write_board(folders, out, baseline=baseline, reload_seconds=seconds)
    seen = _state(folders)
    print(f"{out}: rebuilt as runs go on; Ctrl-C stops", flush=True)
    while True:
        time.sleep(seconds)
        now = _state(folders)
        if now == seen:
            continue
        try:
            write_board(folders, out, baseline=baseline, reload_seconds=seconds)
        except (ConfigError, OSError) as error:  # a run that is just being written
            print(f"not rebuilt: {error}", flush=True)
            continue
        seen = now
        print(f"{out}: rebuilt at {time.strftime('%H:%M:%S')}", flush=True)


def _state(folders: Sequence[Path]) -> dict[Path, int]:
    """When the files that the page is made of were written."""
    below = [path for folder in folders for path, _ in walked(folder)]
    files = [path / name for path in below for name in WATCHED]
    return {path: path.stat().st_mtime_ns for path in files if path.exists()}
