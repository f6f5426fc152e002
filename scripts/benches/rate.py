"""Finishing a run with the bytes in its loss: bytes and bits per byte after some hundred steps.

    python scripts/bench.py rate FOLDER bytes=76000 steps=400 optimizer=adamw

A study and not an option of a run yet. Every tensor of 64 entries or more has a learned step per
row (one for what is no matrix). The forward pass sees `step * round(w / step)`; the gradient passes
straight through to w (arXiv 1308.3432) and reaches the step as in arXiv 1902.08153. The loss is
nats per token + λ * bits per weight. The bits of a code come from a table fitted to the tensor's
present codes, read between its entries at w / step + u, u uniform in [-1/2, 1/2): noise stands in
for rounding (arXiv 1611.01704, 1906.06624). λ follows the bytes, and late in training one factor on
all steps does the last percent.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recurgolf.artifact import pack_bytes
from recurgolf.artifact.codecs import BestCodec
from recurgolf.eval import PlainEval, ScoredModel, Text, score
from recurgolf.optim import build as build_optimizers
from recurgolf.quant import QuantizedTensor
from recurgolf.training.base import read_finished

LIMIT = 127
"""Codes reach from -127 to 127."""
PER_OCTAVE = 8
"""Steps are 2^(k/8): a code of a few bits in the file, where a free float16 takes eleven."""
EVERY = 8
"""Optimizer steps between two looks at the codes; tables and λ change only there."""
AIM = 0.9975
"""Share of the target that is aimed at."""
SETTLING = 0.8
"""Share of the steps after which one factor on all steps corrects the bytes."""
STEP_LR = 0.02
VAL_TOKENS = 30_720


class RoundedThrough(torch.autograd.Function):
    """`step * round(w / step)`, steps given as log2 and broadcast over the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_step: Tensor) -> Tensor:
        step = log_step.exp2()
        seen = (weight / step).round_().clamp_(-LIMIT, LIMIT).mul_(step)
        # d(seen) / d(log2 step) is (q - w / step) step ln 2 when round passes gradients through.
        ctx.save_for_backward(seen - weight)
        ctx.shape = log_step.shape
        return seen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (error,) = ctx.saved_tensors
        return grads[0], (grads[0] * error).sum_to_size(ctx.shape) * math.log(2)


class TableBits(torch.autograd.Function):
    """Bits of `w / step + noise` under a table [255] of bits per code, summed."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_step: Tensor, table: Tensor, noise: Tensor) -> Tensor:
        step = log_step.exp2()
        value = weight / step
        place = (value + noise).add_(LIMIT).clamp_(0, 2 * LIMIT - 1e-3)
        low = place.floor()
        slope = table.diff()[low.int()]
        ctx.save_for_backward(slope / step, (slope * value).sum_to_size(log_step.shape))
        return (table[low.int()] + slope * (place - low)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_weight, to_step = ctx.saved_tensors
        return grads[0] * to_weight, -grads[0] * to_step * math.log(2), None, None


class LearnedSteps:
    """The steps of tensors, the counts of their codes, and the factor on all steps (log2)."""

    def __init__(self, weights: Mapping[str, Tensor], bits: float):
        self.weights, self.log_factor = dict(weights), 0.0
        self.log_steps = {n: nn.Parameter(torch.zeros(_rows(w))) for n, w in weights.items()}
        self.numel = sum(w.numel() for w in weights.values())
        low, high = -6.0, 2.0
        for _ in range(12):
            middle = (low + high) / 2
            self._start_at(middle)
            low, high = (middle, high) if self.look() > bits else (low, middle)
        self._start_at(high)
        self.look()

    @torch.no_grad()
    def _start_at(self, relative: float) -> None:
        for name, weight in self.weights.items():
            part = weight if weight.ndim == 2 else weight.reshape(1, -1)
            size = part.square().mean(1).sqrt().clamp_min(1e-6) * 2.0**relative
            least = part.abs().amax(1) / (LIMIT - 7)
            self.log_steps[name].copy_(torch.maximum(size, least).log2().reshape(_rows(weight)))

    def log_step(self, name: str) -> Tensor:
        """As the file holds it, in whole eighths; gradients pass to the parameter."""
        free = self.log_steps[name]
        stored = ((free.detach() + self.log_factor) * PER_OCTAVE).round() / PER_OCTAVE
        stored = stored.clamp_min(-13).exp2().half().float().log2()
        return free + (stored - free).detach()

    @torch.no_grad()
    def codes(self, name: str) -> Tensor:
        """int8, of the weight's shape."""
        scaled = self.weights[name] / self.log_step(name).exp2()
        return scaled.round_().clamp_(-LIMIT, LIMIT).to(torch.int8)

    def look(self) -> float:
        """Fit the tables to the present codes; their bits by the entropy of every tensor."""
        self.tables, total = {}, 0.0
        for name in self.weights:
            codes = self.codes(name).flatten().int() + LIMIT
            counts = torch.bincount(codes, minlength=2 * LIMIT + 1).double()
            share = counts / counts.sum()
            total -= float((counts * share.clamp_min(1e-300).log2()).sum())
            self.tables[name] = bits_per_code(counts).float()
        return total

    def rate(self) -> Tensor:
        """Expected bits per weight, with a gradient to weights and steps."""
        parts = [
            TableBits.apply(w, self.log_step(n), self.tables[n], torch.rand_like(w) - 0.5)
            for n, w in self.weights.items()
        ]
        return torch.stack(parts).sum() / self.numel

    def seen(self) -> dict[str, Tensor]:
        """Every tensor as the file will hold it, with a gradient."""
        return {n: RoundedThrough.apply(w, self.log_step(n)) for n, w in self.weights.items()}

    @torch.no_grad()
    def stored(self) -> dict[str, QuantizedTensor]:
        """The tensors of a file; a row of zeros has the step zero."""
        found = {}
        for name, weight in self.weights.items():
            codes, scales = self.codes(name), self.log_step(name).exp2().half()
            scales = scales[:, 0] if weight.ndim == 2 else scales.reshape(())
            if weight.ndim == 2:
                scales = torch.where(codes.any(dim=1), scales, scales.new_zeros(()))
            bits = next(b for b in range(2, 9) if int(codes.abs().max()) < 2 ** (b - 1))
            found[name] = QuantizedTensor(codes, scales, bits)
        return found


