"""The optimizers of a run as one: a step, a clip, a state that any number of ranks can load."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from recurgolf.config import ConfigError, suggestion
from recurgolf.optim.groups import ParameterGroup, split
from recurgolf.optim.muon import Muon
from recurgolf.optim.options import OptimizerConfig
from recurgolf.optim.work_partition import rank_and_world


def build(
    config: OptimizerConfig,
    model: nn.Module,
    passes: int = 1,
    looped_blocks: Collection[int] | None = None,
) -> Optimizers:
    """The optimizers of `config` over every parameter of `model` that trains.

    Args:
        model: the plain module, without DDP around it; adapters already attached.
        passes: how often looped blocks are visited (`loop_lr_scale`).
        looped_blocks: indices of these blocks; None: all.

    Raises:
        ConfigError: a parameter that no role fits.
    """
    return Optimizers(config, split(config, model, passes, looped_blocks))


def gather_state(optimizer: Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """Parameter -> its state, complete on every rank. Collective for Muon."""
    if isinstance(optimizer, Muon):
        return optimizer.gather_state()
    return {param: dict(state) for param, state in optimizer.state.items()}


class Optimizers:
    """A Muon and an AdamW (or one of them) over groups of parameters.

    Attributes:
        groups: the groups, by role; iterate over the object for the same.
        members: the torch optimizers.
    """

    def __init__(self, config: OptimizerConfig, groups: list[ParameterGroup]):
        self.config, self.groups = config, groups
        self.muon = _made(config.make_muon, [g for g in groups if g.muon])
        self.adamw = _made(config.make_adamw, [g for g in groups if not g.muon])
        self.members = [member for member in (self.muon, self.adamw) if member is not None]
        self._names: dict[Tensor, str] = {
            p: name for group in groups for name, p in group.parameters.items()
        }
        self._lora_steps = 0

    def __iter__(self) -> Iterator[ParameterGroup]:
        return iter(self.groups)

    @property
    def wants_unsynchronized_gradients(self) -> bool:
        """Whether backward must not average gradients over ranks, since `clip_gradients` will."""
        return self.config.compat_clip_stage == "pre_sync"

    def step(
        self, lr_scale: float = 1.0, momentum: float | None = None, fraction: float | None = None
    ) -> None:
        """One update of every parameter that has a gradient. Collective for Muon.

        Args:
            lr_scale: the schedule's factor on every rate.
            momentum: Muon's, from `config.momentum_at`; None: as configured.
            fraction: of training done; only NuMuon needs it.
        """
        lora = [p for g in self.groups if g.role == "lora" for p in g.parameters.values()]
        active = any(param.grad is not None for param in lora)
        for member in self.members:
            for group in member.param_groups:
                factor = self._lora_factor() if group["role"] == "lora" else 1.0
                group["lr"] = group["base_lr"] * lr_scale * factor
                if member is self.muon:
                    if momentum is not None:
                        group["momentum"] = momentum
                    group["fraction"] = fraction
            member.step()
        # Counted by gradients, not by steps: adapters of delayed loops start to learn later.
        self._lora_steps += active

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def clip_gradients(self) -> dict[str, float]:
        """Limit gradient norms in place; the norms before that, by role or `global`.

        Under `compat_clip_stage=pre_sync` it also averages the gradients over ranks afterwards.
        """
        norms: dict[str, Tensor] = {}
        for name, (params, limit) in self._clips().items():
            grads = [param.grad for param in params if param.grad is not None]
            # Adapters of loops that have not begun have none; the norm of nothing is on the CPU.
            norms[name] = torch.nn.utils.get_total_norm(grads or [params[0].new_zeros(1)])
            if limit:
                torch.nn.utils.clip_grads_with_norm_(params, limit, norms[name])
        if self.wants_unsynchronized_gradients:
            # Behind the clip, as universal_rank1 has it: every rank has clipped its own.
            self._average_gradients()
        # One transfer from the device for all norms.
        values = torch.stack([norm.float() for norm in norms.values()]).tolist()
        return dict(zip(norms, values, strict=True))

    def reset_state(self) -> None:
        """Forget everything learned about the gradients: what follows the warm-up steps."""
        for member in self.members:
            kept = getattr(self.config, "compat_keep_momentum_after_warmup", False)
            if not (kept and member is self.muon):
                member.state.clear()
        self._lora_steps = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Flat: `<parameter>:<entry>` -> tensor (not copied). Collective; whole on every rank.

        Rates and other options are not in it; they are the config's.
        """
        tensors = {"steps:lora": torch.tensor(self._lora_steps)}
        for member in self.members:
            for param, entries in gather_state(member).items():
                for entry, value in entries.items():
                    tensors[f"{self._names[param]}:{entry}"] = value
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave, on any number of ranks; the tensors are copied.

        Raises:
            ConfigError: a parameter that the model lacks, or one of another shape.
        """
        params: dict[str, Tensor] = {name: param for param, name in self._names.items()}
        member_of: dict[Tensor, Optimizer] = {
            param: member
            for member in self.members
            for group in member.param_groups
            for param in group["params"]
        }
        for member in self.members:
            member.state.clear()
        for key, value in tensors.items():
            name, _, entry = key.rpartition(":")
            if key == "steps:lora":
                self._lora_steps = int(value)
                continue
            if name not in params:
                raise ConfigError(
                    f"optimizer state for {name!r}, which no optimizer of this run trains"
                    f"{suggestion(name, params)}"
                )
            param = params[name]
            if value.ndim and value.shape != param.shape:
                raise ConfigError(
                    f"optimizer state {key} has shape {list(value.shape)}; the parameter has "
                    f"{list(param.shape)}"
                )
            member_of[param].state[param][entry] = value.to(param.device, copy=True)
        if isinstance(self.muon, Muon):
            self.muon.drop_unowned_state()

    def _lora_factor(self) -> float:
        warmup = self.config.lora_warmup_steps
        return min(1.0, (self._lora_steps + 1) / warmup) if warmup else 1.0

    def _clips(self) -> dict[str, tuple[list[Tensor], float]]:
        """Name -> parameters clipped together and their limit."""
        config = self.config
        clips: dict[str, tuple[list[Tensor], float]] = {}
        for group in self.groups:
            own = config.lora_grad_clip if group.role == "lora" else None
            shared = config.clip_scope == "global" and own is None
            name = "global" if shared else group.role
            limit = config.grad_clip if own is None else own
            clips.setdefault(name, ([], limit))[0].extend(group.parameters.values())
        return clips

    def _average_gradients(self) -> None:
        _, world = rank_and_world()
        if world == 1:
            return
        for param in self._names:
            if param.grad is not None:
                dist.all_reduce(param.grad)
                param.grad.div_(world)


def _made(
    make: Callable[[list[dict[str, Any]]], Optimizer], groups: list[ParameterGroup]
) -> Optimizer | None:
    return make([group.for_torch() for group in groups]) if groups else None
