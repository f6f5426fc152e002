"""Runs the command line as a user would: argv in, exit code and two streams out.

`recurgolf(...)` forks off a process that has already imported torch, so that a command costs what
it does and not its imports; the child calls the console script's own function on a real argv, in a
folder and an environment of its own. `recurgolf_process(...)` starts a fresh interpreter.
"""

import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

PYTHON = [sys.executable, "-m", "recurgolf"]


@dataclass
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    def refused(self) -> str:
        """The message of a user error: one or two lines on stderr, exit code 2, nothing else."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert "Traceback" not in self.err + self.out
        lines = self.err.strip().splitlines()
        assert 1 <= len(lines) <= 2, self.err
        assert lines[0].startswith("recurgolf: "), self.err
        assert "step" not in self.out, "training had started"
        return self.err.strip()

    def finished(self) -> "Ended":
        assert self.code == 0, (self.code, self.out, self.err)
        return self


def recurgolf(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> Ended:
    """A command in a fork of the process that has the imports behind it."""
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/out", f"{folder}/err"]
        asked = [list(map(str, arguments)), str(cwd), {**os.environ, **(env or {})}, files]
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        print(json.dumps(asked), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return Ended(code, *(Path(file).read_text() for file in files))


def recurgolf_process(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None, start: list[str] | None = None
) -> Ended:
    """A command in a fresh interpreter."""
    done = subprocess.run(
        [*(start or PYTHON), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@functools.cache
def _server() -> subprocess.Popen[str]:
    """One for the test session; it ends when our end of its pipe closes."""
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def serve() -> None:
    """Fork for every line of stdin, and answer with the exit code of the command in it."""
    import scipy.stats  # noqa: F401
    import torch
    import torch._dynamo

    import recurgolf.cli
    import recurgolf.training.launch
    import recurgolf.verbs.evaluate
    from recurgolf.counted.code import code_of, training_code_of

    torch.set_num_threads(1)
    # What every process does once: Hydra's parser, and the code that goes into the programs.
    run = recurgolf.compose(["experiment=smoke", "data=text", "data.files=x", "tracker=none"])
    training_code_of(run, code_of(run))
    # A tenth of a short command was looking through what it has from here for garbage.
    gc.collect()
    gc.freeze()
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for line in commands:
        arguments, cwd, environment, files = json.loads(line)
        child = os.fork()
        if child == 0:
            commands.close()
            answers.close()
            _be_the_command(arguments, cwd, environment, files)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers)


def _be_the_command(arguments: list[str], cwd: str, environment: dict, files: list[str]) -> None:
    from recurgolf.cli import main

    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["recurgolf", *arguments]
    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
