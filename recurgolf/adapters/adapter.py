"""An adapter in memory: low-rank factors by place, and the base model they were trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recurgolf.config import ConfigError
from recurgolf.run import Run


class Place(NamedTuple):
    """Where a pair of factors applies.

    Attributes:
        block: index of the block.
        module: path of the linear layer within the block, such as `mixer.q_proj` or `mlp.up_proj`;
            `residual` corrects the block's output.
        iteration: which visit of the block, counted from 0; None: every visit.
    """

    block: int
    module: str
    iteration: int | None = None

    @property
    def path(self) -> str:
        """The module's path in the model: `blocks.1.mixer.q_proj`."""
        return f"blocks.{self.block}.{self.module}"

    @property
    def target(self) -> str:
        """The projection's name, as in `lora.targets`."""
        return self.module.rpartition(".")[2]

    def __str__(self) -> str:
        visit = "" if self.iteration is None else f", iteration {self.iteration}"
        return f"layer {self.block}, module {self.module}{visit}"


@dataclass(frozen=True)
class Factors:
    """`y += (alpha / rank) B A x` with A [rank, in_dim] and B [out_dim, rank] (2106.09685)."""

    a: Tensor
    b: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The update of the weight, [out_dim, in_dim] in float64."""
        return self.scale * (self.b.double() @ self.a.double())


@dataclass(frozen=True)
class Base:
    """The model an adapter was trained on. What is None is unknown and is not checked.

    Attributes:
        fingerprint: hash of the weights, see `fingerprint`.
        tokenizer: SHA-256 of the tokenizer file.
        run: the run's name, for error messages.
    """

    fingerprint: str | None = None
    tokenizer: str | None = None
    run: str | None = None


@dataclass(frozen=True)
class Adapter:
    """Factors by place. Visits beyond a module's last iteration use its last factors.

    Raises:
        ConfigError: no factors, a gap between iterations, or factors for every visit mixed with
            factors for single ones.
    """

    factors: Mapping[Place, Factors]
    base: Base = field(default_factory=Base)

    def __post_init__(self) -> None:
        if not self.factors:
            raise ConfigError("adapter: it holds no factors at all")
        if len({place.iteration is None for place in self.factors}) > 1:
            raise ConfigError(
                "adapter: some factors are for all visits and some for single iterations; "
                "one adapter has one kind"
            )
        for place, found in self.iterations().items():
            without_gap = not found or found[-1] - found[0] == len(found) - 1
            if not without_gap or (found and found[0] > 1):
                raise ConfigError(
                    f"adapter: {place} has iterations {found}; expected each one from 0 or 1 on, "
                    "none left out"
                )

    @property
    def iterated(self) -> bool:
        """Whether different visits of a block have different factors."""
        return any(place.iteration is not None for place in self.factors)

    def iterations(self) -> dict[Place, list[int]]:
        """Adapted module (a place without iteration) -> its iterations, ascending."""
        found: dict[Place, list[int]] = {}
        for place in sorted(self.factors, key=_order):
            numbers = found.setdefault(place._replace(iteration=None), [])
            if place.iteration is not None:
                numbers.append(place.iteration)
        return found

    def at(self, module: Place, nth: int) -> Factors | None:
        """The factors that apply on the `nth` visit of the module's block, if any."""
        numbers = self.iterations()[module]
        if not numbers:
            return self.factors[module]
        if nth < numbers[0]:
            return None
        return self.factors[module._replace(iteration=min(nth, numbers[-1]))]


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Hash of a model's weights without adapters and training-only heads; 16 hex digits.

    It does not depend on where the weights come from: training, a checkpoint or an imported file.
    Quantized weights have another fingerprint than the floats they were made of.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.startswith(("adapters.", "mtp.")):
            continue
        tensor = state[name].detach().cpu().contiguous()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def base_of(run: Run, state: Mapping[str, Tensor], tokenizer: str) -> Base:
    """The record of the base that goes into an adapter trained on these weights.

    Args:
        run: the Run whose result the weights are.
        tokenizer: SHA-256 of its tokenizer file.
    """
    trained_on = run.trainer.base
    name = run.name if trained_on is None else Path(trained_on).name
    return Base(fingerprint(state), tokenizer, name)


def _order(place: Place) -> tuple[int, str, int]:
    return place.block, place.module, -1 if place.iteration is None else place.iteration
