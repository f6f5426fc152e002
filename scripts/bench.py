"""Measurements, each a ratio taken side by side in one process, interleaved.

    python scripts/bench.py trainer    the trainer's step against a bare loop of the same parts
    python scripts/bench.py model      the composed baseline block against a hand-inlined one
    python scripts/bench.py passes     milliseconds per visit at 1, 2, 4 and 8 passes
    python scripts/bench.py start      seconds from the command to the help text and the first step

Figures are medians; state the machine with them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import recurgolf
from recurgolf.model.mixers.attention import AttentionConfig
from recurgolf.run import Run
from recurgolf.training.distributed import Ranks
from recurgolf.training.precision import autocast
from recurgolf.training.trainer import Trainer


def interleaved(
    sides: dict[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> dict[str, float]:
    """Median milliseconds of each side, taken in turns so that a busy machine hits both alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + warmup):
        for name, step in sides.items():
            began = time.perf_counter()
            step()
            if turn >= warmup:
                times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def show_ratio(what: str, times: dict[str, float], over: str, under: str, limit: float) -> None:
    ratio = times[over] / times[under]
    for name, value in times.items():
        print(f"  {name:<28}{value:9.2f} ms")
    print(f"{what}: {ratio:.3f} (at most {limit})\n")


def bench_trainer(asked: argparse.Namespace) -> None:
    """Everything the trainer does around a step, against the step alone."""
    run = recurgolf.compose(["tracker=offline", f"trainer.steps={10_000}", *asked.overrides])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(run, Path(folder), Ranks())
        trainer.setup()
        model, optimizers, loader = trainer.model, trainer.optimizers, trainer.loader
        config, plan = run.trainer, run.plan(0.0)

        def bare() -> None:
            x, y = loader.next_batch(config.batch_tokens, 1)
            with autocast(trainer.precision, trainer.device):
                loss = model(x, plan, y)
            loss.backward()
            optimizers.step(1.0, 0.95, 0.0)
            optimizers.zero_grad()

        with trainer.log.bar("training", 10_000) as bar, trainer.clock.phase("training"):
            times = interleaved(
                {"bare loop": bare, "trainer": lambda: trainer.advance(bar)}, asked.rounds
            )
        trainer.tracker.finish()
    show_ratio("trainer / bare loop", times, "trainer", "bare loop", 1.05)


def bench_model(asked: argparse.Namespace) -> None:
    """The composed baseline against the same network written out by hand."""
    run = recurgolf.compose(
        ["model=baseline", "model.num_blocks=4", "model.dim=256", *asked.overrides]
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


def bench_passes(asked: argparse.Namespace) -> None:
    """Time grows linearly in visits."""
    for passes in (1, 2, 4, 8):
        run = recurgolf.compose(["looping=cycle", f"looping.passes={passes}", *asked.overrides])
        model, plan = run.build_model(), run.plan(1.0)
        tokens = torch.randint(0, run.model.vocab_size, (8, 256))

        def step(model=model, plan=plan, tokens=tokens) -> None:
            model.zero_grad(set_to_none=True)
            model(tokens, plan, tokens).backward()

        (milliseconds,) = interleaved({"step": step}, asked.rounds).values()
        per_visit = milliseconds / plan.num_visits
        print(f"  {passes} passes, {plan.num_visits:3d} visits {milliseconds:9.1f} ms")
        print(f"    per visit {per_visit:9.2f} ms")


def bench_start(asked: argparse.Namespace) -> None:
    """Seconds of wall time from the command line, best of three."""
    command = [sys.executable, "-m", "recurgolf"]
    best = min(_seconds([*command, "--help"]) for _ in range(3))
    print(f"recurgolf --help: {best:.2f} s (at most 3)")
    with tempfile.TemporaryDirectory() as folder:
        first = min(_seconds_to_first_step([*command, *asked.overrides], folder) for _ in range(3))
    print(f"first training step after {first:.2f} s (at most 10)")


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def _seconds_to_first_step(command: list[str], folder: str) -> float:
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step     1/"):
            break
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    return seconds


BENCHES = {
    "trainer": bench_trainer,
    "model": bench_model,
    "passes": bench_passes,
    "start": bench_start,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("overrides", nargs="*", help="overrides of the run that is measured")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_intermixed_args()
    torch.set_num_threads(asked.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(asked.threads))
    print(f"torch {torch.__version__}, {asked.threads} thread(s), {os.cpu_count()} cores")
    BENCHES[asked.what](asked)


if __name__ == "__main__":
    main()
