"""The score again, by the counted program alone: artifact, program, data and nothing else.

The program runs in an empty folder that holds copies of the two counted files, in an interpreter
that has no recurgolf, opens no connection and reads no file outside the data, the folder and the
Python installation. What it prints is held against summary.json digit by digit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recurgolf.counted.code import COUNTED, TRAIN_NAME

_KEPT = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")

# The program's own modules come first; the finders that are there forget recurgolf.
_PRELUDE = """
import os, runpy, sys
READABLE = tuple(os.path.realpath(path) for path in {readable!r})
sys.argv = sys.argv[1:]
import brotli, numpy, sentencepiece, torch, torch._dynamo
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "recurgolf":
            return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
def watch(event, args):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"):
        raise PermissionError("the program asked for the network")
    if event in ("subprocess.Popen", "os.exec", "os.system", "os.posix_spawn", "os.fork"):
        raise PermissionError("the program started another process")
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        if not any(path == root or path.startswith(root + os.sep) for root in READABLE):
            raise PermissionError(f"the program opened {{path}}, which is not counted")
sys.addaudithook(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Rescored:
    """What the program gave.

    Attributes:
        entry: val_bpb, val_loss, tokens, bytes of the headline protocol.
        error: why there is none.
        network: how the network was kept away.
    """

    entry: dict[str, float]
    error: str
    network: str


def rescore(
    folder: Path, code: str, data: Path, tokenizer: Path, kind: str, threads: int = 1
) -> Rescored:
    """Score a run's artifact by the program that counts.

    Args:
        folder: of the run, or an exported one.
        code: `artifact.code` of the run.
        data, tokenizer: folder of the shards, and its tokenizer's file.
        kind: of the headline protocol.
        threads: as the run scored with; other numbers may round otherwise.
    """
    program = COUNTED[code]
    with tempfile.TemporaryDirectory(prefix="recurgolf-alone-") as place:
        alone = Path(place)
        for name in (program, "artifact.bin"):
            if not (folder / name).is_file():
                return Rescored({}, f"{name} is not there", "")
            shutil.copyfile(folder / name, alone / name)
        first = ["--evaluate"] if program == TRAIN_NAME else ["artifact.bin"]
        arguments = [*first, "--data", str(data.resolve()), "--tokenizer", str(tokenizer.resolve())]
        readable = [
            *(place, str(data.resolve().parent.parent), str(tokenizer.resolve())),
            *(sys.prefix, sys.base_prefix, *_linked_folders()),
            *("/proc", "/sys", "/dev", "/etc", "/usr", "/lib", "/lib64"),
        ]
        # A note in the user's cache of data must not be believed here: everything is read anew.
        own = {"RECURGOLF_CACHE": str(alone / "cache"), "HOME": place, "TMPDIR": place}
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | own
        environment["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, "-I", "-c", _PRELUDE.format(readable=readable), program]
        cut_off, network = _without_network()
        done = subprocess.run(
            [*cut_off, *command, *arguments],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Rescored({}, f"{program} alone in a folder failed: {last[:300]}", network)
    try:
        printed = json.loads(done.stdout.strip().splitlines()[-1])
        return Rescored(dict(printed[kind]), "", network)
    except (ValueError, IndexError, KeyError, TypeError, RecursionError):
        return Rescored({}, f"{program} prints no score of {kind!r} as JSON", network)


def differences(found: dict[str, float], told: dict[str, float], tolerance: float) -> list[str]:
    """Every figure of an entry in `evals` that differs from the one that was measured."""
    wrong = []
    for key in ("val_bpb", "val_loss", "tokens", "bytes"):
        measured, claimed = found.get(key), told.get(key)
        exact = measured == claimed
        if key.startswith("val_") and isinstance(measured, float) and isinstance(claimed, float):
            exact = exact or abs(measured - claimed) <= tolerance * abs(measured)
        if not exact:
            wrong.append(f"{key} is {measured!r}, summary.json says {claimed!r}")
    return wrong


def _linked_folders() -> Sequence[str]:
    """Where the interpreter finds its packages, virtual environments with links included."""
    return [path for path in sys.path if path and ("site-packages" in path or "lib/python" in path)]


def _without_network() -> tuple[list[str], str]:
    """A command in front of another that leaves it no network, where this system has one."""
    command = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is not None:
        tried = subprocess.run([*command, "true"], capture_output=True, check=False)
        if tried.returncode == 0:
            return command, "in a namespace without a network"
    return [], "with its sockets refused"
