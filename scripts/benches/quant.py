"""GPTQ of many layers against the column-by-column loop; steps of training with and without QAT."""

from __future__ import annotations

import argparse

import torch
from benches.timing import interleaved
from torch import Tensor

import recurgolf
from recurgolf.quant import QuantizerGrid, SigmaClip, dequantize, gptq_quantize_many
from recurgolf.training.quantize import prepare_quantization

ROWS, COLS, LAYERS = 512, 2048, 12
BITS, CLIP, DAMPING = 6, SigmaClip(6.0), 0.01


def main(asked: argparse.Namespace) -> None:
    """GPTQ of 12 layers of 512 x 2048, and the price of QAT per training step."""
    bench_gptq(min(asked.rounds, 2))
    bench_qat(asked)


def bench_gptq(rounds: int) -> None:
    """Both sides quantize the same layers, in turns; codes are compared as well."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -1.5, COLS)
    weights, grams = [], []
    for _ in range(LAYERS):
        mix = torch.randn(COLS, COLS, generator=generator) / COLS**0.5
        x = torch.randn(2 * COLS, COLS, generator=generator) * spectrum @ mix
        weights.append(torch.randn(ROWS, COLS, generator=generator) * 0.05)
        grams.append(x.T @ x / len(x))
    spec = QuantizerGrid(BITS, CLIP)
    ours = gptq_quantize_many(weights, grams, spec, damping=DAMPING)
    theirs = [column_by_column(w, g) for w, g in zip(weights, grams, strict=True)]
    off = [float((a.codes != b).float().mean()) for a, (b, _) in zip(ours, theirs, strict=True)]
    errors = [
        (a.error, weighted_error(w, g, dequantize(*b)))
        for a, b, w, g in zip(ours, theirs, weights, grams, strict=True)
    ]
    print(f"{LAYERS} layers of {ROWS} x {COLS}: at most {max(off):.3%} of the codes differ")
    ratio = max(abs(a / b - 1) for a, b in errors)
    print(f"Hessian-weighted errors differ by at most {ratio:.2%}")
    times = interleaved(
        {
            "column by column": lambda: [
                column_by_column(w, g) for w, g in zip(weights, grams, strict=True)
            ],
            "gptq_quantize_many": lambda: gptq_quantize_many(weights, grams, spec, damping=DAMPING),
        },
        rounds,
        warmup=0,
    )
    for name, value in times.items():
        print(f"  {name:<28}{value / 1000:9.2f} s")
    faster = times["column by column"] / times["gptq_quantize_many"]
    print(f"times as fast: {faster:.2f} (at least 3)\n")


def column_by_column(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """The algorithm as it is written down: every column updates all that follow it."""
    weight, gram = weight.clone(), gram.clone()
    scales = (CLIP.clip_value(weight) / 31).half()
    step = scales.float()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1
    weight[:, dead] = 0
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    order = torch.argsort(gram.diagonal(), descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    weight = weight[:, order]
    codes = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        code = (weight[:, j] / step).round().clamp(-31, 31)
        codes[:, j] = code
        error = (weight[:, j] - code * step) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
    back = torch.empty_like(codes)
    back[:, order] = codes
    return back.to(torch.int8), scales


def weighted_error(weight: Tensor, gram: Tensor, restored: Tensor) -> float:
    """trace(D H D^T) / rows of a change."""
    change = weight - restored
    return float(((change @ gram) * change).sum() / len(change))


def bench_qat(asked: argparse.Namespace) -> None:
    """A step of the default's network, looped, with what training adds for its quantizer."""
    overrides = ["experiment=demo", "looping.start_fraction=0", *asked.overrides]
    kinds = {
        "no QAT": [],
        "straight_through": ["quant/qat=straight_through"],
        "noise": ["quant/qat=noise", "quant.qat.blocks=all"],
        "snapping": ["quant.qat.snap.strength=0.05", "quant.qat.snap.start_fraction=0"],
    }
    steps = {}
    for name, own in kinds.items():
        run = recurgolf.compose([*overrides, *own])
        model, plan = run.build_model().train(), run.plan(1.0)
        qat = prepare_quantization(run, model, None)  # type: ignore[arg-type]
        tokens = torch.randint(0, run.model.vocab_size, (8, 256))

        def step(run=run, model=model, plan=plan, qat=qat, tokens=tokens) -> None:
            qat.update(0.5)
            model.zero_grad(set_to_none=True)
            model(tokens, plan, tokens).backward()
            qat.snap(0.5)

        steps[name] = step
    times = interleaved(steps, asked.rounds)
    for name, value in times.items():
        print(f"  {name:<28}{value:9.2f} ms   {value / times['no QAT']:.3f} of the step without")
