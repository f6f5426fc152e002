"""The process that scores for an audit: here, and only here, a run's plugins are imported.

It is started by `ScoringProcess`, reads one JSON object a line and answers with one; arrays go
through .npy and .npz files that can hold nothing but numbers. What they mean is judged by the
process that asked, which a plugin cannot reach.

It never holds the validation text. A child opens the data, says what there is (`Facts`) and ends;
only then are plugins imported here, with all files but theirs, the artifact's and the libraries'
out of reach (`sandbox`). Every text is scored in a child of its own, so that none knows what was
scored before it, and none can tell the real text from another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from recurgolf.audit import sandbox
from recurgolf.audit.scorer import Hints, LocalScorer, Scored
from recurgolf.config import ConfigError
from recurgolf.disk import read_json

# Ctrl-C at a terminal reaches this process too; what there is to say, the other one says.
_QUIET = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)"
_START = f"{_QUIET}; from {__name__} import start; start()"
_NEEDED = (*sandbox.PROGRAM, "recurgolf", "hydra-core", "omegaconf", "rich", "safetensors", "scipy")
_SIDECAR, _ROWS, _ANSWER = "sidecar.npy", "calibration.npy", "answer.npz"
_PACKAGE = str(Path(__file__).resolve().parents[1])
CALIBRATION_ROWS = 64
"""Rows of calibration text that are made again and looked at."""


class RemoteScorer:
    """A protocol in the other process."""

    def __init__(self, process: ScoringProcess, name: str, hints: Hints):
        self.process, self.name, self.hints = process, name, hints

    def score(self, tokens: np.ndarray) -> Scored:
        told = self.process.ask("score", self.name, tokens=np.asarray(tokens, dtype=np.uint16))
        if "failed" in told:
            none = np.zeros(0)
            return Scored(none, none, none, {}, str(told["failed"]))
        with np.load(self.process.place / _ANSWER, allow_pickle=False) as arrays:
            return Scored(
                arrays["nats"].astype(np.float64),
                arrays["times"].astype(np.int64),
                arrays["turn"].astype(np.int64),
                {key: value for key, value in told["entry"].items()},
                str(told["error"]),
            )

    def guess(self, tokens: np.ndarray, starts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        told = self.process.ask(
            "guess",
            self.name,
            tokens=np.asarray(tokens, dtype=np.uint16),
            starts=starts,
            offsets=offsets,
        )
        if "failed" in told:
            return np.zeros((*offsets.shape, self.hints.vocab_size), dtype=np.float32)
        with np.load(self.process.place / _ANSWER, allow_pickle=False) as arrays:
            return arrays["shares"]


class ScoringProcess:
    """A run's artifact, data and protocols in a process of their own.

    Attributes:
        facts: what it says of itself: fingerprint, data, tokenizer, plugins with their files.
        scorers: one per protocol that the run was scored by, the headline first.
    """

    def __init__(self, process: subprocess.Popen[str], answers: IO[str], place: Path):
        self.process, self.answers, self.place = process, answers, place
        self.facts = self._answer()
        self.scorers = {
            name: RemoteScorer(self, name, Hints(**hints))
            for name, hints in self.facts["protocols"].items()
        }

    def ask(self, what: str, protocol: str, **arrays: np.ndarray) -> dict[str, Any]:
        """Ask for something; arrays of the answer lie in answer.npz."""
        for path in self.place.iterdir():
            if path.name not in (_SIDECAR, _ROWS):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        np.savez(self.place / "question.npz", **arrays)  # type: ignore[arg-type]
        assert self.process.stdin is not None
        print(json.dumps({"what": what, "protocol": protocol}), file=self.process.stdin, flush=True)
        return self._answer()

    def calibration(self) -> list[np.ndarray]:
        """Rows that the run's quantizer was calibrated on, made again; empty without any."""
        return list(np.load(self.place / _ROWS, allow_pickle=False))

    def _answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            code = self.process.wait()
            raise ConfigError(f"the process that scores ended with exit code {code}")
        told = json.loads(line)
        if "refused" in told:
            raise ConfigError(told["refused"])
        return told


def own_environment() -> dict[str, str]:
    """An environment in which another Python finds this package, whatever else it finds."""
    package = str(Path(__file__).resolve().parents[2])
    path = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


