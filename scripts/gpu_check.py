"""What a machine does with this program: parity in bfloat16 and compiled, and speed.

    python scripts/gpu_check.py                              three runs of ten minutes on a GPU
    python scripts/gpu_check.py --device cpu --minutes 0.1   the same path where there is none

First the parity cases: the loss of every network in bfloat16 and compiled against float32 as it is
written. Then the baseline, a looped network with adapters and the baseline with the bytes in its
loss, each for so many minutes, with what they make of the machine: milliseconds per step, tokens
per second, model FLOPs utilisation (MFU), peak memory and recompilations after the clock started.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import recurgolf
from recurgolf.plan import make_plan
from recurgolf.run import Run
from recurgolf.training.finish import peak_memory
from recurgolf.training.job import Job
from recurgolf.training.network import shape_network
from recurgolf.training.precision import autocast
from recurgolf.training.trainer import Trainer

PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40": 181e12,
    "4090": 165e12,
}
"""Dense bfloat16 of the data sheets, by a part of the device's name."""

CASES = {
    "flat": ["looping=none", "lora=none"],
    "looped": ["looping=cycle", "looping.passes=3", "lora=none"],
    "looped with adapters": ["looping=cycle", "looping.passes=2", "lora=rank1"],
}
EXPERIMENTS = {
    "baseline": ["looping=none", "lora=none"],
    "looped": ["looping=middle", "looping.passes=3", "lora=rank1"],
    "bytes in the loss": ["looping=none", "lora=none", "quant/qat=rate", "artifact/codec=ans"],
}
SIZES = {
    "cuda": [
        "model=parameter_golf_baseline",
        "trainer=gpu",
        "trainer.devices=1",
        "trainer.batch_tokens=524_288",
        "trainer.seq_len=1024",
        "trainer.grad_accum=8",
    ],
    "cpu": ["model=nano", "trainer.seq_len=64", "trainer.batch_tokens=512"],
}
BFLOAT16_NATS = 0.02
"""A loss in bfloat16 may differ by this from float32's at the same weights."""
COMPILED_NATS = 1e-3


def main(arguments: list[str] | None = None) -> int:
    """Parity, then speed; the exit code is 1 where a parity case fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each of the three runs")
    parser.add_argument("--backend", default=None, help="of torch.compile; aot_eager on a CPU")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("overrides", nargs="*", help="overrides of all runs, such as data=shards")
    asked = parser.parse_intermixed_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU; --device cpu shows the same path", file=sys.stderr)
        return 2
    backend = asked.backend or ("inductor" if asked.device == "cuda" else "aot_eager")
    common = ["data.vocab_size=1024", *SIZES[asked.device], *asked.overrides]
    print(f"{device_name(asked.device)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    parity = {name: compare([*common, *own], asked.device, backend) for name, own in CASES.items()}
    passed = all(case["passed"] for case in parity.values())
    speeds = {
        name: measure([*common, *own], asked.device, backend, 60 * asked.minutes)
        for name, own in EXPERIMENTS.items()
    }
    if asked.json:
        found = {"device": device_name(asked.device), "parity": parity, "speed": speeds}
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if passed else 1


def compare(overrides: list[str], device: str, backend: str) -> dict[str, Any]:
    """One network's loss and gradient in float32, in bfloat16, and compiled."""
    run = recurgolf.compose(["tracker=none", *overrides, "trainer.compile=false"])
    where = torch.device(device)
    model = run.build_model().to(where)
    torch.manual_seed(0)
    for parameter in model.parameters():  # zero projections would hide what is behind them
        parameter.data += 0.01 * torch.randn_like(parameter)
    tokens = torch.randint(0, run.data.vocab_size, (4, run.trainer.seq_len + 1), device=where)
    x, y, plan = tokens[:, :-1], tokens[:, 1:], run.plan(1.0)

    def loss(precision: str) -> float:
        with torch.no_grad(), autocast(precision, where):
            return float(model(x, plan, y))

    exact, half = loss("float32"), loss("bfloat16")
    compiled_run = recurgolf.compose(
        ["tracker=none", *overrides, "trainer.compile=true", f"trainer.compile_backend={backend}"]
    )
    shape_network(model, compiled_run.trainer)
    compiled = loss("float32")
    found = {
        "float32": exact,
        "bfloat16": half - exact,
        "compiled": compiled - exact,
        "passed": abs(half - exact) < BFLOAT16_NATS and abs(compiled - exact) < COMPILED_NATS,
    }
    print(
        f"parity {plan.describe():<24} float32 {exact:.5f}, bfloat16 {half - exact:+.5f}, "
        f"compiled {compiled - exact:+.6f}: {'ok' if found['passed'] else 'FAILED'}"
    )
    return found


def measure(overrides: list[str], device: str, backend: str, seconds: float) -> dict[str, Any]:
    """Train for so many seconds; what the machine made of it."""
    run = recurgolf.compose(
        [
            *("tracker=none", "budget=unlimited_16mb", *overrides),
            *(f"budget.train_seconds={seconds}", "trainer.progress=wallclock"),
            *("trainer.steps=1000000", "trainer.checkpoint_seconds=0", "trainer.val_every=0"),
            *("trainer.compile=true", f"trainer.compile_backend={backend}"),
            "trainer.warmup_steps=2",
        ]
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Job.watched(run, Path(folder)))
        trainer.setup()
        trainer.warm_up()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        milliseconds = timed_fit(trainer)
        recompiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        trainer.job.tracker.finish()
        trainer.job.log.close()
    tokens = run.trainer.batch_tokens / statistics.fmean(milliseconds) * 1000
    flops = training_flops(run) * tokens
    peak = next((v for k, v in PEAK_FLOPS.items() if k in device_name(device)), None)
    found = {
        "plan": run.plan(1.0).describe(),
        "steps": trainer.step,
        "ms_per_step": statistics.median(milliseconds),
        "ms_worst_step": max(milliseconds),
        "tokens_per_second": tokens,
        "tflops": flops / 1e12,
        "mfu": None if peak is None else flops / peak,
        "peak_memory_bytes": peak_memory(trainer.job.device),
        "graphs": graphs,
        "recompiled": recompiled,
    }
    mfu = "unknown peak" if found["mfu"] is None else f"MFU {found['mfu']:.1%}"
    print(
        f"{found['plan']:<24} {trainer.step} steps, {found['ms_per_step']:.1f} ms/step (worst "
        f"{found['ms_worst_step']:.1f}), {tokens:,.0f} tok/s, {found['tflops']:.3f} TFLOP/s, "
        f"{mfu}, peak {found['peak_memory_bytes'] / 1e9:.2f} GB, {graphs} graphs, "
        f"{recompiled} recompiled"
    )
    return found


def timed_fit(trainer: Trainer) -> list[float]:
    """Fit, and the milliseconds of every step."""
    milliseconds: list[float] = []
    step = trainer.train_step

    def timed(*given: Any) -> Any:
        began = time.perf_counter()
        result = step(*given)  # ends with a transfer from the device
        milliseconds.append(1000 * (time.perf_counter() - began))
        return result

    trainer.train_step = timed  # type: ignore[method-assign]
    trainer.fit()
    return milliseconds


def training_flops(run: Run) -> float:
    """Floating-point operations per token of forward and backward, under the last plan."""
    return float(make_plan(run).flops_per_token)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    memory = resource.getpagesize() * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {memory:.0f} GB"


if __name__ == "__main__":
    sys.exit(main())
