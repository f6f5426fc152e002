"""Which checkpoint a run continues, and whether it may.

`trainer.resume=auto` takes the newest whole checkpoint of the run's own folder, a path takes that
run's or that checkpoint's. Fields of the Run that cannot change the weights may differ; any other
difference is refused by name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurgolf.config import ConfigError
from recurgolf.disk import read_json
from recurgolf.log import counted
from recurgolf.record import read_jsonl
from recurgolf.run import Run
from recurgolf.settings import NOT_FINGERPRINTED
from recurgolf.training import checkpoint
from recurgolf.training.summary import FILE as SUMMARY
from recurgolf.training.summary import Summary
from recurgolf.trust import check_trusted

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
ARTIFACT = "artifact.bin"
RESULT = (
    *(SUMMARY, ARTIFACT, "score.py", "train_gpt.py", "ledger.json"),
    *("scores", "audit.json", "seal.json"),
)
"""What a run leaves at its end."""
RESULT_ASIDE = "result_before_"

ONLY_ROUNDING = ("devices", "threads", "grad_accum", "activation_checkpointing", "compile")
"""Trainer fields that change the order of sums at most: equal within 1e-5, not bit for bit."""

PRE_SYNC = "pre_sync"

MAY_CHANGE_ON_RESUME = (
    *(*NOT_FINGERPRINTED, *ONLY_ROUNDING),
    *("compile_backend", "non_finite", "max_skipped"),
)
"""Trainer fields that may differ between a run and its continuation."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """A checkpoint to continue from.

    Attributes:
        path: its folder.
        state: its state.json.
        remark: a line for the log when the continuation is not bit for bit; empty otherwise.
    """

    path: Path
    state: dict[str, Any]
    remark: str = ""

    def is_of(self, folder: Path) -> bool:
        """Whether it is one of this folder's, so that the run goes on rather than branches off."""
        return self.path.parent.resolve() == (folder / CHECKPOINTS).resolve()


def find(run: Run, folder: Path, say: Say) -> Found | None:
    """The checkpoint that this run continues from; None where it starts anew.

    Args:
        folder: the run's own folder.
        say: told of damaged checkpoints that were passed over.

    Raises:
        ConfigError: the checkpoint is of another run, or there is none where one was named.
    """
    asked = run.trainer.resume
    if asked == "never":
        return None
    place = folder if asked == "auto" else Path(asked).expanduser()
    if asked != "auto" and not place.is_dir():
        raise ConfigError(f"trainer.resume={asked!r}: no such folder (or auto, never)")
    single = (place / checkpoint.STATE).exists()
    candidates = [place] if single else checkpoint.steps(place / CHECKPOINTS)
    for path in candidates:
        try:
            state = checkpoint.read_state(path)
        except checkpoint.CheckpointError as error:
            say(f"{error}; trying the one before")
            continue
        return Found(path, state, compare(run, state, path))
    if asked != "auto":
        damaged = f", {len(candidates)} damaged ones" if candidates else ""
        raise ConfigError(f"trainer.resume={asked!r}: no whole checkpoint in it{damaged}")
    if candidates:
        say(f"none of the {len(candidates)} checkpoints is whole: starting anew")
    else:
        # Without hydra.run.dir every command makes a folder of its own, and there never is one.
        say(
            f"trainer.resume=auto: no checkpoint in {folder}, starting anew (an earlier run goes "
            "on with: recurgolf resume FOLDER)"
        )
    return None


def compare(run: Run, state: dict[str, Any], path: Path) -> str:
    """Refuse another run's checkpoint; the remark of `Found` otherwise.

    Raises:
        ConfigError: every field that differs and may not, with both values.
    """
    changes = changes_since(run, state["run"])
    refused = refused_changes(changes)
    if refused:
        raise ConfigError(
            f"{path} belongs to another run; these differ: {', '.join(refused)}. Resume it with "
            "its own settings (recurgolf resume FOLDER), use another folder, or start anew with "
            "trainer.resume=never"
        )
    rounding = [
        f"{name}={changes[f'trainer.{name}'][1]} (was {changes[f'trainer.{name}'][0]})"
        for name in ONLY_ROUNDING
        if f"trainer.{name}" in changes
    ]
    if not rounding:
        return ""
    if "trainer.devices" in changes and getattr(run.optimizer, "compat_clip_stage", "") == PRE_SYNC:
        return (
            f"continued with {', '.join(rounding)}: another result, since under "
            f"optimizer.compat_clip_stage={PRE_SYNC} every rank clips its own gradients"
        )
    return (
        f"continued with {', '.join(rounding)}: equal to the undisturbed run within rounding "
        "(1e-5), not bit for bit"
    )


