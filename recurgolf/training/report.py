"""What a finished run says: where it was measured, the table of bytes, the result."""

from __future__ import annotations

import io
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from recurgolf.artifact.code import PACKED_NAME
from recurgolf.artifact.ledger import Line
from recurgolf.config import kind_of
from recurgolf.run import Run
from recurgolf.training.summary import Summary

if TYPE_CHECKING:
    from recurgolf.training.trainer import Trainer


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
    page = io.StringIO()
    for console in filter(None, (log.console, Console(file=page, width=100))):
        console.print(byte_table(summary, lines))
        for text in result_lines(trainer.run, summary, trainer.dataset.anchors):
            console.print(text, markup=False, highlight=False)
    log.note(page.getvalue().rstrip())


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
        f"before packing  {summary.pre_quant_val_bpb:.4f} (quantization costs {gap:+.4f})",
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
