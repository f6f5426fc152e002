"""Parameters in groups: those that share an optimizer, a rate and a decay."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from recurgolf.config import ConfigError
from recurgolf.optim.options import OptimizerConfig
from recurgolf.optim.roles import ROLES, is_matrix, parameter_roles


@dataclass
class ParameterGroup:
    """Parameters that share an optimizer, a rate and a decay.

    Attributes:
        name: unique; the role, and what sets the group apart within it.
        role: one of `ROLES`.
        muon: whether a Muon updates it; AdamW otherwise.
        lr: base rate, before any schedule.
        parameters: name in the model -> parameter.
    """

    name: str
    role: str
    muon: bool
    lr: float
    weight_decay: float
    parameters: dict[str, nn.Parameter]

    def for_torch(self) -> dict[str, Any]:
        """The group as torch.optim takes it, with `name`, `role` and `base_lr` beside."""
        return {
            "params": list(self.parameters.items()),
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "name": self.name,
            "role": self.role,
            "base_lr": self.lr,
        }


def split(
    config: OptimizerConfig,
    model: nn.Module,
    passes: int = 1,
    looped_blocks: Collection[int] | None = None,
) -> list[ParameterGroup]:
    """The model's parameters in groups, each parameter in exactly one.

    Args:
        passes: how often the looped blocks are visited, for `loop_lr_scale`.
        looped_blocks: indices of the looped blocks; None: all.
    """
    parameters = dict(model.named_parameters())
    groups: dict[str, ParameterGroup] = {}
    for name, role in parameter_roles(model).items():
        param = parameters[name]
        muon = role in config.muon_roles and is_matrix(param)
        factor = config.block_lr_factor(passes) if role == "matrix" else 1.0
        looped = factor != 1.0 and _in_blocks(name, looped_blocks)
        # A role that went to Muon keeps the shapes Muon cannot take in a group beside it.
        vectors = role in config.muon_roles and not muon
        key = f"{role}{'_looped' * looped}{'_vectors' * vectors}"
        if key not in groups:
            # Parameters that no field of the optimizer is about say their rate themselves.
            own = getattr(param, "optimizer_lr", None)
            lr = own if own is not None else config.lr_of(role) * (factor if looped else 1.0)
            decay = 0.0 if own is not None else config.weight_decay_of(role)
            groups[key] = ParameterGroup(key, role, muon, lr, decay, {})
        groups[key].parameters[name] = param
    if not groups:
        raise ConfigError("the model has no parameter that trains: every one is frozen")
    return sorted(groups.values(), key=lambda group: ROLES.index(group.role))


def _in_blocks(name: str, blocks: Collection[int] | None) -> bool:
    parts = name.split(".")
    if "blocks" not in parts:
        return False
    return blocks is None or int(parts[parts.index("blocks") + 1]) in blocks
