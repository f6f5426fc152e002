"""Which optimizer a parameter belongs to: its role, read off its name, its module and its shape.

A parameter may say its role itself: `parameter.optimizer_role = "scalar"`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from recurgolf.config import ConfigError, suggestion

if TYPE_CHECKING:
    from recurgolf.optim.options import OptimizerConfig

ROLES = ("embed", "head", "matrix", "scalar", "lora", "mtp")

CONTROL = frozenset(
    {"scale", "mix", "gain", "gate", "skip", "smear", "conv"}
    | {f"{word}s" for word in ("scale", "gain", "gate", "skip")}
)
"""Words that mark a control tensor, small and multiplied in, whatever its number of dimensions."""

CONTROL_NAMES = frozenset({"A_log", "dt_bias", "in_proj_a", "in_proj_b"})
"""Whole parts of a name that mark one: decay and writing strength of the gated delta net, whose
projections have a row per head and feed a sigmoid and a softplus."""

_WORD = re.compile(r"[A-Za-z]+")


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


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Name -> role for every parameter that trains; tied ones appear once, under their first name.

    Raises:
        ConfigError: an `optimizer_role` that does not exist, or a parameter that is no float.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    return {
        name: _role(name, param, id(param) in embeddings)
        for name, param in model.named_parameters()
        if param.requires_grad
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
        muon = role in config.muon_roles and _is_matrix(param)
        factor = config.block_lr_factor(passes) if role == "matrix" else 1.0
        looped = factor != 1.0 and _in_blocks(name, looped_blocks)
        # A role that went to Muon keeps the shapes Muon cannot take in a group beside it.
        vectors = role in config.muon_roles and not muon
        key = f"{role}{'_looped' * looped}{'_vectors' * vectors}"
        if key not in groups:
            lr = config.lr_of(role) * (factor if looped else 1.0)
            groups[key] = ParameterGroup(key, role, muon, lr, config.weight_decay_of(role), {})
        groups[key].parameters[name] = param
    if not groups:
        raise ConfigError("the model has no parameter that trains: every one is frozen")
    return sorted(groups.values(), key=lambda group: ROLES.index(group.role))


def _role(name: str, param: nn.Parameter, is_embedding: bool) -> str:
    if not param.is_floating_point():
        raise ConfigError(f"parameter {name} is {param.dtype}: no optimizer can train it")
    role = getattr(param, "optimizer_role", None)
    if role is not None:
        if role not in ROLES:
            raise ConfigError(f"parameter {name}: optimizer_role={role!r}{suggestion(role, ROLES)}")
        return role
    parts = name.split(".")
    if "adapters" in parts:
        return "lora"
    if "mtp" in parts:
        return "mtp"
    if is_embedding:
        return "embed"
    if "lm_head" in parts:
        return "head"
    if parts[-1] in ("weight", "bank") and _is_matrix(param) and not _is_control(parts):
        return "matrix"
    return "scalar"


def _is_matrix(param: nn.Parameter) -> bool:
    return param.ndim in (2, 3) and min(param.shape[-2:]) >= 2


def _is_control(parts: list[str]) -> bool:
    """Whether a control word stands in the name; `gate_proj` is a projection all the same."""
    for part in parts:
        if part in CONTROL_NAMES:
            return True
        if not part.endswith("_proj") and not CONTROL.isdisjoint(_WORD.findall(part)):
            return True
    return False


def _in_blocks(name: str, blocks: Collection[int] | None) -> bool:
    parts = name.split(".")
    if "blocks" not in parts:
        return False
    return blocks is None or int(parts[parts.index("blocks") + 1]) in blocks


__all__ = ["ROLES", "ParameterGroup", "parameter_roles", "split"]
