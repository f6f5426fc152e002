"""`recurgolf export --check`: the exported program in an interpreter that has no recurgolf."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from recurgolf.config import ConfigError, kind_of
from recurgolf.disk import read_json
from recurgolf.log import Log, counted
from recurgolf.run import Run
from recurgolf.training.own_data import check_own_data
from recurgolf.training.summary import Summary

BLOCKED = ("recurgolf", "hydra", "omegaconf", "wandb", "rich", "scipy")
"""What the exported program must do without; its own modules come before this is asked."""

# Every finder that is there forgets these names; the program then puts its own in front.
_ALONE = """
import runpy, sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {blocked!r}:
            return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_KEPT = ("PATH", "HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "RECURGOLF_CACHE", "TMPDIR")


def check(folder: Path, data: Path | None, log: Log, trust: bool = False) -> int:
    """Score an exported folder on its own, and compare with its summary.json digit for digit.

    Args:
        data: folder of the shards; None: where the run's own data are.
        trust: import plugins that are not installed.

    Returns:
        0, or 1 where the numbers differ or the program fails.
    """
    run, summary = Run.read(folder, trust), Summary.read(folder)
    program = folder / "train_gpt.py"
    if not program.exists():
        raise ConfigError(f"{folder} has no train_gpt.py: it was not made by recurgolf export")
    arguments = ["--evaluate"]
    if data is not None:
        arguments += ["--data", str(data.resolve())]
    else:
        dataset = run.data.prepare(log.line)
        check_own_data(folder, dataset)
        arguments += ["--data", str(dataset.folder.resolve())]
        arguments += ["--tokenizer", str(dataset.tokenizer.path.resolve())]
    threads = summary.environment.get("threads", 1)
    log.line(f"scoring {program} alone, {counted(threads, 'thread')} ...")
    done = run_alone(program, arguments, threads)
    if done.returncode != 0:
        log.line(f"{program} failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        return 1
    try:
        found = json.loads(done.stdout.splitlines()[-1])[kind_of(run.eval)]["val_bpb"]
    except (ValueError, IndexError, KeyError, TypeError, RecursionError):
        log.line(f"{program} prints no score of {kind_of(run.eval)!r} as JSON")
        return 1
    code = compared(found, run, summary, log)
    return max(code, compared_entry(folder, run, summary, log))


def run_alone(
    program: Path, arguments: list[str], threads: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run an exported program where recurgolf cannot be imported, in an empty folder."""
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-I", "-c", _ALONE.format(blocked=BLOCKED), str(program.resolve())]
    with tempfile.TemporaryDirectory() as elsewhere:
        return subprocess.run(
            [*command, *arguments],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )


def compared(found: float, run: Run, summary: Summary, log: Log) -> int:
    """Hold the printed score against the run's; the exit code."""
    told = summary.val_bpb
    if summary.environment.get("ranks", 1) > 1:
        # Ranks batched their windows otherwise than one process does: the last digits may differ.
        same, how = abs(found - told) <= 1e-7 * told, "to 1e-7 (the run had several ranks)"
    else:
        same, how = found == told, "digit for digit"
    if same:
        log.line(f"the exported program scores val_bpb {found!r}: summary.json's, {how}")
        return 0
    log.line(f"DIFFERENT: the exported program scores {found!r}, summary.json says {told!r}")
    return 1


def compared_entry(folder: Path, run: Run, summary: Summary, log: Log) -> int:
    """Hold submission.json against summary.json, and say how the audit stood; the exit code."""
    entry = read_json(folder / "submission.json")
    told = {"val_bpb": summary.val_bpb, "val_loss": summary.val_loss}
    evals = summary.evals[kind_of(run.eval)]["val_bpb"]
    if evals != summary.val_bpb:
        log.line(f"DIFFERENT: summary.json says {summary.val_bpb!r}, its evals {evals!r}")
        return 1
    own = (entry.get("seed_results") or {}).get(str(run.seed), entry)
    if len(entry.get("seeds") or []) == 1:
        own = {**own, **{key: entry[key] for key in told}}
    wrong = [key for key, value in told.items() if own.get(key) != value]
    for key in wrong:
        log.line(
            f"DIFFERENT: submission.json says {key} {own.get(key)!r}, summary.json {told[key]!r}"
        )
    for seed, state in (entry.get("audit") or {str(run.seed): "not audited"}).items():
        log.line(f"audit when it was exported, seed {seed}: {state}")
    return int(bool(wrong))
