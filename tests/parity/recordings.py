"""The recorded numbers of the four systems: where they lie and how closely they must be met."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from source_names import set_looping
from torch import Tensor

from recurgolf import importers
from recurgolf.importers import Imported

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


def model_folders() -> list[Path]:
    return sorted(folder.parent for folder in GOLDEN.glob("*/models/*/config.json"))


def cases() -> list[tuple[Path, str]]:
    return [(folder, case) for folder in model_folders() for case in config_of(folder)["cases"]]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@functools.cache
def _imported(folder: Path, changes: tuple[tuple[str, Any], ...]) -> Imported:
    settings = config_of(folder)["hyperparameters"] | dict(changes)
    return importers.load(folder.parents[1].name, settings, folder / "weights.safetensors")


def imported(folder: Path, case: str) -> Imported:
    """The recorded model, in the mode of the case and without gradients."""
    how = config_of(folder)["cases"][case]
    known = importers.SYSTEMS[folder.parents[1].name].defaults
    found = _imported(folder, tuple((key, how[key]) for key in how if key.lower() in known))
    found.model.zero_grad(set_to_none=True)
    found.model.train(how["mode"] == "train")
    set_looping(found, how.get("looping_active", True))
    return found


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The recorded model's tensors under its own names."""
    return load_file(folder / "weights.safetensors")


def with_derived(system: str) -> list[Path]:
    """The recorded models of a system whose structure was written down."""
    folders = [folder for folder in model_folders() if folder.parents[1].name == system]
    return [folder for folder in folders if "derived" in config_of(folder)]


def turning(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model that was built but never run, with a rotation that its heads can hold."""
    default = importers.SYSTEMS["universal_rank1"].defaults["rope_dims"]
    dims, heads = settings["model_dim"], settings["num_heads"]
    wide = settings.get("rope_dims", default) > dims // heads
    return dict(settings) | ({"rope_dims": 0} if wide else {})


def recorded(folder: Path, case: str) -> dict[str, Tensor]:
    return load_file(folder / f"{case}.safetensors")


def removes_values_from_normed_outputs(folder: Path, case: str) -> bool:
    """Whether the wider tolerances for XSA on output-normed blocks apply."""
    settings = config_of(folder)["hyperparameters"] | config_of(folder)["cases"][case]
    return "universal" in str(folder) and settings["xsa_last_n"] > 0


def assert_close(actual: Tensor, expected: Tensor, atol: float, rtol: float, what: str) -> None:
    torch.testing.assert_close(
        actual.detach(), expected, atol=atol, rtol=rtol, msg=lambda text: f"{what}: {text}"
    )
