"""Commands that a test may interrupt: started, watched, killed and waited for.

As in command_line.py a process that has the imports behind it forks for every command. Each command
leads a process group of its own, so that a kill can take its ranks along.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command_line import Ended, _be_the_command


class Running:
    """A command that goes on while the test looks."""

    def __init__(self, *arguments: str, cwd: Path, env: dict[str, str] | None = None):
        self.files = [tempfile.mkstemp()[1], tempfile.mkstemp()[1]]
        environment = {**os.environ, **(env or {})}
        self.pid = int(
            _ask("start", [list(map(str, arguments)), str(cwd), environment, self.files])
        )

    @property
    def out(self) -> str:
        return Path(self.files[0]).read_text()

    @property
    def is_alive(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def until(
        self, condition: Callable[[], bool], seconds: float = 90, pause: float = 0.005
    ) -> bool:
        """Wait; False when the command ended before the condition held."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s in vain; it said {self.out}"
            if not self.is_alive:
                return condition()
            time.sleep(pause)
        return True

    def send(self, number: int, group: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self) -> Ended:
        code = int(_ask("wait", self.pid))
        ended = Ended(code, *(Path(file).read_text() for file in self.files))
        for file in self.files:
            os.unlink(file)
        return ended

    def left_behind(self) -> list[int]:
        """Processes of its group that still run."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[2]) == self.pid and fields[0] != "Z":
                        found.append(int(entry.name))
        return found

    def ends_alone(self) -> None:
        """Nothing of its group is left; the helper of Python's own spawning may take a moment."""
        deadline = time.monotonic() + 5
        while self.left_behind():
            assert time.monotonic() < deadline, self.left_behind()
            time.sleep(0.05)


@functools.cache
def _server() -> subprocess.Popen[str]:
    # Started by the first test that needs it, in whose environment the cache is the session's.
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _ask(verb: str, content: object) -> str:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    print(json.dumps([verb, content]), file=server.stdin, flush=True)
    return server.stdout.readline()


def on_ranks(count: int, function: Callable[..., None], *arguments: object) -> None:
    """Call `function(rank, count, *arguments)` of a test module in `count` processes."""
    files = [tempfile.mkstemp()[1] for _ in range(2 * count)]
    asked = [
        [function.__module__, function.__name__, [rank, count, *arguments], files[2 * rank :][:2]]
        for rank in range(count)
    ]
    pids = [int(_ask("call", each)) for each in asked]
    codes = [int(_ask("wait", pid)) for pid in pids]
    said = "".join(Path(file).read_text() for file in files)
    for file in files:
        os.unlink(file)
    assert codes == [0] * count, said


def _be_a_rank(module: str, name: str, arguments: list, files: list[str]) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    code = 1
    try:
        getattr(importlib.import_module(module), name)(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    import torch
    import torch._dynamo

    import recurgolf.cli
    import recurgolf.training.launch
    import recurgolf.verbs.resume

    torch.set_num_threads(1)
    recurgolf.compose(["experiment=smoke"])  # Hydra's parser takes half a second the first time.
    gc.collect()
    gc.freeze()  # see command_line.py
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in commands:
        verb, content = json.loads(line)
        if verb == "wait":
            _, status = os.waitpid(content, 0)
            print(os.waitstatus_to_exitcode(status), file=answers)
            continue
        child = os.fork()
        if child == 0:
            commands.close()
            answers.close()
            os.setsid()
            if verb == "call":
                _be_a_rank(*content)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _be_the_command(*content)
        print(child, file=answers)


if __name__ == "__main__":
    serve()
