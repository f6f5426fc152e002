"""Which optimizer a parameter belongs to: its role, read off its name, its module and its shape.

A parameter may say its role itself, `parameter.optimizer_role = "scalar"`, and its rate, without
weight decay then: `parameter.optimizer_lr = 0.02`.
"""

from __future__ import annotations

import re

from torch import nn

from recurgolf.config import ConfigError, suggestion

ROLES = ("embed", "head", "matrix", "scalar", "lora", "mtp", "rate")

CONTROL = frozenset(
    {"scale", "mix", "gain", "gate", "skip", "smear", "conv"}
    | {f"{word}s" for word in ("scale", "gain", "gate", "skip")}
)
"""Words that mark a control tensor, small and multiplied in, whatever its number of dimensions."""

CONTROL_NAMES = frozenset({"A_log", "dt_bias", "in_proj_a", "in_proj_b"})
"""Whole parts of a name that mark one: decay and writing strength of the gated delta net, whose
projections have a row per head and feed a sigmoid and a softplus."""

_WORD = re.compile(r"[A-Za-z]+")


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
    if parts[-1] in ("weight", "bank") and is_matrix(param) and not _is_control(parts):
        return "matrix"
    return "scalar"


def is_matrix(param: nn.Parameter) -> bool:
    """Whether it is a matrix, or a bank of them [n, rows, cols]; a vector in disguise is not."""
    return param.ndim in (2, 3) and min(param.shape[-2:]) >= 2


def _is_control(parts: list[str]) -> bool:
    """Whether a control word stands in the name; `gate_proj` is a projection all the same."""
    for part in parts:
        if part in CONTROL_NAMES:
            return True
        if not part.endswith("_proj") and not CONTROL.isdisjoint(_WORD.findall(part)):
            return True
    return False
