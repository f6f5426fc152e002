"""The gated delta rule by chunks against token by token; time and memory along the length."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from benches.memory import PeakMemory
from benches.timing import interleaved
from torch import Tensor, nn

from recurgolf.model.mixers.attention import AttentionConfig
from recurgolf.model.mixers.gated_deltanet import GatedDeltaNetConfig, gated_delta_rule
from recurgolf.model.rope import rope_table
from recurgolf.model.visit import VisitInputs

SHAPES = (
    (1, 4, 4, 32, 32),
    (1, 2, 4, 32, 48),
    (1, 8, 8, 64, 64),
    (1, 4, 8, 64, 64),
    (4, 4, 4, 32, 32),
)
"""Batch, key heads, value heads, key width, value width."""
LENGTHS = (512, 1024, 2048, 4096)
DIM = 256


def main(asked: argparse.Namespace) -> None:
    """Forward and backward on the CPU; medians of times taken in turns."""
    torch.manual_seed(0)
    print("forms at length 1,024, forward and backward (chunked: at least 10 times as fast)")
    for shape in SHAPES:
        compare_forms(shape, max(3, asked.rounds // 4))
    layers = {"gated delta net": delta_net(), "attention": attention()}
    sized = GatedDeltaNetConfig().sized(DIM)
    state = sized.num_value_heads * sized.key_head_dim * sized.value_head_dim * 4 / 1024
    print(
        f"\nlayers of width {DIM}, batch 1, forward and backward: time, per token, peak memory per "
        f"token\n(a state kept for every token would be {state:.1f} kB/token more)"
    )
    print(f"  {'length':>6} {'gated delta net':>36} {'attention':>36}")
    for length in LENGTHS:
        measure_layers(layers, length, max(3, asked.rounds // 4))


def compare_forms(shape: tuple[int, int, int, int, int], rounds: int) -> None:
    """One line: milliseconds of both forms and their ratio."""
    inputs = rule_inputs(shape, 1024)

    def step(form: str) -> None:
        q, k, v, beta, log_decay = inputs
        output, _ = gated_delta_rule(q, k, v, beta, log_decay, form=form)
        output.sum().backward()

    forms = ("sequential", "chunked")
    sides: dict[str, Callable[[], object]] = {form: partial(step, form) for form in forms}
    times = interleaved(sides, rounds, warmup=1)
    batch, key_heads, heads, key_dim, value_dim = shape
    print(
        f"  batch {batch}, {key_heads} key heads x {key_dim}, {heads} value heads x {value_dim}: "
        f"sequential {times['sequential']:8.1f} ms, chunked {times['chunked']:6.1f} ms, "
        f"{times['sequential'] / times['chunked']:5.1f} times"
    )


def measure_layers(layers: dict[str, nn.Module], length: int, rounds: int) -> None:
    """One line: milliseconds, microseconds and bytes per token of each layer."""
    x = torch.randn(1, length, DIM, requires_grad=True)
    table = rope_table(length, 64, 10_000.0, x.device)

    def step(layer: nn.Module) -> None:
        layer(x, VisitInputs(x, table)).sum().backward()

    sides: dict[str, Callable[[], object]] = {
        name: partial(step, layer) for name, layer in layers.items()
    }
    times = interleaved(sides, rounds, warmup=1)
    cells = []
    for name, layer in layers.items():
        with PeakMemory() as memory:
            step(layer)
        cells.append(
            f"{times[name]:7.1f} ms {1000 * times[name] / length:5.1f} us "
            f"{memory.peak / length / 1024:5.1f} kB/token"
        )
    print(f"  {length:>6} {cells[0]:>36} {cells[1]:>36}")


def rule_inputs(shape: tuple[int, int, int, int, int], length: int) -> list[Tensor]:
    """q, k, v, beta, log_decay with gradients; q and k normed."""
    batch, key_heads, heads, key_dim, value_dim = shape
    q, k = (F.normalize(torch.randn(batch, length, key_heads, key_dim), dim=-1) for _ in range(2))
    v = torch.randn(batch, length, heads, value_dim)
    beta, log_decay = torch.rand(batch, length, heads), -0.3 * torch.rand(batch, length, heads)
    return [x.requires_grad_() for x in (q, k, v, beta, log_decay)]


def delta_net() -> nn.Module:
    """The default heads and widths."""
    return GatedDeltaNetConfig().build(DIM)


def attention() -> nn.Module:
    """Softmax attention with four query and two key heads of 64."""
    layer = AttentionConfig().build(DIM, 0, 1, 1e-6)
    nn.init.normal_(layer.q_proj.weight, std=0.02)
    for name in ("k_proj", "v_proj", "o_proj"):
        nn.init.normal_(layer.get_submodule(name).weight, std=0.02)  # type: ignore[arg-type]
    return layer