@contextlib.contextmanager
def scoring_process(folder: Path, threads: int = 1) -> Iterator[ScoringProcess]:
    """Start the process that scores a run's artifact; it ends with the block."""
    read, write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="recurgolf-audit-") as place:
        environment = {**own_environment(), "OMP_NUM_THREADS": str(threads), "TMPDIR": place}
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(folder), place, str(write)],
            stdin=subprocess.PIPE,
            # What a plugin prints is no answer.
            stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else subprocess.DEVNULL,
            text=True,
            env=environment,
            pass_fds=[write],
        )
        os.close(write)
        try:
            with os.fdopen(read) as answers:
                yield ScoringProcess(process, answers, Path(place))
        finally:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _has_fileno(stream: Any) -> bool:
    try:
        return stream.fileno() >= 0
    except (OSError, ValueError, AttributeError):
        return False


def main(folder: Path, place: Path, answers: IO[str], threads: int = 1) -> None:
    """Answer until nothing more is asked."""

    def answer(told: dict[str, Any]) -> None:
        print(json.dumps(told), file=answers, flush=True)

    # Modules beside the place where the command was typed are importable, as for training.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    known = sandbox.libraries(_NEEDED)
    facts = _in_a_child(place, threads, lambda: _facts(folder, place))
    answer({"refused": facts["failed"]} if "failed" in facts else facts)
    if "failed" in facts or "refused" in facts:
        return
    own = [str(folder / name) for name in ("artifact.bin", "run.json", "scores")]
    readable = [*known, _PACKAGE, *own, facts["tokenizer"], *facts["modules"]]
    sandbox.restrict(readable, [str(place)], [path for path in sys.path if path])
    sandbox.hide_unreadable()
    scorers = None
    for line in sys.stdin:
        asked = json.loads(line)
        scorers = scorers or scorers_of(folder, Path(facts["tokenizer"]), place / _SIDECAR)

        def answered(asked: Any = asked, scorers: Any = scorers) -> dict[str, Any]:
            with np.load(place / "question.npz", allow_pickle=False) as arrays:
                told, found = _ANSWERS[asked["what"]](scorers[asked["protocol"]], arrays)
            np.savez(place / _ANSWER, **found)
            return told

        answer(_in_a_child(place, threads, answered))


def _in_a_child(place: Path, threads: int, task: Callable[[], Any]) -> dict[str, Any]:
    """What a task says that a fork of this process does, with `failed` where it did not."""
    import torch

    written = place / "told.json"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(threads)
            written.write_text(json.dumps(task()))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        return {"failed": f"the process that scores ended with exit code {code}"}
    return read_json(written)


def _facts(folder: Path, place: Path) -> dict[str, Any]:
    """What is to be known of a run before it is scored; arrays go into files."""
    try:
        scoring = Scoring(folder)
    except ConfigError as error:
        return {"refused": str(error)}
    sidecar = scoring.dataset.val_byte_sidecar
    if sidecar is not None:
        np.save(place / _SIDECAR, sidecar)
    np.save(place / _ROWS, scoring.calibration_rows())
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    return {**scoring.facts(), "modules": sorted(filter(None, files))}


def scorers_of(folder: Path, tokenizer: Path, sidecar: Path) -> dict[str, LocalScorer]:
    """Protocol -> scorer of a run's artifact, without any text."""
    from recurgolf.artifact import load
    from recurgolf.artifact.score import rebuild
    from recurgolf.data import ByteCount
    from recurgolf.data.tokenizer import read_tokenizer
    from recurgolf.eval import Text
    from recurgolf.run import Run

    run, pieces = Run.read(folder, trust=True), read_tokenizer(tokenizer)
    counts = np.load(sidecar, allow_pickle=False) if sidecar.exists() else None
    nothing = np.zeros(0, dtype=np.uint16)
    text = Text(nothing, ByteCount.of(pieces), counts, pieces.bos_id)
    scored_model = rebuild(load(folder / "artifact.bin"))
    return {
        name: LocalScorer(how, scored_model, text)
        for name, how in protocols_of(run, folder).items()
    }


