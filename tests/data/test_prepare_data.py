"""scripts/prepare_data.py, run as a program."""

import subprocess
import sys
from pathlib import Path

from recurgolf.data import Shards, Text

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_data.py"


def prepare(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120
    )


def test_written_folder_trains_as_shards_and_is_not_overwritten(stories, tmp_path, own_cache):
    text = ("--corpus", "text", "--files", f"{stories}/*.txt", "--vocab-size", "320")
    out = tmp_path / "out"
    done = prepare(*text, "--out", str(out), "--val-documents", "4")
    assert done.returncode == 0, done.stderr
    assert "4 documents" in done.stdout
    assert "data: tokenizing documents (train): 36" in done.stderr
    dataset = Shards(path=str(out / "datasets" / "text_sp320"), vocab_size=320).prepare()
    option = Text(files=f"{stories}/*.txt", vocab_size=320, val_documents=4)
    assert dataset.fingerprint == option.prepare().fingerprint
    again = prepare(*text, "--out", str(out))
    assert again.returncode == 1
    assert (
        again.stderr == f"prepare_data: --out {out}: it is there already and not an empty folder\n"
    )
