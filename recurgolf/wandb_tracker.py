"""A W&B run as a listener of the record: events go through a queue and a pipe to a process.

The other end of the pipe is `wandb_keeper.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recurgolf.record import Tracker, plain
from recurgolf.wandb_keeper import spawn_keeper

QUEUE_EVENTS = 10_000
"""Events that wait for W&B before further ones are left out of its copy (some megabytes)."""


class WandbTracker(Tracker):
    """A W&B run, kept by a process of its own (`wandb_keeper.py`).

    Attributes:
        trouble: what went wrong with W&B, None while nothing did; printed to stderr once.
    """

    def __init__(
        self, start: Mapping[str, Any], *, log_artifact: bool, finish_timeout_seconds: float
    ) -> None:
        """Start the process; returns at once, whether or not W&B can be reached.

        Args:
            start: `init` (arguments of wandb.init) and `settings` (of wandb.Settings).
            log_artifact: whether artifacts are handed on.
            finish_timeout_seconds: `finish` takes at most so long.
        """
        self.run_id = start["init"]["id"]
        self.trouble: str | None = None
        self._log_artifact = log_artifact
        self._finish_timeout_seconds = finish_timeout_seconds
        self._folder: str | None = None
        self._service_pid: int | None = None
        self._done = False
        self._queue: queue.Queue[str | None] = queue.Queue(QUEUE_EVENTS)
        self._process = spawn_keeper()
        self._threads = [
            threading.Thread(target=target, name=f"wandb-{target.__name__}", daemon=True)
            for target in (self._feed, self._listen)
        ]
        self._send("start", start)
        for thread in self._threads:
            thread.start()

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        # The counter is logged by name as well: W&B's own `_step` cannot be chosen as an axis.
        self._send("log", {"row": {"step": step, **plain(metrics)}, "step": step})

    def summary(self, values: Mapping[str, Any]) -> None:
        self._send("summary", plain(values))

    def log_artifact(
        self, path: Path, name: str, metadata: Mapping[str, Any], *, beside: Sequence[Path] = ()
    ) -> None:
        if self._log_artifact:
            files = [str(file.resolve()) for file in (path, *beside)]
            self._send("artifact", {"files": files, "name": name, "metadata": plain(metadata)})

    def finish(self, exit_code: int = 0, *, within_seconds: float | None = None) -> None:
        if self._done:
            return
        self._done = True
        allowed = self._finish_timeout_seconds if within_seconds is None else within_seconds
        deadline = time.monotonic() + allowed
        for line in (json.dumps(["finish", exit_code]), None):
            with contextlib.suppress(queue.Full):
                # No use in waiting for room where nobody reads any more.
                alive = self._process.poll() is None
                left = max(0.0, deadline - time.monotonic())
                self._queue.put(line, block=alive, timeout=left)
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._report(f"did not finish within {allowed:g} s")
            self._kill()
        for thread in self._threads:
            thread.join(1.0)

    def _send(self, verb: str, content: Any) -> None:
        if self._done or self._process.poll() is not None:
            return
        try:
            self._queue.put_nowait(json.dumps([verb, content]))
        except queue.Full:
            self._report("does not keep up; events are missing from its copy of the record")

    def _feed(self) -> None:
        """Thread: from the queue to the process, which may not be reading."""
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError):  # its end is seen, and reported, by _listen
            while (line := self._queue.get()) is not None:
                pipe.write(line + "\n")
                pipe.flush()
        with contextlib.suppress(OSError):
            pipe.close()

    def _listen(self) -> None:
        """Thread: what the process answers, to its end."""
        pipe = self._process.stdout
        assert pipe is not None
        ended_well = False
        with pipe:
            for line in pipe:
                verb, content = json.loads(line)
                if verb == "started":
                    url, self._folder, self._service_pid = content
                    self.location = url or self._folder
                elif verb == "trouble":
                    self._report(content)
                ended_well |= verb == "finished"
        code = self._process.wait()
        if not ended_well:
            self._report(f"process ended early (exit code {code})")

    def _report(self, what: str) -> None:
        if self.trouble is None:
            self.trouble = what
            later = f"; what W&B has: wandb sync {self._folder}" if self._folder else ""
            print(
                f"W&B: {what}. The run goes on, its metrics.jsonl is complete{later}",
                file=sys.stderr,
                flush=True,
            )

    def _kill(self) -> None:
        # The service first, while its parent lives and its number is surely its own: a stopped
        # one would outlast us.
        for pid in (self._service_pid, self._process.pid):
            if pid is not None and self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()
