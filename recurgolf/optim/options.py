"""The optimizer options: rates, decays and clips by role, momentum, and who updates what."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch.optim import Optimizer

from recurgolf.config import Checked, option
from recurgolf.limits import above, at_least, one_of
from recurgolf.optim.muon import BUFFER_DTYPES, DECAY_MODES, Muon
from recurgolf.optim.newton_schulz import ARITHMETIC, DTYPES
from recurgolf.optim.numuon import NuMuon
from recurgolf.optim.schedule import Schedule

LOOP_LR_SCALES: dict[str, Callable[[int], float]] = {
    "none": lambda passes: 1.0,
    "inv_sqrt_passes": lambda passes: 1 / math.sqrt(passes),
}


@dataclass
class OptimizerConfig(Checked):
    """What every optimizer has: a rate and a decay per role, AdamW's constants, clips, a schedule.

    Decay is decoupled (AdamW's): a step shrinks weights by lr times it.
    """

    matrix_lr: Annotated[float, at_least(0)] = 0.04
    """Projections of the blocks and elsewhere."""
    embed_lr: Annotated[float, at_least(0)] = 0.05
    """Embedding tables; tied ones bear a small rate (0.05), untied ones a large one (0.6)."""
    head_lr: Annotated[float, at_least(0)] = 0.008
    """The untied output head."""
    scalar_lr: Annotated[float, at_least(0)] = 0.04
    """Gains, gates, mixes, skip weights: every vector and every control tensor."""
    lora_lr: Annotated[float, at_least(0)] = 0.01
    """Low-rank adapters."""
    mtp_lr: Annotated[float, at_least(0)] = 0.008
    """Multi-token heads, which exist in training only."""

    matrix_weight_decay: Annotated[float, at_least(0)] = 0.0
    """Decay of what matrix_lr moves; 0: none."""
    embed_weight_decay: Annotated[float, at_least(0)] = 0.0
    """Decay of the embedding tables; 0: none."""
    head_weight_decay: Annotated[float, at_least(0)] = 0.0
    """Decay of the untied head; 0: none."""
    scalar_weight_decay: Annotated[float, at_least(0)] = 0.0
    """Decay of vectors and control tensors; 0: none."""
    lora_weight_decay: Annotated[float, at_least(0)] = 0.0
    """Decay of the adapters; 0: none."""
    mtp_weight_decay: Annotated[float, at_least(0)] = 0.0
    """Decay of the multi-token heads; 0: none."""

    beta1: Annotated[float, at_least(0, below=1)] = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: Annotated[float, at_least(0, below=1)] = 0.95
    """AdamW's decay of the mean squared gradient."""
    eps: float = 1e-8
    """AdamW's constant beside the root of the latter."""

    grad_clip: Annotated[float, at_least(0)] = 0.0
    """Largest gradient norm; 0: no clipping."""
    clip_scope: Annotated[str, one_of("group", "global")] = "group"
    """`group`: every role has its own norm. `global`: one norm over everything."""
    lora_grad_clip: Annotated[float | None, at_least(0)] = None
    """The adapters' own limit, which also takes them out of the global norm; null: grad_clip."""
    compat_clip_stage: Annotated[str, one_of("post_sync", "pre_sync")] = "post_sync"
    """`pre_sync` clips every rank's own gradients before they are averaged (universal_rank1)."""
    lora_warmup_steps: Annotated[int, at_least(0)] = 0
    """Steps with gradients over which the adapters' rate grows linearly from 1/n; 0: none."""
    loop_lr_scale: Annotated[str, one_of(LOOP_LR_SCALES)] = "none"
    """`inv_sqrt_passes` divides the matrix rate of looped blocks by the square root of passes."""

    # The base class is the default so that any schedule can be composed into its place.
    schedule: Schedule = field(default_factory=Schedule)
    """The factor on all rates over training."""

    @property
    def muon_roles(self) -> frozenset[str]:
        """Roles whose matrices a Muon updates."""
        return frozenset()

    def lr_of(self, role: str) -> float:
        return getattr(self, f"{role}_lr")

    def weight_decay_of(self, role: str) -> float:
        return getattr(self, f"{role}_weight_decay")

    def block_lr_factor(self, passes: int) -> float:
        """Factor on the matrix rate of blocks that are visited `passes` times."""
        return LOOP_LR_SCALES[self.loop_lr_scale](passes)

    def momentum_at(self, step: int) -> float:
        """Momentum after `step` finished steps; here AdamW's constant first beta."""
        return self.beta1

    def make_adamw(self, groups: list[dict[str, Any]]) -> Optimizer:
        """AdamW over torch parameter groups; without decay it is Adam."""
        devices = {param.device.type for group in groups for _, param in group["params"]}
        return torch.optim.AdamW(
            groups,
            lr=0.0,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=devices <= {"cpu", "cuda"},
        )

    def make_muon(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer of the groups in `muon_roles`."""
        raise NotImplementedError


@option("optimizer", "adamw")
@dataclass
class AllAdamW(OptimizerConfig):
    """AdamW for every parameter."""

    matrix_lr: float = 0.002
    embed_lr: float = 0.002
    head_lr: float = 0.002
    scalar_lr: float = 0.002
    lora_lr: float = 0.002
    mtp_lr: float = 0.002
    matrix_weight_decay: float = 0.1
    grad_clip: float = 1.0
    clip_scope: str = "global"


@option("optimizer", "muon_adam")
@dataclass
class MuonAdam(OptimizerConfig):
    """Muon for matrices, AdamW for the rest; rates of the official baseline."""

    matrix_optimizer: Annotated[str, one_of("muon", "numuon")] = "muon"
    """`muon`, or `numuon`: leading singular directions only, fewer as training goes on."""
    momentum: Annotated[float, at_least(0, below=1)] = 0.95
    """Muon's momentum, once warmed up."""
    momentum_start: Annotated[float, at_least(0, below=1)] = 0.85
    """Momentum at the first step."""
    momentum_warmup_steps: Annotated[int, at_least(0)] = 500
    """Steps over which momentum grows linearly from start to its value; 0: constant."""
    nesterov: bool = True
    """Muon steps along gradient plus momentum; false: along the momentum alone."""
    ns_steps: Annotated[int, at_least(1)] = 5
    """Newton-Schulz iterations."""
    ns_arithmetic: Annotated[str, one_of(ARITHMETIC)] = "scale_first"
    """Order of rounding: `scale_first` (most systems), `square_first`
    (universal_rank1), `fused` (fastest)."""
    ns_dtype: Annotated[str, one_of(DTYPES)] = "bf16"
    """Precision of the iterations: `bf16`, or `float32` where a CPU multiplies that faster."""
    row_normalize: bool = False
    """Unit rows before orthogonalising (MuonEq-R)."""
    weight_decay_mode: Annotated[str, one_of(DECAY_MODES)] = "decoupled"
    """What matrix_weight_decay does: `decoupled`, `coupled_l2` (added to the gradient), `none`."""
    buffer_dtype: Annotated[str, one_of(BUFFER_DTYPES)] = "grad"
    """`bf16` keeps gradient and momentum in bfloat16; `grad` in the gradient's own precision."""
    lora_optimizer: Annotated[str, one_of("adamw", "muon")] = "adamw"
    """`muon` gives the adapters' matrices to Muon: their updates then have a fixed size."""
    mtp_optimizer: Annotated[str, one_of("adamw", "muon")] = "adamw"
    """Who updates the matrices of the multi-token heads."""
    numuon_min_rank: Annotated[float, above(0, at_most=1)] = 0.25
    """Share of singular directions left at the end of training."""

    compat_decay_without_grad: bool = False
    """Decoupled decay also for matrices without a gradient (per_iteration_lora)."""
    compat_shard_rows: Annotated[int, at_least(0)] = 0
    """Orthogonalise plain matrices in so many row shards, as universal_rank1 does on so many GPUs;
    0: whole."""
    compat_keep_momentum_after_warmup: bool = False
    """Let Muon's momentum of the warm-up steps leak into training (universal_rank1)."""

    @property
    def muon_roles(self) -> frozenset[str]:
        asked = {"lora": self.lora_optimizer, "mtp": self.mtp_optimizer}
        return frozenset({"matrix", *(role for role, by in asked.items() if by == "muon")})

    def momentum_at(self, step: int) -> float:
        """Muon's momentum after `step` finished steps."""
        if step >= self.momentum_warmup_steps:
            return self.momentum
        done = step / self.momentum_warmup_steps
        return (1 - done) * self.momentum_start + done * self.momentum

    def make_muon(self, groups: list[dict[str, Any]]) -> Optimizer:
        options: dict[str, Any] = dict(
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            ns_arithmetic=self.ns_arithmetic,
            ns_dtype=self.ns_dtype,
            weight_decay_mode=self.weight_decay_mode,
            row_normalize=self.row_normalize,
            buffer_dtype=self.buffer_dtype,
            compat_decay_without_grad=self.compat_decay_without_grad,
            compat_shard_rows=self.compat_shard_rows,
        )
        if self.matrix_optimizer == "numuon":
            return NuMuon(groups, min_rank=self.numuon_min_rank, **options)
        return Muon(groups, **options)
