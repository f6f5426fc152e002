"""The end of a run: averaged weights, the file, and the score of that file."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from recurgolf import __version__
from recurgolf.artifact import load, pack
from recurgolf.artifact.code import PACKED_NAME, code_of
from recurgolf.artifact.ledger import Line, add_actual, to_json
from recurgolf.artifact.score import rebuild
from recurgolf.config import kind_of, to_dict
from recurgolf.eval import Score
from recurgolf.plan import make_plan
from recurgolf.quant import quantize_state
from recurgolf.run import Run
from recurgolf.training.summary import Summary

if TYPE_CHECKING:
    from recurgolf.training.trainer import Trainer

ARTIFACT = "artifact.bin"


def finish(trainer: Trainer) -> Summary:
    """Average, checkpoint, quantise, pack, reload and score; writes everything but the training.

    Every rank scores its share; rank 0 alone writes files.
    """
    run, log, clock, ranks = trainer.run, trainer.log, trainer.clock, trainer.ranks
    averaged = trainer.averager.averaged_state()
    trainer.save()
    if averaged is not None:
        trainer.model.load_state_dict(averaged)
        log.line(f"weights: {trainer.averager.status()}")
    before = trainer.validate()
    plan = make_plan(run)
    if ranks.is_first:
        state = {k: v for k, v in trainer.model.state_dict().items() if not k.startswith("mtp.")}
        with clock.phase("quantization"):
            shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            stored = quantize_state(state, run.quant.assign(shapes))
        with clock.phase("packing"):
            log.line("packing the artifact ...")
            table = pack(trainer.folder / ARTIFACT, metadata(trainer), stored, run.artifact.codec)
            code = code_of(run)
            (trainer.folder / PACKED_NAME).write_text(code.source)
        add_actual(plan.lines, table.tensors, table.header_bytes)
        code_sizes = {
            "packed": (trainer.folder / PACKED_NAME).stat().st_size,
            "raw": code.raw_bytes,
            "counted": "packed",
            "modules": code.modules,
        }
        ledger = to_json(plan.lines, code_sizes, run.budget.artifact_bytes)
        (trainer.folder / "ledger.json").write_text(json.dumps(ledger, indent=1) + "\n")
    ranks.wait()
    with clock.phase("evaluation"):
        scorable = rebuild(load(trainer.folder / ARTIFACT))
        result = trainer.score(scorable.model.to(trainer.device), run.eval)
    summary = summarize(trainer, plan.effective_params, before, result)
    if ranks.is_first:
        summary.write(trainer.folder)
        trainer.tracker.summary(summary.to_dict())
        for file in (ARTIFACT, "run.json"):
            name = f"{run.name}-{run.seed}-{Path(file).stem}"
            facts = {"val_bpb": summary.val_bpb, "fingerprint": summary.fingerprint}
            trainer.tracker.log_artifact(trainer.folder / file, name, facts)
        show(trainer, summary, plan.lines)
    ranks.wait()
    return summary


def metadata(trainer: Trainer) -> dict[str, Any]:
    """The header of the artifact: what `artifact.score.rebuild` needs, and where it is from."""
    run = trainer.run
    model = to_dict(run.model)
    model["mtp_heads"] = 0
    return {
        "model": model,
        "looping": to_dict(run.looping),
        "lora": to_dict(run.lora),
        "eval": to_dict(run.eval),
        "seq_len": run.trainer.seq_len,
        "data_vocab_size": run.data.vocab_size,
        "tokenizer": trainer.dataset.tokenizer.sha256,
        "text": trainer.dataset.fingerprint,
        "fingerprint": run.fingerprint,
        "recurgolf": __version__,
    }


def summarize(trainer: Trainer, effective_params: int, before: Score, result: Score) -> Summary:
    """The figures of a run whose files are written."""
    run, folder, clock = trainer.run, trainer.folder, trainer.clock
    ledger = json.loads((folder / "ledger.json").read_text())
    bytes_model = (folder / ARTIFACT).stat().st_size
    bytes_code = ledger["code"]["packed"]
    total = bytes_model + bytes_code
    tokens = trainer.step * run.trainer.batch_tokens
    seconds = clock.seconds["training"]
    peak = max(trainer.ranks.gathered(trainer.peak_memory()))
    return Summary(
        val_bpb=result.val_bpb,
        val_loss=result.val_loss,
        val_bpb_raw=raw_bpb(trainer, result),
        pre_quant_val_bpb=before.val_bpb,
        evals={kind_of(run.eval): result.to_dict()},
        artifact_bytes=total,
        bytes_model=bytes_model,
        bytes_code=bytes_code,
        bytes_code_raw=ledger["code"]["raw"],
        budget_bytes=run.budget.artifact_bytes,
        within_budget=total <= run.budget.artifact_bytes,
        params=trainer.params,
        effective_params=effective_params,
        steps=trainer.step,
        tokens=tokens,
        train_seconds=round(seconds, 3),
        tokens_per_second=round(tokens / seconds, 1),
        peak_memory_bytes=peak,
        val_tokens=result.tokens,
        val_bytes=result.bytes,
        seed=run.seed,
        fingerprint=run.fingerprint,
        status="finished" if total <= run.budget.artifact_bytes else "over_budget",
        folder=str(folder),
        seconds={name: round(value, 3) for name, value in clock.seconds.items()},
        environment=environment(trainer),
    )


def raw_bpb(trainer: Trainer, result: Score) -> float | None:
    """Bits per byte of the raw text; a protocol that drops the tail drops its share of bytes."""
    dataset, sidecar = trainer.dataset, trainer.dataset.val_byte_sidecar
    counted = dataset.val_bytes if sidecar is None else int(sidecar.sum())
    return (
        None if dataset.val_raw_bytes is None else result.val_bpb * counted / dataset.val_raw_bytes
    )


def environment(trainer: Trainer) -> dict[str, Any]:
    """Where the figures were measured; no figure compares without it."""
    device = trainer.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "ranks": trainer.ranks.world_size,
        "threads": torch.get_num_threads(),
        "precision": trainer.precision,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def show(trainer: Trainer, summary: Summary, lines: list[Line]) -> None:
    """The result table, on the console and in train.log."""
    log = trainer.log
    consoles = [c for c in (log.console, log.file and Console(file=log.file, width=100)) if c]
    for console in consoles:
        console.print(byte_table(summary, lines))
        for text in result_lines(trainer.run, summary, trainer.dataset.anchors):
            console.print(text, markup=False, highlight=False)


def byte_table(summary: Summary, lines: list[Line]) -> Table:
    """Bytes by component, predicted and actual."""
    grid = Table(box=box.SIMPLE_HEAD)
    grid.add_column("bytes by component")
    for name in ("params", "predicted", "actual", "bits/param"):
        grid.add_column(name, justify="right")
    for line in lines:
        actual = line.actual or 0.0
        bits = f"{8 * actual / line.params:.2f}" if line.params else ""
        grid.add_row(
            line.component, f"{line.params:,}", f"{line.predicted:,.0f}", f"{actual:,.0f}", bits
        )
    packed, predicted = sum(line.params for line in lines), sum(line.predicted for line in lines)
    grid.add_section()
    grid.add_row("artifact.bin", f"{packed:,}", f"{predicted:,.0f}", f"{summary.bytes_model:,}", "")
    grid.add_row(f"code ({PACKED_NAME}, packed)", "", "", f"{summary.bytes_code:,}", "")
    grid.add_row("total", "", "", f"{summary.artifact_bytes:,}", "")
    return grid


def result_lines(run: Run, summary: Summary, anchors: dict[str, float]) -> list[str]:
    """What came out, what to hold it against, and where it lies."""
    over = summary.artifact_bytes - summary.budget_bytes
    verdict = (
        f"{-over:,} bytes below the budget of {summary.budget_bytes:,}"
        if over <= 0
        else f"OVER THE BUDGET of {summary.budget_bytes:,} by {over:,} bytes"
    )
    raw = "" if summary.val_bpb_raw is None else f" (raw text {summary.val_bpb_raw:.4f})"
    gap = summary.val_bpb - summary.pre_quant_val_bpb
    text = [
        f"val_bpb         {summary.val_bpb:.4f}{raw}, {kind_of(run.eval)}, of the packed file",
        f"before packing  {summary.pre_quant_val_bpb:.4f} (quantisation costs {gap:+.4f})",
        f"bytes           {summary.artifact_bytes:,}: {verdict}",
        f"training        {summary.steps:,} steps, {summary.tokens:,} tokens in "
        f"{summary.train_seconds:.0f} s = {summary.tokens_per_second:,.0f} tokens/s",
        f"memory          {summary.peak_memory_bytes / 1e9:.2f} GB at most",
    ]
    if anchors:
        held = ", ".join(f"{name} {value:.3f}" for name, value in anchors.items())
        text.append(f"on this text    {held} (bits per raw byte)")
    text.append(f"everything in   {summary.folder}")
    return text
