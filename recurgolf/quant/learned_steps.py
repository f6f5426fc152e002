"""Learned quantizer steps: what layers see of a tensor, and what its codes cost.

`rate.py` trains with them; nothing here knows of a budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recurgolf.quant.quantized_tensor import QuantizedTensor, per_column, scale_shape
from recurgolf.quant.rate_models import CODES, LIMIT, RateModel

PER_OCTAVE = 8
"""Steps are 2^(k/8): a code of a few bits in the file, where a free float16 takes eleven."""
TOKENS = "embed.weight"
"""The table of tokens, whose rows keep a code: a row of zeros is a state of length zero, and every
norm that it meets multiplies the gradient by 1 / sqrt(norm_eps), to 1e9 and beyond."""
SMALLEST, LARGEST = -13.0, 12.0
"""log2 of the smallest and the largest step; float16 has fewer digits below, and ends above."""


def rounded(weight: Tensor, step: Tensor, rows_stay: bool) -> Tensor:
    """Codes from -127 to 127, as floats; `rows_stay`: in every row at least the largest entry's."""
    codes = (weight / step).round_().clamp_(-LIMIT, LIMIT)
    if rows_stay:
        largest = weight.abs().argmax(dim=1, keepdim=True)
        sign = torch.where(weight.gather(1, largest) < 0, -1.0, 1.0).to(codes.dtype)
        gone = ~codes.any(dim=1, keepdim=True)
        codes.scatter_(1, largest, torch.where(gone, sign, codes.gather(1, largest)))
    return codes


class StepRounding(torch.autograd.Function):
    """`step * round(w / step)` with codes from -127 to 127; steps broadcast over w.

    Gradients go to w and to `log_step`, of which the steps are the rounded powers of two.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, log_step: Tensor, step: Tensor, rows_stay: bool
    ) -> Tensor:
        seen = rounded(weight, step, rows_stay).mul_(step)
        # What the step's gradient needs: the value seen less the weight, step * (code - w / step).
        ctx.save_for_backward(seen - weight)
        ctx.shape = log_step.shape
        return seen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (error,) = grads, ctx.saved_tensors
        return grad, (grad * error).sum_to_size(ctx.shape) * math.log(2), None, None


class TableBits(torch.autograd.Function):
    """Bits of `w / step + noise` under a table [255] of bits per code, summed over the weight."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, log_step: Tensor, step: Tensor, table: Tensor, noise: Tensor
    ) -> Tensor:
        value = weight / step
        place = noise.add_(value).add_(LIMIT).clamp_(0, 2 * LIMIT - 1e-3)
        low = place.int()
        slope = table.diff()[low]
        bits = torch.addcmul(table[low], slope, place.sub_(low))
        ctx.save_for_backward(slope / step, value.mul_(slope).sum_to_size(log_step.shape))
        return bits.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_weight, to_step = ctx.saved_tensors
        return grads[0] * to_weight, -grads[0] * to_step * math.log(2), None, None, None