def changes_since(run: Run, written: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (before, now), of what a run.json or checkpoint says and of a Run."""
    before = written
    with contextlib.suppress(ConfigError):  # fields that were added since take their defaults
        check_trusted(written.get("plugins") or [], trust=False)
        before = Run.from_dict(written).to_dict()
    return differences(before, run.to_dict())


def refused_changes(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Those changes that make another run of it: `seed=3 (was 1)`."""
    free = {f"trainer.{name}" for name in MAY_CHANGE_ON_RESUME}
    return [
        f"{key}={now!r} (was {before!r})"
        for key, (before, now) in changes.items()
        if key not in free and key.partition(".")[0] not in ("tracker", "plugins", "name")
    ]


def differences(before: Any, now: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (before, now) of two trees of plain data, where they differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*before, *(key for key in now if key not in before)]:
            inner = f"{path}.{key}" if path else str(key)
            found |= differences(before.get(key), now.get(key), inner)
        return found
    return {} if before == now else {path: (before, now)}


def finished(run: Run, folder: Path) -> Summary | None:
    """The result of a run that already ended well in this folder, under `trainer.resume=auto`."""
    there = all((folder / name).exists() for name in (SUMMARY, ARTIFACT))
    if run.trainer.resume != "auto" or not there:
        return None
    try:
        summary, events = Summary.read(folder), read_jsonl(folder / METRICS)
    except (OSError, ValueError, TypeError):
        return None
    last = events[-1] if events else {}
    ended_well = last.get("event") == "finish" and last["values"]["exit_code"] == 0
    ended_well = ended_well and summary.status != "diverged"
    return summary if ended_well and summary.fingerprint in run.known_as(folder) else None


def check_unused(run: Run, folder: Path) -> None:
    """Refuse to begin in a folder that is another run's, whose results would pass for this one's.

    Raises:
        ConfigError: the folder, what is in it, and how to go on.
    """
    path = folder / "run.json"
    if not path.is_file() or path.stat().st_size == 0 or _is_run_of(run, folder):
        return
    try:
        refused = refused_changes(changes_since(run, read_json(path)))
    except (ValueError, TypeError, AttributeError, KeyError):
        refused = ["all of it: its run.json is damaged"]
    if refused:
        what = "a finished run" if (folder / SUMMARY).exists() else "a run that did not finish"
        raise ConfigError(
            f"{folder} belongs to another run, {what}; these differ: {', '.join(refused)}. Resume "
            "it with its own settings (recurgolf resume FOLDER) or use another folder "
            "(hydra.run.dir)"
        )


def set_result_aside(folder: Path) -> str:
    """Move the result of an earlier attempt aside, so that it cannot pass for that of the next.

    Returns:
        The folder's name that it is in now; empty where there was none.
    """
    names = [name for name in RESULT if (folder / name).exists()]
    if SUMMARY not in names:
        return ""
    number = 1
    while (aside := folder / f"{RESULT_ASIDE}{number}").exists():
        number += 1
    aside.mkdir()
    for name in names:  # the summary first: without it the rest is no result
        (folder / name).rename(aside / name)
    return aside.name


def make_room(run: Run, folder: Path, found: Found | None, say: Say) -> None:
    """Leave in a run's folder only what the checkpoint to continue from knows of.

    What was recorded behind it is cut off, since it will be recorded again. Checkpoints that are
    newer, or of another run, are moved aside.
    """
    check_unused(run, folder)
    if aside := set_result_aside(folder):
        say(f"the result of an earlier run in this folder is now in {aside}")
    own = found is not None and found.is_of(folder)
    kept = found.state["metrics_bytes"] if own and found is not None else 0
    path = folder / METRICS
    # A run that ended before its first checkpoint is begun again, and so is its record.
    again = own or (found is None and run.trainer.resume == "auto" and _is_run_of(run, folder))
    if again and path.exists() and path.stat().st_size > kept:
        os.truncate(path, kept)
    there = folder / CHECKPOINTS
    last = found.state["step"] if own and found is not None else -1
    passed = [path for path in checkpoint.steps(there) if int(path.name[5:]) > last]
    if not passed:
        return
    number = 1
    while (aside := folder / f"{CHECKPOINTS}_before_{number}").exists():
        number += 1
    aside.mkdir()
    for path in passed:
        path.rename(aside / path.name)
    many = counted(len(passed), "checkpoint")
    say(f"{many} that this run does not continue from: now in {aside.name}")


def _is_run_of(run: Run, folder: Path) -> bool:
    try:
        return Run.read(folder).fingerprint in run.known_as(folder)
    except (ConfigError, TypeError, KeyError):
        return False


__all__ = ["CHECKPOINTS", "Found", "check_unused", "find", "finished", "make_room"]
