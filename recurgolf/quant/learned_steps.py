"""Learned quantizer steps: what layers see of the weights, and what their codes cost.

`rate.py` trains with them; nothing here knows of a budget. All tensors are worked on at once, their
entries one after the other: a GPU takes longer to start an operation than to round a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurgolf.quant.quantized_tensor import QuantizedTensor
from recurgolf.quant.rate_models import CODES, LIMIT, RateModel

PER_OCTAVE = 8
"""Steps are 2^(k/8): a code of a few bits in the file, where a free float16 takes eleven."""
TOKENS = "embed.weight"
"""The table of tokens, whose rows keep a code: a row of zeros is a state of length zero, and every
norm that it meets multiplies the gradient by 1 / sqrt(norm_eps), to 1e9 and beyond."""
SMALLEST, LARGEST = -13.0, 12.0
"""log2 of the smallest and the largest step; float16 has fewer digits below, and ends above."""


class StepRounding(torch.autograd.Function):
    """`step * round(w / step)` of all tensors, with codes from -127 to 127.

    Gradients go straight through to the weights and, as in learned step size quantization (arXiv
    1902.08153), to the logarithms of the steps, of which the steps are the rounded powers of two.
    """

    @staticmethod
    def forward(
        ctx: Any, log_steps: Tensor, steps: LearnedSteps, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        flat = steps.flat(weights)
        step = steps.spread(steps.scales().to(flat.dtype))
        seen = steps.rounded(flat, step).mul_(step)
        # What a step's gradient needs: the value seen less the weight, step * (code - w / step).
        ctx.save_for_backward(seen - flat)
        ctx.steps = steps
        ctx.set_materialize_grads(False)
        # Tensors of their own, as parameters are: a compiled network would look at views twice.
        return tuple(part.clone() for part in steps.split(seen))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (error,), steps = ctx.saved_tensors, ctx.steps
        whole = [
            part.new_zeros(()).expand_as(part) if grad is None else grad
            for grad, part in zip(grads, steps.split(error), strict=True)
        ]
        to_step = steps.by_step(steps.flat(whole).mul_(error), torch.sum) * math.log(2)
        return to_step, None, *grads


class TableBits(torch.autograd.Function):
    """Bits of `w / step + noise` under the tables of all tensors, summed over their entries."""

    @staticmethod
    def forward(
        ctx: Any, log_steps: Tensor, steps: LearnedSteps, noise: Tensor, *weights: Tensor
    ) -> Tensor:
        flat = steps.flat(weights)
        tables, per_step = steps.tables.to(flat.dtype), steps.scales().to(flat.dtype)
        value = flat.div_(steps.spread(per_step))
        place = noise.add_(value).add_(LIMIT).clamp_(0, 2 * LIMIT - 1e-3)
        low = place.int()
        place.sub_(low)
        low += steps.spread(steps.tensor_of_step * CODES)
        slope = F.pad(tables.diff(), (0, 1)).flatten().index_select(0, low)
        to_step = steps.by_step(value.mul_(slope), torch.sum)
        # Gone before more is made: logits are alive too, and this is where memory is highest.
        del flat, value
        bits = tables.flatten().index_select(0, low).addcmul_(slope, place)
        ctx.save_for_backward(slope.div_(steps.spread(per_step)), to_step)
        ctx.steps = steps
        return bits.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (to_weights, to_step), (grad,) = ctx.saved_tensors, grads
        return (
            -grad * to_step * math.log(2),
            None,
            None,
            *ctx.steps.split(grad * to_weights),
        )


class LearnedSteps(nn.Module):
    """The steps of a model's tensors, and what is known of their codes; a part of the model.

    The steps are a parameter beside the model's own, so that they are optimized, averaged, saved
    and resumed like these; what carries over from step to step lies in buffers.

    Attributes:
        log_steps: [steps] log2 of the steps, tensor after tensor: of every row, of every group of
            columns in a row, or one for all.
        counts: [tensors, 255] how often every code from -127 to 127 came at the last look.
        tables: [tensors, 255] bits of every code.
        log_rate: natural logarithm of λ.
        log_factor: log2 of the factor on all steps.
        overhead: bits of the file beyond the entropy of the codes, when it was last packed.
        progress: share of the active part of training that was done at the last look.
        age: optimizer steps since it began; below 0: it has not.
        tensor_of_step: [steps] which tensor a step belongs to.
        step_of_entry: [entries] which step an entry has.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        model: RateModel,
        *,
        per: str,
        group_size: int | None,
        lr: float,
        first_rate: float,
    ):
        """Steps of tensors of these shapes; `start_at` gives them their size.

        Args:
            per, group_size, lr: as `Rate` has them.
            first_rate: λ to begin with.
        """
        super().__init__()
        self.names, self.rate_model = list(shapes), model
        self.shapes = [tuple(shape) for shape in shapes.values()]
        self.group_size = group_size
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.numel = sum(self.sizes)
        # (columns, entries that share a step) of every tensor, a vector being one row.
        self._rows = [
            (shape[1], group_size or shape[1])
            if len(shape) == 2 and per != "tensor"
            else (size, size)
            for shape, size in zip(self.shapes, self.sizes, strict=True)
        ]
        self.num_steps = [
            size // columns * math.ceil(columns / run)
            for size, (columns, run) in zip(self.sizes, self._rows, strict=True)
        ]
        self.log_steps = nn.Parameter(torch.zeros(sum(self.num_steps)))
        self.log_steps.optimizer_role, self.log_steps.optimizer_lr = "rate", lr  # type: ignore[attr-defined]
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
        of = [torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(self.num_steps)]
        self.register_buffer("tensor_of_step", torch.cat(of), persistent=False)
        self.register_buffer("step_of_entry", self._owners(), persistent=False)
        self.counts: Tensor
        self.tables: Tensor
        self.log_rate: Tensor
        self.log_factor: Tensor
        self.overhead: Tensor
        self.progress: Tensor
        self.age: Tensor
        self.tensor_of_step: Tensor
        self.step_of_entry: Tensor

    def _owners(self) -> Tensor:
        found, first = [], 0
        for size, count, (columns, run) in zip(self.sizes, self.num_steps, self._rows, strict=True):
            steps = torch.arange(first, first + count, dtype=torch.int32)
            rows = steps.view(size // columns, -1).repeat_interleave(run, dim=1)
            found.append(rows[:, :columns].flatten())
            first += count
        return torch.cat(found)

    @property
    def active(self) -> bool:
        """Whether layers see the file's values."""
        return int(self.age) >= 0

    def own(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        """The weights that have steps, in their order."""
        return [weights[name] for name in self.names]

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """[entries] of all tensors, in a copy."""
        return torch.cat([tensor.flatten() for tensor in tensors])

    def split(self, entries: Tensor) -> list[Tensor]:
        """[entries] as the tensors that they are of."""
        parts = zip(entries.split(self.sizes), self.shapes, strict=True)
        return [part.view(shape) for part, shape in parts]

    def spread(self, per_step: Tensor) -> Tensor:
        """[steps] -> [entries]."""
        return per_step.index_select(0, self.step_of_entry)

    def by_step(self, entries: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        """[entries] -> [steps], by a sum or a maximum that zeros do not change."""
        found = []
        for part, (columns, run) in zip(entries.split(self.sizes), self._rows, strict=True):
            rows = F.pad(part.view(-1, columns), (0, -columns % run)) if columns % run else part
            found.append(reduce(rows.view(-1, run), dim=1))
        return torch.cat(found)

    @torch.no_grad()
    def scales(self) -> Tensor:
        """[steps] as the file will hold them, float16."""
        shifted = self.log_steps + self.log_factor.float()
        levels = (shifted.clamp(SMALLEST, LARGEST) * PER_OCTAVE).round()
        return (levels / PER_OCTAVE).exp2().half()

    def rounded(self, entries: Tensor, step: Tensor) -> Tensor:
        """[entries] codes from -127 to 127, as floats; in every row of the token table at least
        that of its largest entry."""
        codes = (entries / step).round_().clamp_(-LIMIT, LIMIT)
        if TOKENS in self.names:
            at = self.names.index(TOKENS)
            weight, own = self.split(entries)[at], self.split(codes)[at]
            largest = weight.abs().argmax(dim=1, keepdim=True)
            sign = torch.where(weight.gather(1, largest) < 0, -1.0, 1.0).to(codes.dtype)
            gone = ~own.any(dim=1, keepdim=True)
            own.scatter_(1, largest, torch.where(gone, sign, own.gather(1, largest)))
        return codes

    @torch.no_grad()
    def codes(self, weights: Mapping[str, Tensor]) -> Tensor:
        """[entries] codes of all weights, as floats."""
        flat = self.flat(self.own(weights))
        return self.rounded(flat, self.spread(self.scales().float()))

    @torch.no_grad()
    def start_at(self, weights: Mapping[str, Tensor], bits: float) -> None:
        """Steps in proportion to the size of rows, so that all codes take about so many bits."""
        flat = self.flat(self.own(weights))
        entries = self.by_step(torch.ones_like(flat), torch.sum)
        size = (self.by_step(flat.square(), torch.sum) / entries).sqrt()
        low, high = -6.0, 2.0
        for _ in range(12):
            middle = (low + high) / 2
            self._start(size, middle)
            low, high = (middle, high) if self.look(weights) > bits else (low, middle)
        self._start(size, high)
        self.look(weights)

    def _start(self, size: Tensor, log_relative: float) -> None:
        # What starts at zero will not stay there: as if it were small.
        wanted = size.clamp_min(0.01) * 2.0**log_relative
        self.log_steps.copy_(wanted.log2().clamp_min(SMALLEST))

    @torch.no_grad()
    def look(self, weights: Mapping[str, Tensor]) -> float:
        """Count the present codes; bits of all by the entropy of every tensor.

        Steps that are too small for their largest entry grow, so that no code is beyond 127; those
        that make zeros of all entries stay within reach of a way back.
        """
        flat = self.flat(self.own(weights))
        largest = self.by_step(flat.abs_(), torch.amax)
        least = largest.clamp_min(1e-9).log2() - math.log2(LIMIT - 7)
        most = largest.clamp_min(2.0**-6).log2() + 2
        factor = self.log_factor.float()
        shifted = (self.log_steps + factor).clamp(least, torch.maximum(least, most))
        self.log_steps.copy_(shifted - factor)
        return self.count(weights)

    @torch.no_grad()
    def count(self, weights: Mapping[str, Tensor]) -> float:
        """`look`, and all steps stay as they are."""
        places = (
            self.codes(weights).int().add_(self.spread(self.tensor_of_step * CODES)).add_(LIMIT)
        )
        counts = torch.bincount(places, minlength=self.counts.numel())
        self.counts.copy_(counts.view_as(self.counts))
        return float(self.bits().sum())

    def bits(self) -> Tensor:
        """Bits of every tensor's codes at the last look, by their entropy; [tensors] float64."""
        share = self.counts / self.counts.sum(1, keepdim=True).clamp_min(1)
        return -(share * share.clamp_min(1e-300).log2()).sum(1) * self.counts.sum(1)

    def fit(self) -> None:
        """Tables of bits for the codes as they were at the last look."""
        self.tables.copy_(self.rate_model.table(self.counts))

    def rate(self, weights: Mapping[str, Tensor], seed: int) -> Tensor:
        """Expected bits per weight, with a gradient to weights and steps."""
        generator = torch.Generator(self.counts.device).manual_seed(seed)
        noise = torch.rand(self.numel, generator=generator, device=generator.device) - 0.5
        return TableBits.apply(self.log_steps, self, noise, *self.own(weights)) / self.numel

    def seen(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor as the file will hold it, with a gradient."""
        values = StepRounding.apply(self.log_steps, self, *self.own(weights))
        return dict(zip(self.names, values, strict=True))

    @torch.no_grad()
    def stored(self, weights: Mapping[str, Tensor]) -> dict[str, QuantizedTensor]:
        """The tensors of the file: the codes that training saw."""
        all_codes = self.split(self.codes(weights).to(torch.int8).cpu())
        all_scales = self.scales().cpu().split(self.num_steps)
        found = {}
        for name, codes, scales in zip(self.names, all_codes, all_scales, strict=True):
            grouped = self.group_size if codes.ndim == 2 else None
            if codes.ndim == 2:
                scales = scales.view(-1, 1) if len(scales) == 1 else scales.view(len(codes), -1)
                scales = scales.expand(len(codes), -1)
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
