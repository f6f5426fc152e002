"""A W&B run as a listener of the record: a process of its own holds it, so that training neither
waits for W&B nor ends with it.

`WandbTracker` starts the process (`keep_wandb_run`) and feeds it through a queue and a pipe; when
the pipe closes without a word, whoever trained is gone, and the run is marked as failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recurgolf.record import AXES, Tracker, plain

QUEUE_EVENTS = 10_000
"""Events that wait for W&B before further ones are left out of its copy (some megabytes)."""


class WandbTracker(Tracker):
    """A W&B run, kept by a process of its own.

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


def spawn_keeper() -> subprocess.Popen[str]:
    """Start `keep_wandb_run` in a session of its own, which Ctrl-C at a terminal does not reach."""
    # Not the service of a W&B run that the user's own program may hold. What is set to nothing is
    # not set; W&B would refuse it.
    environment = {
        key: value
        for key, value in os.environ.items()
        if key != "WANDB_SERVICE" and (value or not key.startswith("WANDB_"))
    }
    # The package may lie where the interpreter does not look by itself.
    program = "import sys; sys.path.append(sys.argv[1]); import recurgolf.wandb_tracker as k"
    home = str(Path(__file__).resolve().parents[1])
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"{program}; k.keep_wandb_run()", home],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
        text=True,
        encoding="utf-8",
    )


def keep_wandb_run() -> None:
    """Hold one W&B run: the main function of the process behind a WandbTracker.

    Reads one JSON array [verb, content] a line from stdin and answers in the same form: `started`
    with address, folder and service pid, `trouble` with a text, `finished`. Ends the process.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end of the pipe decides, not who else dies
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):  # the service inherits these, and would hold the pipes open
        os.dup2(null, number)

    def reply(verb: str, content: Any = None) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            print(json.dumps([verb, content]), file=replies)

    service_pid = None
    try:
        import wandb

        run = _open_wandb_run(json.loads(commands.readline())[1], reply)
        service_pid = _service_pid()
        reply("started", [run.url, run.settings.sync_dir, service_pid])
        exit_code = 1  # unless told: whoever trained is gone
        for line in commands:
            verb, content = json.loads(line)
            if verb == "finish":
                exit_code = content
                break
            _VERBS[verb](run, content)
        run.finish(exit_code=exit_code)
        reply("finished")
        wandb.teardown()
    except BaseException as error:
        reply("trouble", f"stopped ({_in_a_line(error)})")
        if service_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(service_pid, signal.SIGKILL)
    os._exit(0)  # W&B's exit hook would wait for its service, however dead


def _open_wandb_run(start: dict[str, Any], reply: Any) -> Any:
    """The run that `start` asks for; an offline one where the service does not answer."""
    import wandb
    from wandb.errors import CommError

    try:
        run = wandb.init(**start["init"], settings=wandb.Settings(**start["settings"]))
    except CommError as error:
        wandb.teardown()  # the id counts as taken until then
        offline = {**start["init"], "mode": "offline", "resume": None}
        run = wandb.init(**offline, settings=wandb.Settings(**start["settings"]))
        reply("started", [run.url, run.settings.sync_dir, _service_pid()])
        reply("trouble", f"cannot be reached, recording offline instead ({_in_a_line(error)})")
    for name in AXES:
        run.define_metric(name)
    return run


def _in_a_line(error: BaseException) -> str:
    """An error; which setting is wrong may stand in its second line."""
    told = " ".join(str(error).partition("[type=")[0].split())
    return f"{type(error).__name__}: {told}"[:300]


def _service_pid() -> int | None:
    """W&B's own process. There is no public way to it; a test fails where this one ends."""
    from wandb.sdk import wandb_setup

    process = wandb_setup.singleton().ensure_service()._proc
    return None if process is None else process._process.pid


def _log(run: Any, content: dict[str, Any]) -> None:
    run.log(content["row"], step=content["step"])


def _summary(run: Any, content: dict[str, Any]) -> None:
    run.summary.update(content)


def _artifact(run: Any, content: dict[str, Any]) -> None:
    import wandb

    name = re.sub(r"[^\w.-]+", "-", content["name"])  # what W&B allows in a name
    artifact = wandb.Artifact(name, type="model", metadata=content["metadata"])
    for file in content["files"]:
        artifact.add_file(file, policy="immutable")  # read where it lies, not copied first
    run.log_artifact(artifact)


_VERBS = {"log": _log, "summary": _summary, "artifact": _artifact}
