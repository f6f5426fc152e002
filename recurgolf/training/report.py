"""What a finished run leaves and says: errors along the visits, scores, the table of bytes."""

from __future__ import annotations

import io
import shlex
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from recurgolf.artifact.ledger import Line
from recurgolf.audit import audit_at_the_end
from recurgolf.config import kind_of
from recurgolf.counted.code import PACKED_NAME
from recurgolf.eval.several import write_scores
from recurgolf.log import plain_console
from recurgolf.run import Run
from recurgolf.seal import seal
from recurgolf.training.packing import ARTIFACT
from recurgolf.training.trajectory import trajectory, trajectory_lines, validation_windows

if TYPE_CHECKING:
    from recurgolf.training.finish import Outcome
    from recurgolf.training.job import Job
    from recurgolf.training.summary import Summary

COSTLY_PACKING = 0.01
"""Bits per byte that packing may cost before the end of a run says what would help."""


def full_report(job: Job, summary: Summary, outcome: Outcome) -> None:
    """Write scores/ and summary.json, tell tracker and console, audit if asked to (rank 0)."""
    run, folder, log = job.run, job.folder, job.log
    gap = summary.val_bpb - summary.pre_quant_val_bpb
    ids = validation_windows(job.dataset.validation_tokens(), run.trainer.seq_len)
    summary.trajectory = trajectory(outcome.exact, outcome.packed, run.eval_plan, ids, gap)
    write_scores(folder, outcome.scores, outcome.protocols, job.dataset.fingerprint)
    summary.write(folder)
    job.tracker.summary({**summary.to_dict(), "quantization_gap": gap})
    for file in (folder / ARTIFACT, folder / "run.json"):
        facts = {"val_bpb": summary.val_bpb, "fingerprint": summary.fingerprint}
        job.tracker.log_artifact(file, f"{run.name}-{run.seed}-{file.stem}", facts)
    for line in [
        *result_lines(run, summary),
        *packing_advice(run, summary),
        *detail_lines(summary, job.dataset.anchors),
        *cap_lines(summary.caps),
        *trajectory_lines(summary.trajectory),
    ]:
        log.line(line)
    page = io.StringIO()
    for console in filter(None, (log.console, plain_console(file=page, width=100))):
        table = byte_table(summary, job.plan.lines)
        # A narrow terminal breaks the lines; cut off, they would have no figures.
        console.width = max(console.width, Console(width=10_000).measure(table).maximum)
        console.print(table)
    log.note(page.getvalue().rstrip())
    seal(folder)
    if run.eval.audit:
        audit_at_the_end(folder, log)


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


def result_lines(run: Run, summary: Summary) -> list[str]:
    """The score, the bytes and where everything lies."""
    over = summary.artifact_bytes - summary.budget_bytes
    verdict = (
        f"{-over:,} bytes below the budget of {summary.budget_bytes:,}"
        if over <= 0
        else f"OVER THE BUDGET of {summary.budget_bytes:,} by {over:,} bytes"
    )
    raw = "" if summary.val_bpb_raw is None else f" (raw text {summary.val_bpb_raw:.4f})"
    rewritten = f"; per byte of text that its normalizer rewrites: {summary.normalizer}"
    rewritten = rewritten if summary.normalizer else ""
    return [
        f"val_bpb         {summary.val_bpb:.4f}{raw}, {kind_of(run.eval)}, of the packed file"
        f"{rewritten}",
        f"bytes           {summary.artifact_bytes:,}: {verdict}",
        f"everything in   {summary.folder}",
    ]


def packing_advice(run: Run, summary: Summary) -> list[str]:
    """What packing cost and what would help, where it cost more than COSTLY_PACKING."""
    cost = summary.val_bpb - summary.pre_quant_val_bpb
    if not cost > COSTLY_PACKING:
        return []
    # Finer steps make a file larger: worth trying only where a tenth of it is still free.
    left = summary.budget_bytes - summary.artifact_bytes
    if left > 0.1 * summary.bytes_model and not run.quant.fill_budget:
        remedy = (
            f"{left:,} bytes of the budget are left: quant.fill_budget=true takes finer steps "
            "until the file fills it, quant=int8 has eight bits"
        )
    else:
        remedy = (
            "the budget has no room for finer steps: train with quant/qat=rate, or go on for a "
            f"while with the weights that are there: recurgolf pack {shlex.quote(summary.folder)} "
            "NEW quant/qat=rate --steps N"
        )
    return [f"packing cost    {cost:.4f} bits per byte, which is much; {remedy}"]


def detail_lines(summary: Summary, anchors: dict[str, float]) -> list[str]:
    """How the result came about, and what to hold it against."""
    gap = summary.val_bpb - summary.pre_quant_val_bpb
    text = [
        f"before packing  {summary.pre_quant_val_bpb:.4f} (quantization costs {gap:+.4f})",
        f"training        {summary.steps:,} steps, {summary.tokens:,} tokens in "
        f"{summary.train_seconds:.0f} s = {summary.tokens_per_second:,.0f} tokens/s",
        f"memory          {summary.peak_memory_bytes / 1e9:.2f} GB at most",
    ]
    if anchors:
        held = ", ".join(f"{name} {value:.3f}" for name, value in anchors.items())
        text.append(f"on this text    {held} (bits per raw byte)")
    return text


def cap_lines(caps: dict[str, dict[str, Any]]) -> list[str]:
    """A line for every cap that there is."""
    return [
        f"cap {name:<12}{cap['used']:.0f} of {cap['seconds']:.0f} s "
        f"({' + '.join(cap['phases'])}){'' if cap['kept'] else ': BROKEN'}"
        for name, cap in caps.items()
        if cap["seconds"] is not None
    ]


__all__ = ["full_report"]
