"""Start the ranks of one machine, watch them, end them together, and report the root cause.

When one rank fails, the others fail in their collectives a moment later. Every rank leaves a note
of how it ended, and the first failure that is not a consequence of another one is reported. A rank
that hangs is made to dump its stack before it is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from recurgolf.config import ConfigError, Diverged
from recurgolf.streams import steady_output
from recurgolf.training.faults import RunFailed
from recurgolf.training.signals import STOP_SECONDS, WATCHED, Interruption, Signals

GRACE_SECONDS = 3.0
"""How long the other ranks may take to end by themselves after the first failure."""

_CONSEQUENCES = (
    *("connection closed by peer", "connection reset", "broken pipe", "socket closed"),
    *("timed out", "timeout", "connection refused", "gloo", "nccl communicator was aborted"),
)
"""What error messages of a collective say when another rank is gone or never arrives."""


def run_ranks(
    target: Callable[[int, str, Any], None], count: int, argument: Any, signals: Signals
) -> None:
    """Call `target(rank, meeting_folder, argument)` in `count` spawned processes and join them.

    Args:
        target: an importable function.
        signals: listening in this process; signals received are passed on to the ranks.

    Raises:
        ConfigError: a rank refused the config.
        RunFailed: a rank failed, died or hung; Diverged if training diverged.
        Interruption: the ranks were ended by a signal.
    """
    with tempfile.TemporaryDirectory() as folder, _spawning() as context, signals.deferred():
        meeting = Path(folder)
        ranks = [
            context.Process(target=_rank, args=(target, rank, folder, argument), name=f"rank{rank}")
            for rank in range(count)
        ]
        try:
            for process in ranks:
                process.start()
            _watch(ranks, meeting, signals)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
            for process in ranks:
                if process.pid is not None:
                    process.join()
    signals.stop_if_heard()


def _rank(target: Callable[[int, str, Any], None], rank: int, folder: str, argument: Any) -> None:
    """Entry point of a rank's process."""
    _end_with_parent()
    with steady_output(), (Path(folder) / f"stack_{rank}").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        code = 1
        try:
            target(rank, folder, argument)
            code = 0
        except Interruption as end:
            code = end.exit_code
        except ConfigError as error:
            _note(folder, rank, "refused", str(error))
        except RunFailed as error:
            kind = "diverged" if isinstance(error, Diverged) else "failed"
            _note(folder, rank, kind, str(error))
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            _note(folder, rank, "lost" if is_consequence(error) else "broken", text)
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads of a broken process group may block a normal exit for ever.
        os._exit(code)


def is_consequence(error: BaseException) -> bool:
    """Whether an error only reports that another rank is gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _CONSEQUENCES)


def _watch(ranks: list[BaseProcess], meeting: Path, signals: Signals) -> None:
    """Return when all ranks have succeeded; otherwise end them all and raise the cause."""
    asked_to_stop = 0.0
    while True:
        running = [p for p in ranks if p.is_alive()]
        if signals.heard is not None and not asked_to_stop:
            asked_to_stop = time.monotonic()
            for process in running:
                _send(process, signals.heard)
        if asked_to_stop:
            if not running or time.monotonic() - asked_to_stop > STOP_SECONDS + 0.3:
                raise Interruption(signals.heard or signal.SIGTERM)
        elif any(p.exitcode for p in ranks):
            break
        elif not running:
            return
        wait([p.sentinel for p in running], timeout=0.1)
    interrupted = {128 + number for number in WATCHED}
    first = next(p.exitcode for p in ranks if p.exitcode)
    # A signal went to the whole process group, and a rank acted on it before this process did.
    if first in interrupted and not list(meeting.glob("end_*.json")):
        _join(ranks, STOP_SECONDS)
        raise Interruption(first - 128)
    _join(ranks, GRACE_SECONDS)
    hung = [number for number, p in enumerate(ranks) if p.is_alive()]
    for number in hung:
        _send(ranks[number], signal.SIGUSR1)
    if hung:
        time.sleep(0.3)
    raise _cause(ranks, hung, meeting)


def _cause(ranks: list[BaseProcess], hung: list[int], meeting: Path) -> Exception:
    """The root cause: the earliest failure that is not a consequence of another one."""
    notes = [json.loads(path.read_text()) for path in meeting.glob("end_*.json")]
    notes.sort(key=lambda note: note["time"])
    told = {"refused": ConfigError, "diverged": Diverged, "failed": RunFailed}
    for kind, error in told.items():
        for note in notes:
            if note["kind"] == kind:
                return error(note["text"])
    for note in notes:
        if note["kind"] == "broken":
            return RunFailed(
                f"rank {note['rank']} failed, so all ranks were ended:\n{note['text']}"
            )
    noted = {note["rank"] for note in notes}
    for number, process in enumerate(ranks):
        code = process.exitcode
        if code is not None and code < 0 and number not in noted:
            name = signal.Signals(-code).name
            hints = {
                "SIGKILL": " (the system does that when memory runs out)",
                "SIGBUS": " (a data file was cut while it was read)",
            }
            return RunFailed(
                f"rank {number} was ended by {name}{hints.get(name, '')}; the others "
                "were ended with it. Checkpoints are whole: trainer.resume=auto"
            )
    for number in hung:
        stack = (meeting / f"stack_{number}").read_text().strip()
        return RunFailed(
            f"rank {number} hangs: the others waited for it in vain "
            f"(trainer.rank_timeout_seconds). All ranks were ended; it was at\n{stack}"
        )
    for number, process in enumerate(ranks):
        if process.exitcode and number not in noted:
            return RunFailed(f"rank {number} ended with exit code {process.exitcode}")
    return RunFailed(f"rank {notes[0]['rank']} lost the others:\n{notes[0]['text']}")


def _note(folder: str, rank: int, kind: str, text: str) -> None:
    draft = Path(folder) / f".end_{rank}"
    draft.write_text(json.dumps({"rank": rank, "kind": kind, "time": time.time(), "text": text}))
    draft.rename(Path(folder) / f"end_{rank}.json")


def _join(ranks: list[BaseProcess], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))


def _send(process: BaseProcess, number: int) -> None:
    if process.pid is not None and process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM when the launching process dies, for whatever reason."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    parent = multiprocessing.parent_process()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
    if parent is not None and not parent.is_alive():
        os._exit(1)


@contextlib.contextmanager
def _spawning() -> Iterator[Any]:
    """The spawn context, even if a plugin such as joblib has set another start method."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        yield multiprocessing.get_context("spawn")
    finally:
        multiprocessing.set_start_method(before, force=True)


__all__ = ["is_consequence", "run_ranks"]
