"""The score again, by the counted program alone: artifact, program, data and nothing else.

The program runs in an empty folder that holds copies of the two counted files, in an interpreter
that has no recurgolf, opens no connection and reads no file outside the data, the folder and the
Python installation. What it prints is held against summary.json digit by digit.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from recurgolf.audit import sandbox
from recurgolf.counted.code import COUNTED, TRAIN_NAME
from recurgolf.data.dataset import Dataset
from recurgolf.data.shards import MANIFEST, find_sidecars, read_shard, write_shard

_KEPT = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")

# Libraries that the program needs come first; then the finders that are there forget recurgolf.
_PRELUDE = """
import os, runpy, sys, types
readable = {readable!r}
sandbox = types.ModuleType("sandbox")
exec({sandbox!r}, vars(sandbox))
sys.argv = sys.argv[1:]
import brotli, numpy, sentencepiece, torch, torch._dynamo
ROOTS = tuple(os.path.realpath(path) for path in (*readable, os.getcwd(), *sandbox.KEPT))
def watch(event, args):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"):
        raise PermissionError("the program asked for the network")
    if event in ("subprocess.Popen", "os.exec", "os.system", "os.posix_spawn", "os.fork"):
        raise PermissionError("the program started another process")
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        if not any(path == root or path.startswith(root + os.sep) for root in ROOTS):
            raise PermissionError(f"the program opened {{path}}, which is not counted")
unheld = sandbox.restrict(readable, [os.getcwd()], [path for path in sys.path if path])
sys.addaudithook(watch)
sandbox.hide_unreadable("recurgolf")
print({mark!r} + unheld, file=sys.stderr)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_MARK = "recurgolf-sandbox: "


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
        # The manifest of a data set lies two folders above its shards.
        own = [str(data.resolve()), str(data.resolve().parent.parent / MANIFEST)]
        readable = [*own, str(tokenizer.resolve()), *sandbox.libraries()]
        # A note in the user's cache of data must not be believed here: everything is read anew.
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment |= {"RECURGOLF_CACHE": str(alone / "cache"), "HOME": place, "TMPDIR": place}
        environment["OMP_NUM_THREADS"] = str(threads)
        held = inspect.getsource(sandbox)
        prelude = _PRELUDE.format(readable=readable, sandbox=held, mark=_MARK)
        command = [sys.executable, "-I", "-c", prelude, program]
        cut_off, network = _without_network()
        done = subprocess.run(
            [*cut_off, *command, *arguments],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    before, _, behind = done.stderr.partition(_MARK)
    unheld, _, said = behind.partition("\n")
    network += f", files watched by Python alone ({unheld})" if unheld else ", its files held"
    if done.returncode != 0:
        last = ((said or before).strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        error = f"{program} alone in a folder failed: {last[:300]}{_is_installed(last)}"
        return Rescored({}, error, network)
    try:
        printed = json.loads(done.stdout.strip().splitlines()[-1])
        return Rescored(dict(printed[kind]), "", network)
    except (ValueError, IndexError, KeyError, TypeError, RecursionError):
        return Rescored({}, f"{program} prints no score of {kind!r} as JSON", network)


def _is_installed(error: str) -> str:
    """What to say of a module that was not found there and is installed here; else nothing."""
    named = re.search(r"No module named '(\w+)", error)
    if named is None or named[1] == "recurgolf" or find_spec(named[1]) is None:
        return ""
    return (
        f" (it is installed, but bytes in packages are counted by nobody, so that beside Python a "
        f"counted program has only {', '.join(sandbox.PROGRAM)} and what these require: copy into "
        f"the plugin what it uses of {named[1]})"
    )


def differences(
    found: dict[str, float],
    told: dict[str, float],
    tolerance: float,
    keys: Sequence[str] = ("val_bpb", "val_loss", "tokens", "bytes"),
    says: str = "summary.json says",
) -> list[str]:
    """Every figure of an entry in `evals` that differs from the one that was measured."""
    wrong = []
    for key in keys:
        measured, claimed = found.get(key), told.get(key)
        exact = measured == claimed
        if key.startswith("val_") and isinstance(measured, float) and isinstance(claimed, float):
            exact = exact or abs(measured - claimed) <= tolerance * abs(measured)
        if not exact:
            wrong.append(f"{key} is {measured!r}, {says} {claimed!r}")
    return wrong


@contextlib.contextmanager
def text_alone(dataset: Dataset, tokens: np.ndarray) -> Iterator[tuple[Path, Path]]:
    """A folder of shards with this validation text and nothing else, and its tokenizer.

    No file of the data set that no score needs can be read from it, and nothing beside the tokens
    tells one text from another.
    """
    with tempfile.TemporaryDirectory(prefix="recurgolf-text-") as place:
        folder = Path(place) / "datasets" / "text"
        folder.mkdir(parents=True)
        write_shard(folder / "fineweb_val_000000.bin", tokens)
        sidecars = find_sidecars(dataset.folder, "val")
        if sidecars:
            counts = np.concatenate([read_shard(path) for path in sidecars])
            write_shard(folder / "fineweb_val_bytes_000000.bin", counts)
        tokenizer = Path(place) / f"tokenizer{dataset.tokenizer.path.suffix}"
        shutil.copyfile(dataset.tokenizer.path, tokenizer)
        yield folder, tokenizer


def _without_network() -> tuple[list[str], str]:
    """A command in front of another that leaves it no network, where this system has one."""
    command = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is not None:
        tried = subprocess.run([*command, "true"], capture_output=True, check=False)
        if tried.returncode == 0:
            return command, "in a namespace without a network"
    return [], "with its sockets refused"
