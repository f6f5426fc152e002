"""The surroundings are no reason to end a run: a console that is gone, closed, missing or without
Unicode; no home; modules of the user's beside the command; no compiler."""

import io
import os
import pty
import pwd
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from smoke_runs import small

import recurgolf
from recurgolf import cli
from recurgolf.streams import steady_output
from recurgolf.training import checkpoint

ROOT = str(Path(recurgolf.__file__).parents[1])
COMMAND = [sys.executable, "-m", "recurgolf"]


def environment(**more: str) -> dict[str, str]:
    paths = [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def test_writing_to_a_pipe_that_nobody_reads_is_noticed_and_nothing_more(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w", buffering=1, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    with steady_output():
        print("to nobody")
        assert vars(sys.stdout)["lost"] == "Broken pipe"
        print("and on")
    stream.close()  # raises where something is left in the buffer of a broken pipe


def test_a_console_without_unicode_gets_plain_words(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with steady_output():
        print("1.6 ± 0.1 …é")
        sys.stdout.flush()
    assert raw.getvalue() == b"1.6 +- 0.1 ...\\xe9\n"


def test_a_run_without_streams_is_finished(tmp_path):
    command = [*COMMAND, *small("trainer.steps=2", "hydra.run.dir=o")]
    shell = subprocess.run(
        ["sh", "-c", '"$@" >&- 2>&- <&-', "sh", *command], cwd=tmp_path, env=environment()
    )
    assert shell.returncode == 0 and (tmp_path / "o" / "summary.json").exists()


def test_a_run_whose_reader_has_gone_is_finished_and_its_log_says_so(tmp_path):
    command = [*COMMAND, *small("trainer.steps=2", "hydra.run.dir=o")]
    running = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    assert running.wait(120) == 0
    assert running.stderr.read() == b""
    running.stderr.close()
    log = (tmp_path / "o" / "train.log").read_text()
    assert log.count("Broken pipe; what follows is in this file alone") == 1


@pytest.mark.parametrize(
    ("locale", "encoding"),
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "ascii"),
        pytest.param({"PYTHONUTF8": "1"}, "utf-8", marks=pytest.mark.slow),
    ],
)
def test_neither_a_locale_nor_modules_beside_the_command_change_what_is_read(
    tmp_path, locale, encoding
):
    for shadow in ("yaml", "numpy", "hydra"):
        (tmp_path / f"{shadow}.py").write_text("raise SystemExit('shadowed')")
    command = [*COMMAND, "plan", "experiment=smoke"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment(**locale), capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert "parameters" in ended.stdout.decode(encoding)


def test_a_terminal_that_is_closed_leaves_a_checkpoint_and_a_line(tmp_path):
    command = [*COMMAND, *small("trainer.steps=100000", "trainer.log_every=1", "hydra.run.dir=o")]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execve(command[0], command, environment(TERM="xterm"))
    log, deadline = tmp_path / "o" / "train.log", time.monotonic() + 120
    while not (log.exists() and "step     3/" in log.read_text()):
        assert time.monotonic() < deadline
        os.read(terminal, 10_000)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    newest = checkpoint.newest(tmp_path / "o" / "checkpoints")
    assert newest is not None and checkpoint.load(newest)[1]["step"] >= 3
    assert "SIGHUP: stopped" in log.read_text()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_needs_no_home_no_unicode_and_no_module_called_like_pythons_own(tmp_path, ranks):
    """Ranks, W&B's process and the audit's are new interpreters in the folder of the command."""
    for name in ("random", "types", "queue", "token", "copy", "select", "secrets", "logging"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('shadowed {name}')")
    (tmp_path / "home").write_text("no folder")
    places = [name for name in os.environ if name.startswith(("WANDB_", "MPLCONFIG", "XDG_"))]
    bare = environment(HOME=str(tmp_path / "home"), PYTHONIOENCODING="ascii")
    bare = {key: value for key, value in bare.items() if key not in places}
    own = ("tracker=offline", "eval.audit=true") if ranks == 1 else ()
    asked = small("trainer.steps=2", f"trainer.devices={ranks}", "hydra.run.dir=o", *own)
    # As the console script is: Python itself fails under `-m` where a types.py lies.
    script = tmp_path / "bin" / "recurgolf"
    script.parent.mkdir()
    script.write_text("from recurgolf.cli import main\nif __name__ == '__main__':\n    main()\n")
    command = [sys.executable, str(script), *asked]
    ended = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True)
    out, err = ended.stdout.decode("ascii"), ended.stderr.decode("ascii")
    assert ended.returncode == 0, err
    assert "shadowed" not in out + err and "Traceback" not in err
    assert "val_bpb" in out
    if ranks == 1:
        assert (tmp_path / "o" / "audit.json").exists()


def test_a_user_without_a_home_keeps_caches_among_temporary_files(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setenv("HOME", "")  # so that it is put back
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert os.path.expanduser("~/x") == "~/x"
    cli._settle_surroundings()
    assert os.path.expanduser("~/x") == f"{tempfile.gettempdir()}/x"


def test_compiling_without_a_compiler_is_refused_with_what_needs_none(tmp_path):
    command = [*COMMAND, *small("trainer.steps=2", "hydra.run.dir=o", "trainer.compile=true")]
    without = environment(CXX="/nowhere/g++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "compiled"))
    ended = subprocess.run(command, cwd=tmp_path, env=without, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "torch.compile cannot compile here" in ended.stderr
    assert "trainer.compile_backend=aot_eager needs none" in ended.stderr
