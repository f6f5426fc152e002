"""Transformer blocks: how a mixer and an MLP meet the residual stream.

A block is run once per visit: `block(x, inputs) -> x`, with everything that differs between visits
in `inputs`. Blocks do not know whether they are looped.

Shapes: B batch, T positions that are read, R positions that are wanted (T, but in the last visit of
a scored window: see `VisitInputs.read_from`), D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from recurgolf.config import Checked, option
from recurgolf.limits import one_of
from recurgolf.model.norm import rms_norm
from recurgolf.model.visit import VisitInputs


class ChannelMix(nn.Module):
    """`mix[0] * x + mix[1] * x0` per channel, starting at x."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, dim))

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        mix = self.weight.to(x.dtype)  # (2, D)
        return mix[0] * x + mix[1] * x0  # (B, T, D)


class SigmoidMix(nn.Module):
    """`a x + (1 - a) x0` with one learned a = sigmoid(logit), starting at the middle."""

    def __init__(self, dim: int):
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        return torch.lerp(x0, x, torch.sigmoid(self.logit).to(x.dtype))


class NoMix(nn.Module):
    """x as it is."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        return x


INPUT_MIXES: dict[str, Callable[[int], nn.Module]] = {
    "channel": ChannelMix,
    "sigmoid": SigmoidMix,
    "none": NoMix,
}
"""`block.input_mix` -> constructor(dim)."""


@dataclass
class BlockConfig(Checked):
    """Fields that every block kind has."""

    input_mix: Annotated[str, one_of(INPUT_MIXES)] = "channel"
    """How the block's input is mixed with the state behind the embedding: channel|sigmoid|none."""
    update_gate: bool = False
    """Gate per token between keeping the input and taking the block's output."""

    branch_gains: ClassVar[bool] = True
    """Whether each branch has a learned gain per channel (mixer_scale, mlp_scale)."""

    def build(self, dim: int, mixer: nn.Module, mlp: nn.Module, norm: BlockNorm) -> Block:
        raise NotImplementedError


@dataclass(frozen=True)
class BlockNorm:
    """The norm in front of (or behind) a branch: RMS norm, then a fixed factor."""

    eps: float
    factor: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        normed = rms_norm(x, self.eps)
        return normed if self.factor == 1.0 else normed * self.factor


class Block(nn.Module):
    """What the kinds share: the input mix, the branch gains and the update gate."""

    def __init__(
        self, dim: int, config: BlockConfig, mixer: nn.Module, mlp: nn.Module, norm: BlockNorm
    ):
        super().__init__()
        self.input_mix = INPUT_MIXES[config.input_mix](dim)
        self.mixer, self.mlp, self.norm = mixer, mlp, norm
        self.mixer_scale = nn.Parameter(torch.ones(dim)) if config.branch_gains else None
        self.mlp_scale = nn.Parameter(torch.ones(dim)) if config.branch_gains else None
        self.update_gate = UpdateGate(dim) if config.update_gate else None

    @property
    def reads_x0(self) -> bool:
        """Whether the state behind the embedding comes in at every visit."""
        return not isinstance(self.input_mix, NoMix)

    def forward(self, x: Tensor, inputs: VisitInputs) -> Tensor:
        mixed = self.input_mix(x, inputs.x0)  # (B, T, D)
        out = self.update(mixed, inputs)  # (B, R, D)
        mixed = mixed[:, inputs.read_from :]  # (B, R, D)
        if "residual" in inputs.adapters:
            # The only adapter without a matrix of its own: it corrects what the block puts out.
            out = out + inputs.adapters["residual"](out)
        return out if self.update_gate is None else self.update_gate(mixed, out)

    def update(self, x: Tensor, inputs: VisitInputs) -> Tensor:
        """The block's own rule, from mixed input to the output from `inputs.read_from` on."""
        raise NotImplementedError

    def mixed(self, x: Tensor, inputs: VisitInputs) -> Tensor:
        """The mixer's output from `inputs.read_from` on; a mixer may well compute all of it."""
        y = self.mixer(x, inputs)  # (B, T or R, D)
        # Counted from the end: attention skips unwanted queries, a recurrence cannot.
        return y[:, y.shape[1] - x.shape[1] + inputs.read_from :]

    def mixer_branch(self, x: Tensor, inputs: VisitInputs) -> Tensor:
        return gained(self.mixed(x, inputs), self.mixer_scale, inputs.mixer_gain)

    def mlp_branch(self, x: Tensor, inputs: VisitInputs) -> Tensor:
        return gained(self.mlp(x, inputs.adapters), self.mlp_scale, inputs.mlp_gain)


