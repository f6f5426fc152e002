"""The chunked form of the gated delta rule, and its derivative written out.

The WY form of 2406.06484, with decay. Within a chunk every write is a triangular solve, only the
state S goes from one chunk to the next. With L the running sum of log_decay from the chunk's start
and D_ij = exp(L_i - L_j), the writes R of a chunk that begins in state S solve

    (I + strict_lower(diag(beta) (K K^T * D))) R = diag(beta) (V - diag(e^L) K S)

whose two right-hand sides are solved for all chunks at once, before S is known. Decays are only
ever formed as exponentials of differences that are not positive: a product of strong decays becomes
zero where the truth is zero, and is never divided by.

Shapes: N chunks of C tokens, B batch, Hk key heads, r value heads to each, K key width, V value
width. No state is kept per token, only one per chunk.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The rule by chunks.

    Args:
        q: queries [B, Hk, 1, T, K], scaled.
        k: keys [B, Hk, 1, T, K].
        v: values [B, Hk, r, T, V].
        beta: writing strength [B, Hk, r, T].
        log_decay: [B, Hk, r, T], at most 0.
        state: S before the first token [B, Hk, r, K, V].
        chunk_size: C.

    Returns:
        The output [B, Hk, r, T, V] and the final state.
    """
    length = v.shape[3]
    size = min(chunk_size, length)
    q, k, v, beta, log_decay = (_split(x, size) for x in (q, k, v, beta, log_decay))
    # In double: L grows along the chunk, and what is needed of it are differences. The floor
    # stands for -inf, which has no differences; its exponential is zero within rounding.
    floor = math.log(torch.finfo(v.dtype).tiny)
    total = log_decay.double().clamp(min=floor).cumsum(-1)
    output, state = Chunks.apply(q, k, v, beta, total, state)
    return output.movedim(0, 3).flatten(3, 4)[:, :, :, :length], state


