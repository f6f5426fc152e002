"""Checkpoints: one folder each, tensors in safetensors and everything else in JSON; no pickle.

    checkpoints/step_000600/tensors.safetensors    `<part>/<name>`: model, optimizer, averaging,
                                                    rng (random states of every rank)
    checkpoints/step_000600/state.json             step, tokens, loaders, clocks, the Run, sha256

A checkpoint appears under its name only when it is whole: it is written to a temporary folder,
flushed and renamed. Older ones go after that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recurgolf.config import ConfigError
from recurgolf.disk import flush, json_text, read_json, sha256
from recurgolf.training.faults import full_disk, is_full_disk

TENSORS, STATE = "tensors.safetensors", "state.json"
DRAFT, ASIDE = ".draft_", ".aside_"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text says which and why."""


def save(
    folder: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write a checkpoint and return its folder.

    Args:
        folder: the run's `checkpoints` folder.
        parts: part -> name -> tensor.
        state: JSON-able rest.

    Raises:
        RunFailed: the disk is full; nothing that was there is touched.
    """
    target = folder / f"step_{step:06d}"
    draft = folder / f"{DRAFT}{step:06d}"
    tensors = {
        f"{part}/{name}": tensor.detach().cpu().contiguous().clone()
        for part, named in parts.items()
        for name, tensor in named.items()
    }
    needed = sum(tensor.nbytes for tensor in tensors.values())
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_file(tensors, draft / TENSORS)
        digest = sha256(draft / TENSORS)
        whole = json.loads(json_text({**state, "step": step, "tensors_sha256": digest}))
        whole["state_sha256"] = _digest_of(whole)
        (draft / STATE).write_text(json.dumps(whole, indent=1) + "\n")
        for path in (draft / TENSORS, draft / STATE, draft):
            flush(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        if not is_full_disk(error):
            raise
        last = newest(folder)
        left = "No checkpoint was written yet." if last is None else f"{last} is kept and whole."
        raise full_disk(target, needed, error, left) from None
    _put(draft, target)
    flush(folder)
    return target


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The parts and the state of a checkpoint.

    Raises:
        CheckpointError: a file is missing or its checksum differs.
    """
    state = read_state(path)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / TENSORS).items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return parts, state


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint whose tensors are whole by their checksum.

    Raises:
        CheckpointError: a file is missing or its checksum differs.
        ConfigError: it is under the name of another step.
    """
    try:
        state = json.loads((path / STATE).read_text())
        digest = sha256(path / TENSORS)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from None
    if not isinstance(state, dict) or state.pop("state_sha256", None) != _digest_of(state):
        raise CheckpointError(f"checkpoint {path} is damaged: {STATE} has another checksum")
    if digest != state["tensors_sha256"]:
        raise CheckpointError(f"checkpoint {path} is damaged: {TENSORS} has another checksum")
    named = _step_of(path)
    if named is not None and named != state["step"]:
        # Not passed over: a run that began anew would prune what it saves, and keep this one.
        own = f"step_{state['step']:06d}"
        raise ConfigError(
            f"checkpoint {path} was renamed: it is of step {state['step']}; {own} is its name"
        )
    return state


def steps(folder: Path) -> list[Path]:
    """The checkpoints of a folder, whole or damaged, the newest first."""
    named = {path: step for path in folder.glob("step_*") if (step := _step_of(path)) is not None}
    return sorted((path for path in named if path.is_dir()), key=named.__getitem__, reverse=True)


def _step_of(path: Path) -> int | None:
    """The step that a checkpoint's name says; None under a name that none has."""
    prefix, _, digits = path.name.partition("_")
    return int(digits) if prefix == "step" and digits.isdecimal() else None


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    return next(iter(steps(folder)), None)


def prune(folder: Path, keep_last: int, keep_best: int) -> None:
    """Remove all checkpoints but the newest and the best, and what a crash left half-written.

    Args:
        keep_last: how many of the newest stay.
        keep_best: how many of those with the lowest `val_bpb` in their state stay besides.
    """
    found = steps(folder)
    kept = set(found[:keep_last])
    if keep_best:
        scored = [(bpb, path) for path in found if (bpb := _val_bpb(path)) is not None]
        kept |= {path for _, path in sorted(scored)[:keep_best]}
    for path in set(found) - kept:
        # Renamed first: what is half gone must not pass for a checkpoint.
        aside = folder / f"{ASIDE}{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    for path in [*folder.glob(f"{ASIDE}*"), *folder.glob(f"{DRAFT}*")]:
        shutil.rmtree(path, ignore_errors=True)


def _put(draft: Path, target: Path) -> None:
    """Give a draft its name; a damaged checkpoint under that name makes way."""
    if target.is_symlink():
        target.unlink()  # moved elsewhere, and gone from there
    elif target.exists():
        aside = target.with_name(f"{ASIDE}{target.name}")
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    draft.rename(target)


def _val_bpb(path: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        return read_json(path / STATE).get("val_bpb")
    return None


def _digest_of(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


__all__ = ["CheckpointError", "load", "newest", "prune", "read_state", "save", "steps"]
