"""Muon: momentum, orthogonalised by a Newton-Schulz iteration (kellerjordan.github.io/posts/muon).

One class for the golf systems' variants: row-normalised (MuonEq-R), banked 3-D parameters, bfloat16
buffers, decoupled or coupled decay. Matrices are dealt over ranks and the result does not depend
on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from recurgolf.config import ConfigError, suggestion
from recurgolf.optim import foreach
from recurgolf.optim.newton_schulz import ARITHMETIC, DTYPES, EPS, zeropower
from recurgolf.optim.work_partition import deal, exchange, rank_and_world

DECAY_MODES = ("none", "decoupled", "coupled_l2")
BUFFER_DTYPES: dict[str, torch.dtype | None] = {"grad": None, "bf16": torch.bfloat16}


@dataclass(eq=False)
class _Piece:
    """One matrix: a 2-D parameter, or slice `index` of a 3-D one, with its group and owner."""

    param: Tensor
    index: int | None
    group: dict[str, Any]
    owner: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.index is None else tensor[self.index]

    @property
    def shape(self) -> torch.Size:
        return self.param.shape[-2:]

    @property
    def cost(self) -> int:
        return self.shape.numel() * min(self.shape)


class Muon(Optimizer):
    """Muon over 2-D parameters and banks of matrices [n, rows, cols].

    Every keyword but `params` may differ per group.

    Args:
        lr: spectral size of one update, times sqrt(max(1, rows / cols)).
        momentum: of the plain sum m = momentum * m + g.
        nesterov: orthogonalise g + momentum * m rather than m.
        ns_steps: Newton-Schulz iterations.
        ns_arithmetic: a key of `ARITHMETIC`.
        ns_dtype: precision of the iterations, `bf16` or `float32`.
        weight_decay: strength; its meaning is `weight_decay_mode`'s.
        weight_decay_mode: `decoupled` shrinks weights by lr * weight_decay before the update;
            `coupled_l2` adds weight_decay * weight to the gradient; `none` ignores it.
        row_normalize: give every row of the momentum unit length first (MuonEq-R).
        buffer_dtype: `grad` keeps the gradient's; `bf16` holds gradient, momentum and their sum in
            bfloat16.
        compat_decay_without_grad: decay parameters whose gradient is absent, too, as
            per_iteration_lora does; otherwise they are left alone.
        compat_shard_rows: orthogonalise a 2-D parameter in so many row shards, each by itself
            (universal_rank1 on so many GPUs); 0: whole.

    Raises:
        ConfigError: an unknown choice, or a parameter that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.04,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_arithmetic: str = "scale_first",
        ns_dtype: str = "bf16",
        weight_decay: float = 0.0,
        weight_decay_mode: str = "decoupled",
        row_normalize: bool = False,
        buffer_dtype: str = "grad",
        compat_decay_without_grad: bool = False,
        compat_shard_rows: int = 0,
    ):
        defaults = dict(
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            ns_arithmetic=ns_arithmetic,
            ns_dtype=ns_dtype,
            weight_decay=weight_decay,
            weight_decay_mode=weight_decay_mode,
            row_normalize=row_normalize,
            buffer_dtype=buffer_dtype,
            compat_decay_without_grad=compat_decay_without_grad,
            compat_shard_rows=compat_shard_rows,
        )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for key, known in CHOICES.items():
            if group[key] not in known:
                raise ConfigError(f"muon: {key}={group[key]!r}{suggestion(group[key], known)}")
        for param in group["params"]:
            if param.ndim not in (2, 3):
                raise ConfigError(
                    f"muon: a parameter of shape {list(param.shape)} is no matrix and no bank of "
                    "matrices; give it to AdamW"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Collective when torch.distributed is up: every rank needs the same gradients.

        Parameters without a gradient keep their momentum and their value.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rank, _ = rank_and_world()
        # Every rank lists the same pieces in the same order; each works on those it owns.
        pieces = [piece for piece in self._pieces() if piece.param.grad is not None]
        mine = {number: piece for number, piece in enumerate(pieces) if piece.owner == rank}
        momenta: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            owned = dict.fromkeys(p.param for p in mine.values() if p.group is group)
            momenta.update(zip(owned, self._momenta(group, list(owned)), strict=True))
        results = self._orthogonalized(mine, momenta)
        updates: list[Tensor] = []
        if pieces:
            shapes, owners = [p.shape for p in pieces], [p.owner for p in pieces]
            device = pieces[0].param.device
            updates = exchange(shapes, owners, results, self._update_dtype(), device)
        self._apply(pieces, updates)
        return loss

    def orthogonalize(self, matrices: Tensor, group: dict[str, Any]) -> Tensor:
        """The direction of the update [n, rows, cols] for momenta of that shape, in `ns_dtype`.

        Always called with a batch, if of one: products of lone matrices may round otherwise.
        """
        dtype = DTYPES[group["ns_dtype"]]
        return zeropower(matrices, group["ns_steps"], dtype, group["ns_arithmetic"])

    def _update_dtype(self) -> torch.dtype:
        """The narrowest that holds every group's updates exactly."""
        groups = {DTYPES[group["ns_dtype"]] for group in self.param_groups}
        return torch.bfloat16 if groups == {torch.bfloat16} else torch.float32

    def _pieces(self) -> list[_Piece]:
        """Every matrix in order, with its owner."""
        pieces = []
        for group in self.param_groups:
            for param in group["params"]:
                indices = [None] if param.ndim == 2 else range(param.shape[0])
                pieces.extend(_Piece(param, index, group) for index in indices)
        _, world = rank_and_world()
        # Dealt anew in every step, from all matrices: who owns what must not depend on which of
        # them have a gradient now, or momentum would be left behind on another rank.
        for piece, owner in zip(pieces, deal([p.cost for p in pieces], world), strict=True):
            piece.owner = owner
        return pieces

    def _momenta(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """What is to be orthogonalised, after updating the momentum buffers."""
        if not params:
            return []
        dtype = BUFFER_DTYPES[group["buffer_dtype"]]
        grads = [
            p.grad if dtype is None else p.grad.to(dtype) for p in params if p.grad is not None
        ]
        if group["weight_decay_mode"] == "coupled_l2" and group["weight_decay"]:
            decay = [p.to(g.dtype) for p, g in zip(params, grads, strict=True)]
            grads = foreach.add(grads, decay, alpha=group["weight_decay"])
        for param, grad in zip(params, grads, strict=True):
            state = self.state[param]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(grad)
        buffers = [self.state[param]["momentum_buffer"] for param in params]
        # A plain sum, not a mean: they differ by a factor (1 - momentum), under Nesterov too, and
        # orthogonalising forgets the scale.
        foreach.scale_(buffers, group["momentum"])
        foreach.add_(buffers, grads)
        momenta = buffers
        if group["nesterov"]:
            momenta = foreach.add(grads, buffers, alpha=group["momentum"])
        if group["row_normalize"]:
            momenta = [m / m.norm(dim=-1, keepdim=True).clamp_min(EPS) for m in momenta]
        return list(momenta)

    def _orthogonalized(
        self, mine: dict[int, _Piece], momenta: dict[Tensor, Tensor]
    ) -> dict[int, Tensor]:
        """Piece number -> update, equal shapes of a group together."""
        together: dict[tuple[Any, ...], list[int]] = {}
        for number, piece in mine.items():
            shards = piece.group["compat_shard_rows"] if piece.index is None else 0
            together.setdefault((id(piece.group), piece.shape, shards), []).append(number)
        results = {}
        for (_, _, shards), numbers in together.items():
            group = mine[numbers[0]].group
            stack = torch.stack([mine[n].of(momenta[mine[n].param]) for n in numbers])
            if shards > 1:
                updates = _by_row_shards(stack, shards, lambda x, g=group: self.orthogonalize(x, g))
            else:
                updates = self.orthogonalize(stack, group)
            results.update(zip(numbers, updates, strict=True))
        return results

    def _apply(self, pieces: list[_Piece], updates: list[Tensor]) -> None:
        whole: dict[Tensor, list[Tensor]] = {}
        for piece, update in zip(pieces, updates, strict=True):
            whole.setdefault(piece.param, []).append(update)
        for group in self.param_groups:
            present = [p for p in group["params"] if p in whole]
            if group["weight_decay_mode"] == "decoupled" and group["weight_decay"]:
                decayed = group["params"] if group["compat_decay_without_grad"] else present
                if decayed:
                    foreach.scale_(decayed, 1 - group["lr"] * group["weight_decay"])
            for param in present:
                parts = whole[param]
                update = parts[0] if param.ndim == 2 else torch.stack(parts)
                rows, cols = param.shape[-2:]
                # A tall matrix turns a unit input into a longer output: its step grows likewise.
                factor = math.sqrt(max(1, rows / cols))
                param.add_(update.to(param.dtype), alpha=-group["lr"] * factor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but buffers keep the precision of `buffer_dtype`, which torch would raise."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            dtype = BUFFER_DTYPES[group["buffer_dtype"]]
            for param in group["params"]:
                if dtype is not None and "momentum_buffer" in self.state.get(param, {}):
                    state = self.state[param]
                    state["momentum_buffer"] = state["momentum_buffer"].to(dtype)
        self.drop_unowned_state()

    def drop_unowned_state(self) -> None:
        """Free the momentum of matrices that another rank orthogonalises."""
        rank, _ = rank_and_world()
        owned = {piece.param for piece in self._pieces() if piece.owner == rank}
        for param in [param for param in self.state if param not in owned]:
            del self.state[param]

    def gather_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Parameter -> its whole state, on every rank. Collective.

        Momentum lives with the owner of a matrix; this is what a checkpoint must hold to be
        loadable by any number of ranks.
        """
        rank, world = rank_and_world()
        if world == 1:
            return {param: dict(state) for param, state in self.state.items()}
        pieces = self._pieces()
        if not pieces:
            return {}
        device = pieces[0].param.device
        begun = torch.tensor([float(p.param in self.state) for p in pieces], device=device)
        torch.distributed.all_reduce(begun, torch.distributed.ReduceOp.MAX)
        pieces = [piece for piece, yes in zip(pieces, begun.tolist(), strict=True) if yes]
        gathered: dict[Tensor, list[Tensor]] = {}
        # One exchange per precision: float32 and bfloat16 buffers do not share one.
        for dtype in dict.fromkeys(map(_buffer_dtype, pieces)):
            alike = [piece for piece in pieces if _buffer_dtype(piece) == dtype]
            mine = {
                number: piece.of(self.state[piece.param]["momentum_buffer"])
                for number, piece in enumerate(alike)
                if piece.owner == rank
            }
            shapes, owners = [p.shape for p in alike], [p.owner for p in alike]
            for piece, part in zip(
                alike, exchange(shapes, owners, mine, dtype, device), strict=True
            ):
                gathered.setdefault(piece.param, []).append(part)
        return {
            param: {"momentum_buffer": parts[0].clone() if param.ndim == 2 else torch.stack(parts)}
            for param, parts in gathered.items()
        }


CHOICES: dict[str, Iterable[str]] = {
    "ns_arithmetic": tuple(ARITHMETIC),
    "ns_dtype": tuple(DTYPES),
    "weight_decay_mode": DECAY_MODES,
    "buffer_dtype": tuple(BUFFER_DTYPES),
}


def _buffer_dtype(piece: _Piece) -> torch.dtype:
    return BUFFER_DTYPES[piece.group["buffer_dtype"]] or piece.param.dtype


def _by_row_shards(stack: Tensor, shards: int, orthogonalize: Callable[[Tensor], Tensor]) -> Tensor:
    """Orthogonalise [n, rows, cols] in `shards` runs of rows, zero rows filling up the last."""
    count, rows, cols = stack.shape
    height = -(-rows // shards)
    filled = torch.nn.functional.pad(stack, (0, 0, 0, height * shards - rows))
    parts = orthogonalize(filled.view(count * shards, height, cols))
    return parts.reshape(count, height * shards, cols)[:, :rows]
