"""The quantization gap of a looped network: five ways to the same few bits, on equal seeds.

    python scripts/quantization_gap.py FOLDER [--bits 4] [--seeds 1 2 3]

Three post-training quantizers share one trained network per seed (`recurgolf pack`), the two kinds
of quantization-aware training have one each. Ends with a table; FOLDER keeps every run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from recurgolf.training.summary import Summary

RULES = (
    "quant.rules=[{pattern: embed.weight, bits: 6, clip: {kind: sigma, k: 6.3}, method: METHOD},"
    " {pattern: '*', bits: BITS, clip: {kind: sigma, k: CLIP}, method: METHOD}]"
)
CLIPS = {2: 1.5, 3: 2.5, 4: 3.0, 5: 4.0, 6: 6.0}
"""Bits of the blocks -> standard deviations that the highest code reaches."""
RUN = [
    *("experiment=demo", "data.vocab_size=1024", "model.dim=128", "tracker=none", "eval=plain"),
    *("looping=prelude_core_coda", "looping.passes=3", "trainer.steps=200"),
    *("trainer.batch_tokens=1024", "trainer.seq_len=128", "trainer.precision=float32"),
    *("trainer.threads=1", "budget.train_seconds=null", "trainer.log_every=100"),
]
AWARE = ["quant.qat.start_fraction=0.5", "quant.qat.blocks=all"]
TRAINED = {
    "rounding": [],
    "noisy QAT": ["quant/qat=noise", *AWARE],
    "straight-through QAT": ["quant/qat=straight_through", *AWARE],
}
PACKED = {"naive GPTQ": [], "two-phase GPTQ": ["quant.calibration.two_phase=true"]}
"""From the weights of `rounding`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, choices=CLIPS, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    asked = parser.parse_args()
    rules = RULES.replace("BITS", str(asked.bits)).replace("CLIP", str(CLIPS[asked.bits]))
    rounding = ["quant=int6_tiny", rules.replace("METHOD", "rtn")]
    gptq = ["quant=gptq_int6_tiny", rules.replace("METHOD", "gptq")]
    found: dict[str, list[Summary]] = {}
    for seed in asked.seeds:
        for name, quant in TRAINED.items():
            own = [*RUN, *rounding, *quant, f"seed={seed}"]
            found.setdefault(name, []).append(
                made(place(asked.folder, name, seed), lambda to, own=own: [*own, run_dir(to)])
            )
        base = place(asked.folder, "rounding", seed)
        for name, quant in PACKED.items():
            found.setdefault(name, []).append(
                made(
                    place(asked.folder, name, seed),
                    lambda to, base=base, own=quant: ["pack", str(base), str(to), *gptq, *own],
                )
            )
    print(table(found))


def place(folder: Path, name: str, seed: int) -> Path:
    """Where one run lies."""
    return folder / f"{name.replace(' ', '_')}_seed={seed}"


def run_dir(folder: Path) -> str:
    """Hydra's override for a run's folder."""
    return f"hydra.run.dir='{folder}'"


def made(folder: Path, arguments: Callable[[Path], list[str]]) -> Summary:
    """The summary of a run, which is made where it is not there yet."""
    if not (folder / "summary.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "recurgolf", *arguments(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Summary.read(folder)


def table(found: dict[str, list[Summary]]) -> str:
    """Mean and deviation over seeds of the score, the gap and the path's error."""
    lines = [
        "| | val_bpb before | after | gap | first visit | last visit | model bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        columns = [
            spread([r.pre_quant_val_bpb for r in runs], 4),
            spread([r.val_bpb for r in runs], 4),
            spread([r.val_bpb - r.pre_quant_val_bpb for r in runs], 4),
            spread([r.trajectory["visits"][0]["relative_error"] for r in runs], 3),
            spread([r.trajectory["visits"][-1]["relative_error"] for r in runs], 3),
            f"{statistics.mean(r.bytes_model for r in runs):,.0f}",
        ]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """`1.2345 ± 0.0006`."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