class Chunks(torch.autograd.Function):
    """All chunks of the WY form, with its derivative written out.

    Autograd would keep and pass over four times as many [C, C] matrices per chunk.
    Shapes: q, k [N, B, Hk, 1, C, K], v [N, B, Hk, r, C, V], beta and total (L) [N, B, Hk, r, C],
    state [B, Hk, r, K, V]; r value heads share a key head.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, total: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        decays = Decays.of(total, v.dtype)
        likeness = k @ k.mT
        system = (beta[..., None] * decays.between).mul_(likeness)
        reading = (q @ k.mT) * decays.between
        # These read the strict lower part of `system` only.
        own = torch.linalg.solve_triangular(
            system, beta[..., None] * v, upper=False, unitriangular=True
        )
        carried = torch.linalg.solve_triangular(
            system, (decays.from_start * beta[..., None]) * k, upper=False, unitriangular=True
        )
        keys = (decays.to_end * k).mT

        states, writes = [], []
        flat = state.flatten(0, 2)
        for own_n, carried_n, keys_n, whole_n in zip(
            *(x.flatten(1, 3).unbind() for x in (own, carried, keys, decays.whole)), strict=True
        ):
            states.append(flat)
            writes.append(torch.baddbmm(own_n, carried_n, flat, alpha=-1))
            flat = torch.baddbmm(whole_n * flat, keys_n, writes[-1])
        before = torch.stack(states).unflatten(1, state.shape[:3])
        written = torch.stack(writes).unflatten(1, state.shape[:3])
        output = ((decays.from_start * q) @ before).add_(reading @ written)
        ctx.save_for_backward(
            *(q, k, v, beta, likeness, system, reading, own, carried, before, written, *decays)
        )
        return output, flat.unflatten(0, state.shape[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        # A backward pass that is started inside autocast would run in half precision here.
        with torch.autocast(grad_output.device.type, enabled=False):
            return _gradients(ctx.saved_tensors, grad_output, grad_state)


def _gradients(
    saved: tuple[Tensor, ...], grad_output: Tensor, grad_state: Tensor
) -> tuple[Tensor, ...]:
    """Of q, k, v, beta, total and state, from those of the output and the final state."""
    q, k, v, beta, likeness, system, reading, own, carried, before, written, *rest = saved
    decays = Decays(*rest)
    strength, heads = beta[..., None], grad_state.shape[:3]
    keys = decays.to_end * k
    from_output = (decays.from_start * q).mT @ grad_output

    # Backwards through the states: grad_writes takes what comes through later chunks.
    flat, by_state, by_write = grad_state.flatten(0, 2), [], []
    grad_writes = reading.mT @ grad_output
    for from_n, write_n, carried_n, keys_n, whole_n in zip(
        *(
            x.flatten(1, 3).unbind()[::-1]
            for x in (from_output, grad_writes, carried, keys, decays.whole)
        ),
        strict=True,
    ):
        by_state.append(flat)
        by_write.append(torch.baddbmm(write_n, keys_n, flat))
        flat = torch.baddbmm(from_n, carried_n.mT, by_write[-1], alpha=-1).addcmul_(whole_n, flat)
    grad_after = torch.stack(by_state[::-1]).unflatten(1, heads)
    grad_own = torch.stack(by_write[::-1]).unflatten(1, heads)

    grad_v_side = torch.linalg.solve_triangular(system.mT, grad_own, upper=True, unitriangular=True)
    # Of -grad_carried: the sign goes into what is made of it.
    grad_k_side = torch.linalg.solve_triangular(
        system.mT, grad_own @ before.mT, upper=True, unitriangular=True
    )
    grad_system = (grad_k_side @ carried.mT).sub_(grad_v_side @ own.mT).tril_(-1)
    grad_reading = grad_output @ written.mT
    # D_ij = exp(L_i - L_j): every entry adds to L_i and takes from L_j. From here on in place as
    # far as can be: on the CPU a new tensor of this size costs more than what is computed in it.
    pairs = (grad_system * system).addcmul_(grad_reading, reading)
    # Summed in double: what a token adds here and takes there must cancel behind it, or tokens of
    # another document would receive what is left.
    grad_total = pairs.sum(-1, dtype=torch.float64) - pairs.sum(-2, dtype=torch.float64)
    grad_system.mul_(decays.between)
    grad_reading.mul_(decays.between)
    from_likeness = torch.mul(grad_system, likeness, out=pairs).sum(-1)
    grad_kk = _over_group(grad_system.mul_(strength))
    grad_qk = _over_group(grad_reading)

    from_start, whole = decays.from_start[..., 0], decays.whole[..., 0]
    grad_keys = (written @ grad_after.mT).mul_(decays.to_end)
    grad_from_q = (grad_output @ before.mT).mul_(decays.from_start)
    by_end = (product := grad_keys * k).sum(-1).double()
    by_key = from_start * torch.mul(grad_k_side, k, out=product).sum(-1)
    grad_total += torch.mul(grad_from_q, q, out=product).sum(-1)
    grad_total -= by_end + beta * by_key
    grad_total[..., -1:] += by_end.sum(-1, keepdim=True)
    grad_total[..., -1:] += whole * grad_after.mul_(before).sum((-2, -1))[..., None]
    grad_beta = (grad_v_side * v).sum(-1).sub_(by_key).add_(from_likeness)

    grad_q = _over_group(grad_from_q).add_(grad_qk @ k)
    grad_keys.addcmul_(decays.from_start * strength, grad_k_side, value=-1)
    grad_k = _over_group(grad_keys).add_((grad_kk + grad_kk.mT) @ k).add_(grad_qk.mT @ q)
    return (
        grad_q,
        grad_k,
        grad_v_side.mul_(strength),
        grad_beta,
        grad_total,
        flat.unflatten(0, heads),
    )


class Decays(NamedTuple):
    """What the running sums L of a chunk's log-decays become.

    Attributes:
        between: D_ij = exp(L_i - L_j), zero above the diagonal [..., C, C].
        from_start: exp(L_i) [..., C, 1].
        to_end: exp(L_C - L_i) [..., C, 1].
        whole: exp(L_C) [..., 1, 1].
    """

    between: Tensor
    from_start: Tensor
    to_end: Tensor
    whole: Tensor

    @classmethod
    def of(cls, total: Tensor, dtype: torch.dtype) -> Decays:
        """Decays are only ever exponentials of differences that are not positive."""
        # Two numbers of the dtype hold a double well enough, and their differences are cheaper.
        high = total.to(dtype)
        low = (total - high).to(dtype)
        gap = high[..., :, None] - high[..., None, :]
        gap.add_(low[..., :, None]).sub_(low[..., None, :])
        between = gap.clamp_(max=0).exp_().tril_()
        from_start = high.exp()[..., None]
        to_end = (total[..., -1:] - total).to(dtype).exp()[..., None]
        return cls(between, from_start, to_end, from_start[..., -1:, :])


def _over_group(x: Tensor) -> Tensor:
    """The sum over the value heads of a key head [N, B, Hk, r, ...] -> [N, B, Hk, 1, ...]."""
    return x if x.shape[3] == 1 else x.sum(3, keepdim=True)


def _split(x: Tensor, size: int) -> Tensor:
    """[B, Hk, H, T, ...] -> [N, B, Hk, H, size, ...]; tokens of zeros behind the end do nothing."""
    missing = -x.shape[3] % size
    x = F.pad(x, (0, 0) * (x.ndim - 4) + (0, missing)) if missing else x
    # Contiguous once here, rather than copied by every product it enters.
    return x.unflatten(3, (-1, size)).movedim(3, 0).contiguous()
