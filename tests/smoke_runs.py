"""Finished runs that several tests look at, each made once for all workers of a test session."""

import functools
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from command_line import Ended, recurgolf
from workers import locked

from recurgolf import compose
from recurgolf.data.corpus import embedded_corpus
from recurgolf.run import Run

EXACT = ("trainer.precision=float32",)
"""`auto` depends on the processor."""


def session_folder() -> Path:
    """A folder of this test session (conftest.py sets the cache inside of it)."""
    return Path(os.environ["RECURGOLF_CACHE"]).parent


@functools.cache
def small_text() -> Path:
    """A file with 300 documents of the embedded text, one JSON object a line."""
    path = session_folder() / "small_text.jsonl"
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            documents = embedded_corpus().read().train[:300]
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def small(*overrides: str) -> list[str]:
    """The smoke experiment on a text that is scored in a moment."""
    data = ["data=text", f"data.files={small_text()}", "data.vocab_size=512"]
    own = ["experiment=smoke", *data, "data.val_documents=30", "tracker=none", *EXACT]
    return [*own, *overrides]


@functools.cache
def composed(*overrides: str) -> Run:
    """The Run of these overrides; do not change it."""
    return compose(overrides)


@dataclass
class RunFolder:
    """A run's folder and what its command printed."""

    path: Path
    ended: Ended

    @property
    def summary(self) -> dict:
        return self.json("summary.json")

    def json(self, name: str) -> dict:
        return json.loads((self.path / name).read_text())

    @property
    def events(self) -> list[dict]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> dict[int, float]:
        """Step -> training loss."""
        return {e["step"]: e["train/loss"] for e in self.events if "train/loss" in e}

    @property
    def figures(self) -> dict:
        """The summary without what no two runs share: times, and where it lies."""
        dropped = {"train_seconds", "tokens_per_second", "peak_memory_bytes", "folder", "seconds"}
        kept = {k: v for k, v in self.summary.items() if k not in dropped}
        kept["evals"] = {
            name: {k: v for k, v in of.items() if k != "seconds"}
            for name, of in kept["evals"].items()
        }
        kept["caps"] = {
            name: {k: v for k, v in of.items() if k != "used"} for name, of in kept["caps"].items()
        }
        return kept


def train(*overrides: str, attempt: int = 0) -> RunFolder:
    """A finished run; the same arguments give the same folder again, so only read it."""
    return _train(overrides, attempt)


@functools.cache
def _train(overrides: tuple[str, ...], attempt: int) -> RunFolder:
    words = f"{attempt}_{'_'.join(overrides)}"
    name = re.sub(r"[^\w.=-]+", "_", words)[:100] + hashlib.sha1(words.encode()).hexdigest()[:8]
    path = session_folder() / "runs" / name
    path.parent.mkdir(exist_ok=True)
    said = path.with_name(f"{name}.ended")
    with locked(path.with_name(f"{name}.lock")):
        if not said.exists():
            ended = recurgolf(*small(*overrides), f"hydra.run.dir='{path}'", cwd=session_folder())
            assert ended.code in (0, 3), (ended.code, ended.out, ended.err)
            said.write_text(json.dumps(asdict(ended)))
    return RunFolder(path, Ended(**json.loads(said.read_text())))
