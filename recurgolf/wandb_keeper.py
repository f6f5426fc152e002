"""The process that holds a W&B run, so that training neither waits for W&B nor ends with it.

`tracker.WandbTracker` starts it and feeds it; when the pipe closes without a word, whoever trained
is gone, and the run is marked as failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from recurgolf.record import AXES


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
    program = "import sys; sys.path.append(sys.argv[1]); import recurgolf.wandb_keeper as k"
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
