"""A disk that is full at any one write of a run: the run goes on afterwards, to the same file."""

import errno
import hashlib
from pathlib import Path

import pytest
from smoke_runs import small

import recurgolf
from recurgolf import disk


def run_of(text):
    return recurgolf.compose([*small("trainer.steps=2", *text), "trainer.threads=1"])


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "artifact.bin").read_bytes()).hexdigest()


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    disk.write_file(tmp_path / "run.json", "before")
    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(OSError, match=r"needs 5 bytes.*run\.json"):
        disk.write_file(tmp_path / "run.json", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "before"


@pytest.mark.slow
def test_every_write_of_a_run_may_fail_once(tmp_path, monkeypatch):
    real, written = disk.os.fsync, []

    def counted(handle):
        written.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        if len(written) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(disk.os, "fsync", counted)
    failing = 0
    recurgolf.train(run_of(()), tmp_path / "whole")
    names = [name for name in written if name.startswith(".")]
    for file in ("run.json", "artifact.bin", "score.py", "ledger.json", "summary.json"):
        assert f".{file}.draft" in names, file
    expected, count = digest(tmp_path / "whole"), len(written)
    for number in range(1, count + 1):
        folder = tmp_path / str(number)
        written.clear()
        failing = number
        with pytest.raises((OSError, recurgolf.config.RunFailed)):
            recurgolf.train(run_of(()), folder)
        failing = 0
        assert not list(folder.rglob("*.draft")), number
        recurgolf.train(run_of(("trainer.resume=auto",)), folder)
        assert digest(folder) == expected, number
