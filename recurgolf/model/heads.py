"""From the last hidden state to logits and to the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recurgolf.model.linear import Linear

CPU_CHUNK = 2**20
"""Logits in memory at once while the loss is computed on a CPU: 4 MB stay in a core's cache."""
GPU_CHUNK = 2**27
"""The same on a GPU, where few large products are quick."""
SAFE_CAP = 40.0
"""Below it, exp(cap) summed over any vocabulary fits float32 and no maximum need be taken off."""


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(logits / cap)`: keeps logits within +-cap and their gradients alive."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class _ReadoutLoss(torch.autograd.Function):
    """Mean cross-entropy of `softcap(hidden W^T)`, a few rows at a time.

    The gradients are formed together with the loss, so that no [tokens, vocab] matrix is ever
    kept: the readout of a small model otherwise spends most of its time on memory traffic.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None
    ) -> Tensor:
        count, vocab = targets.numel(), weight.shape[0]
        step = max(1, (CPU_CHUNK if hidden.device.type == "cpu" else GPU_CHUNK) // vocab)
        matrix = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, count, step):
            rows = slice(start, start + step)
            wanted = targets[rows, None]
            scores = (hidden[rows] @ matrix.t()).float()
            tanh = None
            if cap is not None:
                tanh = scores.div_(cap).tanh_()
                scores = tanh * cap
            if cap is None or cap > SAFE_CAP:
                scores -= scores.amax(dim=-1, keepdim=True)
            of_target = scores.gather(1, wanted)
            masses = scores.exp_()
            mass = masses.sum(dim=-1, keepdim=True)
            total += (mass.log() - of_target).sum()
            if d_hidden is None and d_weight is None:
                continue
            slope = masses.mul_(1 / (mass * count))
            slope.scatter_add_(1, wanted, slope.new_full((len(slope), 1), -1 / count))
            if tanh is not None:
                slope.addcmul_(slope, tanh.square_(), value=-1)
            slope = slope.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows] = slope @ matrix
            if d_weight is not None:
                d_weight += slope.t() @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_weight)
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = grads[0]
        return (
            None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype),
            None if d_weight is None else d_weight * scale,
            None,
            None,
        )


def readout_loss(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    """Mean cross-entropy in nats, in float32, of the soft-capped readout.

    Args:
        hidden: states [..., d].
        weight: readout matrix [v, d].
        targets: token ids [...].
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    with torch.autocast(hidden.device.type, enabled=False):
        return _ReadoutLoss.apply(  # type: ignore[no-any-return]
            hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), cap
        )


class MultiTokenHeads(nn.Module):
    """Training-only heads: head k at position t predicts token t + 2 + k (2404.19737).

    They share the main head's soft cap, start at zero and are left out of the artifact.

    Args:
        drop_last: leave out the last position that still has a target, as per_iteration_lora does.
    """

    def __init__(self, count: int, dim: int, vocab_size: int, drop_last: bool = False):
        super().__init__()
        self.drop_last = drop_last
        self.heads = nn.ModuleList(Linear(dim, vocab_size, zero_init=True) for _ in range(count))

    def positions(self, head: int, length: int) -> int:
        """How many positions, from the first on, head number `head` is trained at."""
        return length - 1 - head - self.drop_last

    def logits(self, head: int, hidden: Tensor, cap: float | None) -> Tensor:
        """Logits [b, positions, v] of one head from states [b, t, d]."""
        used = hidden[:, : self.positions(head, hidden.shape[1])]
        return softcap(self.heads[head](used), cap)

    def loss(self, hidden: Tensor, targets: Tensor, cap: float | None) -> Tensor:
        """Mean over the heads that have a position of their mean loss; 0 where none has.

        Args:
            hidden: states [b, t, d].
            targets: the main head's targets [b, t].
        """
        losses = []
        for k, head in enumerate(self.heads):
            used = self.positions(k, hidden.shape[1])
            if used > 0:
                assert isinstance(head, Linear)
                ahead = targets[:, k + 1 : k + 1 + used]
                losses.append(readout_loss(hidden[:, :used], head.weight, ahead, cap))
        return torch.stack(losses).mean() if losses else hidden.new_zeros(())
