"""Run: the whole of an experiment as one typed, comparable value.

A Run is data. Its parts check themselves; what must hold between parts is checked here, before
any tensor exists. `run.json` is a Run's `to_dict`, and `Run.read` brings it back.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from recurgolf.artifact.codecs import Codec
from recurgolf.budget import Budget
from recurgolf.config import Checked, ConfigError, from_dict, kind_of, load_plugins, to_dict
from recurgolf.data import Data
from recurgolf.disk import DamagedFile, read_json, write_file
from recurgolf.eval import Eval
from recurgolf.limits import at_least, one_of, refused
from recurgolf.looping import Looping, LoopPlan
from recurgolf.lora import LoRA
from recurgolf.model.transformer import TRAINING_ONLY, Model, Transformer
from recurgolf.older import modern
from recurgolf.optim import Averaging, OptimizerConfig
from recurgolf.quant import Quant
from recurgolf.settings import NOT_FINGERPRINTED, TrainerConfig
from recurgolf.tracker import Tracking
from recurgolf.trust import check_trusted

SEED = at_least(0, at_most=2**63 - 1)
"""What the generators of torch, numpy and Python all take."""


@dataclass
class ArtifactConfig(Checked):
    """How the file is written."""

    codec: Codec = field(default_factory=Codec)
    code: Annotated[str, one_of("score", "train")] = "score"
    """Whose bytes count: `score` (score.py, which loads and scores) or `train` (train_gpt.py, which
    trains as well: what the challenge counts)."""


@dataclass
class Seeds(Checked):
    """Separate sources of chance; null: the run's `seed`."""

    init: Annotated[int | None, SEED] = None
    """Of the first weights."""
    data: Annotated[int | None, SEED] = None
    """Of the order of the training text."""
    noise: Annotated[int | None, SEED] = None
    """Of what is drawn while training and packing."""


