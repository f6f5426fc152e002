"""Seconds from the command to the help text and to the first step."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time


def main(asked: argparse.Namespace) -> None:
    """Seconds of wall time from the command line, best of three."""
    command = [sys.executable, "-m", "recurgolf"]
    best = min(_seconds([*command, "--help"]) for _ in range(3))
    print(f"recurgolf --help: {best:.2f} s (at most 3)")
    with tempfile.TemporaryDirectory() as folder:
        first = min(_seconds_to_first_step([*command, *asked.overrides], folder) for _ in range(3))
    print(f"first training step after {first:.2f} s (at most 10)")


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def _seconds_to_first_step(command: list[str], folder: str) -> float:
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step     1/"):
            break
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    return seconds
