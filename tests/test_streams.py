"""The console is no reason to end a run: gone, closed, missing, or without Unicode."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from smoke_runs import small

import recurgolf
from recurgolf.streams import steady_output

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


@pytest.mark.parametrize("shadow", ["yaml", "numpy", "hydra"])
def test_a_module_beside_the_command_stands_in_for_none_of_ours(tmp_path, shadow):
    (tmp_path / f"{shadow}.py").write_text("raise SystemExit('shadowed')")
    ended = subprocess.run(
        [*COMMAND, "plan", "experiment=smoke"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "parameters" in ended.stdout


def test_a_locale_without_unicode_reads_the_same_files(tmp_path):
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [*COMMAND, "plan", "experiment=smoke"]
    plain, unicode = (
        subprocess.run(command, cwd=tmp_path, env=environment(**own), capture_output=True)
        for own in (locale, {"PYTHONUTF8": "1"})
    )
    assert plain.returncode == unicode.returncode == 0, plain.stderr
    plain.stdout.decode("ascii")
    unicode.stdout.decode("utf-8")