def fingerprint_of(written: Mapping[str, Any]) -> str:
    """The fingerprint of what stands in a run.json."""
    data = copy.deepcopy({k: v for k, v in written.items() if k not in ("tracker", "plugins")})
    for name in NOT_FINGERPRINTED:
        data["trainer"].pop(name, None)
    data["eval"].pop("audit", None)
    text = json.dumps(data, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class Run:
    """One experiment: what is trained, on what, how it is packed and how it is scored."""

    name: str
    """What its folder and its W&B run are called."""
    model: Model
    looping: Looping
    lora: LoRA
    optimizer: OptimizerConfig
    averaging: Averaging
    quant: Quant
    eval: Eval
    data: Data
    trainer: TrainerConfig
    budget: Budget
    tracker: Tracking
    artifact: ArtifactConfig = field(default_factory=ArtifactConfig)
    seed: Annotated[int, SEED] = 1337
    """All chance of the run; `seeds` sets parts of it apart."""
    seeds: Seeds = field(default_factory=Seeds)
    """Separate sources of chance."""
    plugins: list[str] = field(default_factory=list)
    """Importable modules with components of your own."""

    def __post_init__(self) -> None:
        if wrong := refused(Run, vars(self), ""):
            raise ConfigError(wrong)
        if self.name in ("", ".", "..") or "/" in self.name or not self.name.isprintable():
            raise ConfigError(f"name={self.name!r}: a word without slashes")
        if self.model.vocab_size < self.data.vocab_size:
            raise ConfigError(
                f"model.vocab_size={self.model.vocab_size} is smaller than "
                f"data.vocab_size={self.data.vocab_size}"
            )
        self.data.check()
        self.quant.check()
        self.artifact.codec.check()
        self.looping.check(self.model.num_blocks)
        self.lora.check(self.model.projections, self.largest_plan)
        self.quant.qat.check_plan(self.largest_plan)
        self.eval.check_model(self.model, self.looping)
        if self.quant.qat.learns_steps and self.trainer.trainable != "all":
            raise ConfigError(
                f"trainer.trainable={self.trainer.trainable} with quant/qat="
                f"{kind_of(self.quant.qat)}: the bytes are those of the weights, and these are "
                "to stay as they are; set trainer.trainable=all"
            )

    @property
    def largest_plan(self) -> LoopPlan:
        """The plan that sizes per-visit parameters."""
        return self.looping.largest_plan(self.model.num_blocks)

    @property
    def eval_plan(self) -> LoopPlan:
        return self.looping.eval_plan(self.model.num_blocks, self.eval.alone.passes)

    def plan(self, fraction: float) -> LoopPlan:
        """The training plan at a fraction of training."""
        return self.looping.plan(self.model.num_blocks, fraction)

    def seed_of(self, purpose: str) -> int:
        """The seed for `init`, `data` or `noise`."""
        own = getattr(self.seeds, purpose)
        return self.seed if own is None else own

    def build_model(self) -> Transformer:
        """The network with its adapters, initialised from `seeds.init` (torch's state is set).

        Only what `trainer.trainable` names asks for gradients.
        """
        torch.manual_seed(self.seed_of("init"))
        model = self.model.build(self.largest_plan)
        model.adapters = self.lora.build(self.model.projections, self.largest_plan)
        shapes = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if not name.startswith(TRAINING_ONLY)
        }
        model.quantizers = self.quant.qat.quantizers(self.quant.learned(shapes), self.trainer.steps)
        if self.trainer.trainable == "lora":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith("adapters."))
        return model

    def to_dict(self) -> dict[str, Any]:
        return to_dict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Run:
        """The Run that `to_dict` gave, also that of an earlier version."""
        load_plugins(data.get("plugins", ()))
        return from_dict(cls, modern(data))

    def write(self, folder: Path) -> None:
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        write_file(folder / "run.json", text)

    @classmethod
    def read(cls, folder: Path, trust: bool = False) -> Run:
        """The Run of a finished run's folder."""
        path = Path(folder) / "run.json"
        try:
            data = read_json(path)
        except FileNotFoundError:
            raise ConfigError(f"{folder} is not a run folder: it has no run.json") from None
        if not isinstance(data.get("plugins") or [], list):
            raise DamagedFile(f"{path} is damaged: plugins is no list")
        check_trusted(data.get("plugins") or [], trust)
        run = cls.from_dict(data)
        # No field: it describes the file, and a Run with a changed part (`replace`) has none.
        vars(run)["_written"] = data
        return run

    @property
    def chance(self) -> str:
        """All sources of chance: `3`, or `3 data=7` where one has a seed of its own."""
        own = {k: v for k, v in vars(self.seeds).items() if v is not None}
        return " ".join([str(self.seed), *(f"{key}={own[key]}" for key in sorted(own))])

    @property
    def setting(self) -> str:
        """Hash of what can change a result but for chance: all seeds of a run share it."""
        alike = replace(self, seed=0, seeds=Seeds())
        return alike.fingerprint[:8]

    @property
    def fingerprint(self) -> str:
        """Hash of everything that can change a result; who watches and how often cannot.

        Of a Run that was read from a folder, that of its run.json as it was written, which the
        rest of the folder refers to; an earlier version may have had other fields.
        """
        return fingerprint_of(vars(self).get("_written") or self.to_dict())

    def known_as(self, folder: Path) -> set[str]:
        """The fingerprints that a folder may have recorded for this very Run.

        Its own, and where an earlier version wrote the folder, that version's.
        """
        with contextlib.suppress(ConfigError):
            there = Run.read(folder)
            if replace(there).fingerprint == self.fingerprint:
                return {self.fingerprint, there.fingerprint}
        return {self.fingerprint}

    def tags(self) -> list[str]:
        """`group:kind` of every part, for filtering runs."""
        return [
            f"{name}:{kind_of(part)}"
            for name in ("looping", "optimizer", "averaging", "quant", "eval", "data")
            if hasattr(type(part := getattr(self, name)), "kind")
        ] + [f"lora:{self.lora.rank}" if self.lora.rank else "lora:none"]
