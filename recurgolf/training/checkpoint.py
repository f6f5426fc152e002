"""Checkpoints: one folder each, tensors in safetensors and everything else in JSON; no pickle.

    checkpoints/step_000600/tensors.safetensors    `<part>/<name>`: model, optimizer, averaging, rng
    checkpoints/step_000600/state.json             step, tokens, loader, clocks, fingerprint, sha256

A checkpoint appears under its name only when it is whole: it is written to a temporary folder,
flushed and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, STATE = "tensors.safetensors", "state.json"


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
    """
    target = folder / f"step_{step:06d}"
    draft = folder / f".step_{step:06d}.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors = {
        f"{part}/{name}": tensor.detach().cpu().contiguous().clone()
        for part, named in parts.items()
        for name, tensor in named.items()
    }
    save_file(tensors, draft / TENSORS)
    digest = _sha256(draft / TENSORS)
    text = json.dumps({**state, "step": step, "tensors_sha256": digest}, indent=1)
    (draft / STATE).write_text(text + "\n")
    for path in (draft / TENSORS, draft / STATE, draft):
        _flush(path)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    _flush(folder)
    return target


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The parts and the state of a checkpoint.

    Raises:
        CheckpointError: a file is missing or its checksum differs.
    """
    try:
        state = json.loads((path / STATE).read_text())
        digest = _sha256(path / TENSORS)
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from None
    if digest != state.get("tensors_sha256"):
        raise CheckpointError(f"checkpoint {path} is damaged: {TENSORS} has another checksum")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / TENSORS).items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return parts, state


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    return max(folder.glob("step_*"), default=None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
