"""The composed baseline against the same network written out by hand."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from benches.timing import interleaved, show_ratio

import recurgolf
from recurgolf.model.mixers.attention import AttentionConfig
from recurgolf.run import Run


def main(asked: argparse.Namespace) -> None:
    """The composed baseline against the same network written out by hand."""
    run = recurgolf.compose(
        ["model=parameter_golf_baseline", "model.num_blocks=4", "model.dim=256", *asked.overrides]
    )
    plan = run.plan(0.0)
    composed = run.build_model()
    tokens = torch.randint(0, run.model.vocab_size, (8, 256))
    targets = torch.randint(0, run.model.vocab_size, (8, 256))

    def by_composition() -> None:
        composed.zero_grad(set_to_none=True)
        composed(tokens, plan, targets).backward()

    def by_hand() -> None:
        composed.zero_grad(set_to_none=True)
        inlined_loss(run, composed, tokens, targets).backward()

    difference = abs(
        float(composed(tokens, plan, targets)) - float(inlined_loss(run, composed, tokens, targets))
    )
    print(f"losses differ by {difference:.1e}")
    times = interleaved({"by hand": by_hand, "composed": by_composition}, asked.rounds)
    show_ratio("composed / by hand", times, "composed", "by hand", 1.05)


def inlined_loss(
    run: Run, model: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """The baseline's network in one function, with the weights of the composed one."""
    config, eps = run.model, run.model.norm_eps
    weights = dict(model.named_parameters())
    heads, kv_heads = AttentionConfig().heads(config.dim)
    batch, length = tokens.shape
    half = config.dim // heads // 2
    turns = torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), config.rope.base**-turns)
    cos, sin = angles.cos(), angles.sin()

    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=eps)

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)

    x = norm(F.embedding(tokens, weights["embed.weight"]))
    x0, kept, encoder = x, [], config.num_blocks // 2
    for index in range(config.num_blocks):
        w = {
            n.split(f"blocks.{index}.")[1]: p for n, p in weights.items() if f"blocks.{index}." in n
        }
        if index >= encoder and kept:
            x = x + weights["skips.weight"][index - encoder] * kept.pop()
        mix = w["input_mix.weight"]
        x = mix[0] * x + mix[1] * x0
        h = norm(x)
        q = F.linear(h, w["mixer.q_proj.weight"]).view(batch, length, heads, -1).transpose(1, 2)
        k = F.linear(h, w["mixer.k_proj.weight"]).view(batch, length, kv_heads, -1).transpose(1, 2)
        v = F.linear(h, w["mixer.v_proj.weight"]).view(batch, length, kv_heads, -1).transpose(1, 2)
        q = turn(norm(q)) * w["mixer.q_gain"][:, None, None]
        y = F.scaled_dot_product_attention(q, turn(norm(k)), v, is_causal=True, enable_gqa=True)
        y = F.linear(y.transpose(1, 2).reshape(x.shape), w["mixer.o_proj.weight"])
        x = x + w["mixer_scale"] * y
        h = F.linear(norm(x), w["mlp.up_proj.weight"])
        x = x + w["mlp_scale"] * F.linear(F.relu(h).square(), w["mlp.down_proj.weight"])
        if index < encoder:
            kept.append(x)
    logits = F.linear(norm(x), weights["embed.weight"])
    cap = config.logit_softcap or 1.0
    logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits.view(-1, config.vocab_size), targets.view(-1))
