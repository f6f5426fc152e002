"""Activation checkpointing: the same gradients from a fraction of the memory."""

import sys
from pathlib import Path

import pytest
import torch
from smoke_runs import small

import recurgolf
from recurgolf.training.network import shape_network

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from benches.memory import step_cost

KINDS = {
    "adapters and skips": ("lora.rank=2", "model.skips=unet_gated", "model.visit_gains=true"),
    "truncated": ("looping.passes=3", "looping.backprop_passes=2"),
    "value embeddings": ("model.value_embed.dim=8", "model.value_embed.visits=[1]"),
}


def gradients(overrides: tuple[str, ...]) -> dict[str, torch.Tensor]:
    run = recurgolf.compose(small(*overrides))
    model = run.build_model()
    shape_network(model, run.trainer)
    torch.manual_seed(3)
    for parameter in model.parameters():  # zero projections would hide what is behind them
        parameter.data += 0.02 * torch.randn_like(parameter)
    tokens = torch.randint(0, 512, (2, 65))
    model(tokens[:, :-1], run.plan(1.0), tokens[:, 1:]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_gives_the_same_gradients_bit_for_bit(kind):
    kept = gradients(KINDS[kind])
    again = gradients((*KINDS[kind], "trainer.activation_checkpointing=true"))
    assert kept.keys() == again.keys()
    for name, gradient in kept.items():
        assert torch.equal(again[name], gradient), name


def test_sixteen_passes_need_at_most_twice_the_memory_of_one():
    def peak(passes: int, *overrides: str) -> int:
        own = ["looping=middle", "lora=none", f"looping.passes={passes}", "model.num_blocks=3"]
        return step_cost(small(*own, *overrides), 1)[0]

    recomputed = "trainer.activation_checkpointing=true"
    assert peak(16, recomputed) <= 2 * peak(1, recomputed)
    assert peak(16) > 3 * peak(1)