class LearnedSteps(nn.Module):
    """The steps of a model's tensors, and what is known of their codes; a part of the model.

    Parameters lie beside the model's own, so that they are optimized, averaged, saved and resumed
    like these; what carries over from step to step lies in buffers.

    Attributes:
        log_steps: tensor name, dots as colons -> log2 of its steps, [rows, groups] of a matrix,
            [1, 1] where all share one, [1] * ndim of what is no matrix.
        counts: [tensors, 255] how often every code from -127 to 127 came at the last look.
        tables: [tensors, 255] bits of every code.
        log_rate: natural logarithm of λ.
        log_factor: log2 of the factor on all steps.
        overhead: bits of the file beyond the entropy of the codes, when it was last packed.
        progress: share of the active part of training that was done at the last look.
        age: optimizer steps since it began; below 0: it has not.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        model: RateModel,
        *,
        per: str,
        group_size: int | None,
        share: float,
        lr: float,
        first_rate: float,
    ):
        """Steps of tensors of these shapes; `start_at` gives them their size.

        Args:
            per, group_size, share, lr: as `Rate` has them.
            first_rate: λ to begin with.
        """
        super().__init__()
        self.names, self.rate_model = list(shapes), model
        self.group_size, self.share = group_size, share
        self.numel = sum(math.prod(shape) for shape in shapes.values())
        self.log_steps = nn.ParameterDict()
        for name, shape in shapes.items():
            matrix = len(shape) == 2 and per != "tensor"
            start = scale_shape(tuple(shape), group_size or shape[1], True) if matrix else ()
            parameter = nn.Parameter(torch.zeros(start or [1] * len(shape)))
            parameter.optimizer_role, parameter.optimizer_lr = "rate", lr  # type: ignore[attr-defined]
            self.log_steps[_key(name)] = parameter
        double = torch.float64
        for name, value in (
            ("counts", torch.zeros(len(self.names), CODES, dtype=double)),
            ("tables", torch.zeros(len(self.names), CODES)),
            ("log_rate", torch.tensor(math.log(first_rate), dtype=double)),
            ("log_factor", torch.tensor(0.0, dtype=double)),
            ("overhead", torch.tensor(0.0, dtype=double)),
            ("progress", torch.tensor(0.0, dtype=double)),
            ("age", torch.tensor(-1)),
        ):
            self.register_buffer(name, value)
        self.counts: Tensor
        self.tables: Tensor
        self.log_rate: Tensor
        self.log_factor: Tensor
        self.overhead: Tensor
        self.progress: Tensor
        self.age: Tensor

    @property
    def active(self) -> bool:
        """Whether layers see the file's values."""
        return int(self.age) >= 0

    @torch.no_grad()
    def scales(self, name: str) -> Tensor:
        """A tensor's steps as the file will hold them: float16, shaped as its parameter."""
        shifted = self.log_steps[_key(name)] + self.log_factor.float()
        levels = (shifted.clamp(SMALLEST, LARGEST) * PER_OCTAVE).round()
        return (levels / PER_OCTAVE).exp2().half()

    def broadcast(self, name: str, per_step: Tensor, shape: Sequence[int]) -> Tensor:
        """What is shaped as a tensor's steps, so that it broadcasts over the tensor."""
        if per_step.ndim == 2 and per_step.shape[1] > 1:
            return per_column(per_step, tuple(shape), self.group_size)
        return per_step

    def steps_of(self, name: str, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The parameter and the steps, as they broadcast over a tensor of this shape."""
        free, step = self.log_steps[_key(name)], self.scales(name).float()
        return self.broadcast(name, free, shape), self.broadcast(name, step, shape)

    @torch.no_grad()
    def start_at(self, weights: Mapping[str, Tensor], bits: float) -> None:
        """Steps in proportion to the size of rows, so that all codes take about so many bits."""
        low, high = -6.0, 2.0
        for _ in range(12):
            middle = (low + high) / 2
            self._start(weights, middle)
            low, high = (middle, high) if self.look(weights) > bits else (low, middle)
        self._start(weights, high)
        self.look(weights)

    def _start(self, weights: Mapping[str, Tensor], log_relative: float) -> None:
        for name in self.names:
            size = self._by_step(name, weights[name].square(), torch.mean).sqrt()
            # What starts at zero will not stay there: as if it were small.
            wanted = size.clamp_min(0.01) * 2.0**log_relative
            self.log_steps[_key(name)].copy_(wanted.log2().clamp_min(SMALLEST))

    def _by_step(self, name: str, values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        """Values of a tensor reduced to the shape of its steps."""
        steps = self.log_steps[_key(name)]
        if steps.ndim != 2 or steps.numel() == 1:
            return reduce(values).reshape(steps.shape)
        if steps.shape[1] == 1:
            return reduce(values, dim=1).reshape(steps.shape)
        parts = values.split(self.group_size or values.shape[1], dim=1)
        return torch.stack([reduce(part, dim=1) for part in parts], dim=1)

    @torch.no_grad()
    def codes(self, name: str, weight: Tensor) -> Tensor:
        """The codes of a weight, int8."""
        _, step = self.steps_of(name, weight.shape)
        return rounded(weight, step, name == TOKENS).to(torch.int8)

    @torch.no_grad()
    def look(self, weights: Mapping[str, Tensor]) -> float:
        """Count the present codes; bits of all by the entropy of every tensor.

        Steps that are too small for their largest entry grow, so that no code is beyond 127; those
        that make zeros of all entries stay within reach of a way back.
        """
        for name in self.names:
            steps = self.log_steps[_key(name)]
            largest = self._by_step(name, weights[name].abs(), torch.amax)
            least = largest.clamp_min(1e-9).log2() - math.log2(LIMIT - 7)
            most = largest.clamp_min(2.0**-6).log2() + 2
            factor = self.log_factor.float()
            steps.copy_((steps + factor).clamp(least, torch.maximum(least, most)) - factor)
        return self.count(weights)

    @torch.no_grad()
    def count(self, weights: Mapping[str, Tensor]) -> float:
        """`look`, and all steps stay as they are."""
        for row, name in zip(self.counts, self.names, strict=True):
            codes = self.codes(name, weights[name]).flatten().int() + LIMIT
            row.copy_(torch.bincount(codes, minlength=CODES))
        return float(self.bits().sum())

    def bits(self) -> Tensor:
        """Bits of every tensor's codes at the last look, by their entropy; [tensors] float64."""
        share = self.counts / self.counts.sum(1, keepdim=True).clamp_min(1)
        return -(share * share.clamp_min(1e-300).log2()).sum(1) * self.counts.sum(1)

    def fit(self) -> None:
        """Tables of bits for the codes as they were at the last look."""
        tables = [self.rate_model.table(row) for row in self.counts.cpu()]
        self.tables.copy_(torch.stack(tables))

    def rate(self, weights: Mapping[str, Tensor], seed: int) -> Tensor:
        """Expected bits per weight, with a gradient to weights and steps."""
        total = torch.zeros((), device=self.counts.device)
        noise = torch.Generator(total.device).manual_seed(seed)
        for name, table in zip(self.names, self.tables, strict=True):
            weight, scale = weights[name], 1.0
            log_step, step = self.steps_of(name, weight.shape)
            count = math.ceil(self.share * len(weight)) if weight.ndim == 2 else len(weight)
            if count < len(weight):
                first = torch.randint(
                    len(weight) - count + 1, (), generator=noise, device=noise.device
                )
                part = slice(int(first), int(first) + count)
                scale, weight = len(weight) / count, weight[part]
                if len(step) > 1:
                    log_step, step = log_step[part], step[part]
            u = torch.rand(weight.shape, generator=noise, device=weight.device) - 0.5
            total = total + scale * TableBits.apply(weight, log_step, step, table, u)
        return total / self.numel

    def seen(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor as the file will hold it, with a gradient."""
        steps = {name: self.steps_of(name, weights[name].shape) for name in self.names}
        return {
            name: StepRounding.apply(weights[name], *both, name == TOKENS)
            for name, both in steps.items()
        }

    @torch.no_grad()
    def stored(self, weights: Mapping[str, Tensor]) -> dict[str, QuantizedTensor]:
        """The tensors of the file: the codes that training saw."""
        found = {}
        for name in self.names:
            codes = self.codes(name, weights[name]).cpu()
            grouped = self.group_size if codes.ndim == 2 else None
            steps = self.log_steps[_key(name)]
            scales = self.scales(name).cpu()
            if codes.ndim == 2:
                scales = scales.expand(len(codes), steps.shape[1])
                width = grouped or codes.shape[1]
                used = torch.stack([part.any(dim=1) for part in codes.split(width, dim=1)], dim=1)
                # Where all is zero the step says nothing, and one value is shorter than many.
                scales = torch.where(used, scales, scales.new_zeros(()))
                scales = scales if grouped else scales[:, 0]
            else:
                scales = scales.reshape(())
            bits = next(b for b in range(2, 9) if int(codes.abs().max()) < 2 ** (b - 1))
            found[name] = QuantizedTensor(
                codes, scales.contiguous(), bits, grouped, method="learned"
            )
        return found


def _key(name: str) -> str:
    return name.replace(".", ":")