def bits_per_code(counts: Tensor) -> Tensor:
    """A table [255]: how often each code came, both signs together, with a Laplace curve for those
    that did not come."""
    both = (counts + counts.flip(0)) / 2
    places = torch.arange(-LIMIT, LIMIT + 1, dtype=torch.float64)
    mean = float((both * places.abs()).sum() / both.sum())
    curve = torch.exp(-places.abs() / max(mean, 0.3))
    return -(0.98 * both / both.sum() + 0.02 * curve / curve.sum()).clamp_min(2.0**-40).log2()


def _rows(weight: Tensor) -> list[int]:
    return [len(weight), 1] if weight.ndim == 2 else [1] * weight.ndim


@contextlib.contextmanager
def swapped(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other tensors in the places of its parameters."""
    places = [(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in values]
    before = [module._parameters[name] for module, name in places]
    try:
        for (module, name), value in zip(places, values.values(), strict=True):
            module._parameters[name] = value  # type: ignore[assignment]
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            module._parameters[name] = value


def main(asked: argparse.Namespace) -> None:
    """One finished run, given as a folder."""
    given = dict(text.split("=", 1) for text in asked.overrides if "=" in text)
    (folder,) = [text for text in asked.overrides if "=" not in text]
    target, steps = float(given["bytes"]), int(given.get("steps", 400))
    finished = read_finished(Path(folder))
    run, model = finished.run, finished.model()
    dataset = run.data.prepare()
    tokens = dataset.validation_tokens()[: VAL_TOKENS + 1]
    text = Text(tokens, dataset.byte_count, None, dataset.tokenizer.bos_id)
    scored = ScoredModel(model, run.looping, run.trainer.seq_len, torch.device("cpu"))
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("mtp.")}
    coded = {n: p for n, p in parameters.items() if p.numel() >= 64}

    def bpb(values: Mapping[str, Tensor]) -> float:
        with torch.no_grad(), swapped(model.eval(), values):
            return score(PlainEval(), scored, text).val_bpb

    def packed() -> int:
        rest = {n: p.detach().half() for n, p in parameters.items() if n not in coded}
        codec = BestCodec(codecs=["ans", "brotli"], transform="auto")
        return len(pack_bytes({}, {**learned.stored(), **rest}, codec)[0])

    before = bpb({})
    learned = LearnedSteps(coded, 8.8 * AIM * target)
    print(f"before {before:.4f} bpb; starting at {packed():,} bytes, {bpb(learned.seen()):.4f} bpb")
    config = run.optimizer
    if given.get("optimizer") == "adamw":
        groups = [
            {"params": [p], "lr": 3e-3 if "embed" in n else 2e-3} for n, p in parameters.items()
        ]
        optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, weight_decay=0.0)]
    else:
        optimizers = build_optimizers(config, model).members
    optimizers.append(torch.optim.AdamW(list(learned.log_steps.values()), STEP_LR, weight_decay=0))
    rates = [[g["lr"] for g in o.param_groups] for o in optimizers]
    loader = run.data.loader.build(
        dataset.train_shards, seq_len=run.trainer.seq_len, rank=0, world_size=1, seed=100
    )
    log_rate, error, overhead = math.log(0.05), 0.0, 0.0
    for step in range(steps):
        if step % EVERY == 0:
            bits = learned.look()
            if step % max(steps // 8 // EVERY * EVERY, EVERY) == 0:
                overhead = 8 * packed() - bits
            error = min(max(math.log((bits + overhead) / (8 * AIM * target)), -1.0), 1.0)
            settling = step >= SETTLING * steps
            log_rate += (20 if settling else 40) * EVERY / steps * error
            if settling:
                change = (bits + overhead - 8 * AIM * target) / (0.8 * learned.numel)
                learned.log_factor += min(max(change, -0.06), 0.06)
        x, y = loader.next_batch(run.trainer.batch_tokens, 1)
        with swapped(model.train(), learned.seen()):
            loss = model(x, run.plan(1.0), y)
            (loss + math.exp(log_rate + 2 * error) * learned.rate()).backward()
        for optimizer, base in zip(optimizers, rates, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
    after = bpb(learned.seen())
    print(f"{packed():,} bytes of {target:,.0f}: {after:.4f} bpb ({after - before:+.4f})")
