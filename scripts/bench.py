"""Measurements, each a ratio taken side by side in one process, interleaved.

    python scripts/bench.py trainer    what the trainer does around a step
    python scripts/bench.py --help     all of them

Every file in `benches/` is one measurement, with `main(asked)`. Figures are medians; state the
machine with them.
"""

from __future__ import annotations

import argparse
import ast
import os
from importlib import import_module
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "benches"


def names() -> dict[str, str]:
    """Measurement -> what it measures."""
    found = {p.stem: ast.get_docstring(ast.parse(p.read_text())) for p in FOLDER.glob("*.py")}
    return {name: (text or "").split("\n")[0] for name, text in sorted(found.items())}


def main() -> None:
    known = {name: text for name, text in names().items() if name != "timing"}
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(f"  {name:<10}{text}" for name, text in known.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=known)
    parser.add_argument("overrides", nargs="*", help="overrides of the run that is measured")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_intermixed_args()
    torch.set_num_threads(asked.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(asked.threads))
    print(f"torch {torch.__version__}, {asked.threads} thread(s), {os.cpu_count()} cores")
    import_module(f"benches.{asked.what}").main(asked)


if __name__ == "__main__":
    main()