def _score(scorer: LocalScorer, arrays: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    found = scorer.score(arrays["tokens"])
    told = {"entry": found.entry, "error": found.error}
    return told, {"nats": found.nats, "times": found.times, "turn": found.turn}


def _guess(scorer: LocalScorer, arrays: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {}, {"shares": scorer.guess(arrays["tokens"], arrays["starts"], arrays["offsets"])}


_ANSWERS = {"score": _score, "guess": _guess}


class Scoring:
    """A run's artifact, data and protocols, as they are found where the plugins are imported."""

    def __init__(self, folder: Path):
        from recurgolf.artifact import ArtifactError, load
        from recurgolf.artifact.decode import MissingLibrary
        from recurgolf.artifact.score import check_data, rebuild, text_of
        from recurgolf.run import Run

        self.run, path = Run.read(folder, trust=True), folder / "artifact.bin"
        if not path.exists():
            raise ConfigError(f"{folder} has no artifact.bin: the run did not finish")
        try:
            self.scored_model = rebuild(load(path))
            self.dataset = self.run.data.prepare()
            check_data(self.scored_model.metadata, self.dataset)
        except (ArtifactError, MissingLibrary) as error:
            raise ConfigError(f"{path}: {error}") from None
        text = text_of(self.dataset)
        self.scorers = {
            name: LocalScorer(how, self.scored_model, text)
            for name, how in protocols_of(self.run, folder).items()
        }

    def facts(self) -> dict[str, Any]:
        from recurgolf.config import kind_of
        from recurgolf.counted.code import Codes

        return {
            "protocols": {n: dataclasses.asdict(s.hints) for n, s in self.scorers.items()},
            "fingerprint": self.run.fingerprint,
            "header": dict(self.scored_model.metadata),
            "parts": self.parts(),
            "code": self.run.artifact.code,
            "program": hashlib.sha256(Codes(self.run).counted.source.encode()).hexdigest(),
            "kind": kind_of(self.run.eval),
            "data": str(self.dataset.folder.resolve()),
            "tokenizer": str(self.dataset.tokenizer.path.resolve()),
            "vocab_size": self.run.data.vocab_size,
            "plugins": plugin_files(self.run.plugins),
        }

    def parts(self) -> dict[str, Any]:
        """What the artifact's header must repeat of the Run."""
        from recurgolf.config import to_dict

        run = self.run
        return {
            "model": {**to_dict(run.model), "mtp_heads": 0},
            "looping": to_dict(run.looping),
            "lora": to_dict(run.lora),
            "eval": to_dict(run.eval.alone),
            "seq_len": run.trainer.seq_len,
        }

    def calibration_rows(self) -> np.ndarray:
        """Rows that the run's quantizer was calibrated on; none where it needs none."""
        from recurgolf.data.calibration_text import CalibrationText

        run, calibration = self.run, self.run.quant.calibration
        if not calibration.reads_training_data or all(r.method != "gptq" for r in run.quant.rules):
            return np.empty((0, 0), dtype=np.uint16)
        length = calibration.seq_len or run.trainer.seq_len
        count = min(calibration.sequences, CALIBRATION_ROWS)
        numbers = np.linspace(0, calibration.sequences - 1, count).astype(int).tolist()
        model, plan = self.scored_model.model, self.scored_model.plan()
        seeds = run.seed_of("data"), run.seed_of("noise")
        source = CalibrationText(self.dataset, model, plan, *seeds, run.data.vocab_size)
        return calibration.rows(source, numbers, length).numpy().astype(np.uint16)


def protocols_of(run: Any, folder: Path) -> dict[str, Any]:
    """All that a run has been scored by, at its end and by `recurgolf evaluate` since.

    Further numbers of passes are left out: they change the model's depth, not what a protocol may
    know.
    """
    from recurgolf.config import from_dict
    from recurgolf.eval import Eval
    from recurgolf.eval.several import FOLDER, kept_settings, named_protocols

    asked = [run.eval.alone, *(item.alone for item in run.eval.also)]
    for path in sorted((folder / FOLDER).glob("*.npz")):
        asked.append(from_dict(Eval, {**kept_settings(path)[0], "passes": run.eval.alone.passes}))
    return named_protocols(asked, run.trainer.seq_len)


def plugin_files(named: list[str]) -> dict[str, str]:
    """Plugin -> the file it was imported from: those that a run names, and installed ones."""
    from importlib.metadata import entry_points

    modules = [*named, *(entry.module for entry in entry_points(group="recurgolf.plugins"))]
    return {name: str(getattr(sys.modules.get(name), "__file__", None)) for name in modules}


def start() -> None:
    """Begin in a fresh interpreter: folder, place for arrays, where answers go, from argv."""
    import torch
    import torch._dynamo

    # Once, for every child: what takes seconds to import and knows nothing of the run.
    import recurgolf.artifact.score
    import recurgolf.counted.code
    import recurgolf.run  # noqa: F401

    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    # What has begun threads cannot be forked.
    torch.set_num_threads(1)
    folder, place, answers = sys.argv[1:]
    with os.fdopen(int(answers), "w") as stream:
        main(Path(folder).resolve(), Path(place).resolve(), stream, threads)