class UpdateGate(nn.Module):
    """`x + g (out - x)` with g = sigmoid(w . x + b) per token; the gate sees x without a gradient.

    It starts at sigmoid(2), mostly open, the same for every token.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim))
        self.bias = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        # Without the detach the gate would pull the stream towards states that open it.
        gate = nn.functional.linear(x.detach(), self.weight.to(x.dtype), self.bias.to(x.dtype))
        # (B, R, 1): one gate per token
        return x + torch.sigmoid(gate) * (out - x)


def gained(y: Tensor, *gains: Tensor | None) -> Tensor:
    """y times every gain that is there."""
    for gain in gains:
        if gain is not None:
            y = y * gain.to(y.dtype)
    return y


class SequentialBlock(Block):
    """x + mixer(norm x), then x + mlp(norm x): the pre-norm block."""

    def update(self, x: Tensor, inputs: VisitInputs) -> Tensor:
        # The mixer reads all T positions; from here on only the wanted R are computed.
        x = x[:, inputs.read_from :] + self.mixer_branch(self.norm(x), inputs)  # (B, R, D)
        return x + self.mlp_branch(self.norm(x), inputs)


class ParallelBlock(Block):
    """x + mixer(norm x) + mlp(norm x): both branches read the same input (GPT-J)."""

    def update(self, x: Tensor, inputs: VisitInputs) -> Tensor:
        normed, read = self.norm(x), slice(inputs.read_from, None)  # (B, T, D)
        x = x[:, read] + self.mixer_branch(normed, inputs)
        return x + self.mlp_branch(normed[:, read], inputs)


class PeriNormBlock(Block):
    """x + norm(mixer x), then x + norm(mlp x): the norm sits on the output (Peri-LN, 2502.02732).

    There is no input norm, so the input mix is what keeps repeated visits bounded.
    """

    def update(self, x: Tensor, inputs: VisitInputs) -> Tensor:
        # eps alone is the norm's here: a factor on an output norm would scale the branch itself.
        mixed = rms_norm(self.mixed(x, inputs), self.norm.eps)  # (B, R, D)
        x = x[:, inputs.read_from :] + gained(mixed, self.mixer_scale, inputs.mixer_gain)
        mlp = rms_norm(self.mlp(x, inputs.adapters), self.norm.eps)
        return x + gained(mlp, self.mlp_scale, inputs.mlp_gain)


@option("model/block", "sequential")
@dataclass
class SequentialConfig(BlockConfig):
    """The pre-norm block of the official baseline."""

    def build(self, dim: int, mixer: nn.Module, mlp: nn.Module, norm: BlockNorm) -> Block:
        return SequentialBlock(dim, self, mixer, mlp, norm)


@option("model/block", "parallel")
@dataclass
class ParallelConfig(BlockConfig):
    """Mixer and MLP side by side."""

    def build(self, dim: int, mixer: nn.Module, mlp: nn.Module, norm: BlockNorm) -> Block:
        return ParallelBlock(dim, self, mixer, mlp, norm)


@option("model/block", "peri_norm")
@dataclass
class PeriNormConfig(BlockConfig):
    """Output-normed block for looped cores."""

    input_mix: str = "sigmoid"
    branch_gains: ClassVar[bool] = False

    def build(self, dim: int, mixer: nn.Module, mlp: nn.Module, norm: BlockNorm) -> Block:
        return PeriNormBlock(dim, self, mixer, mlp, norm)
