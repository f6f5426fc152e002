"""Sliding windows and reconstruction against plain implementations, and memory along the text."""

from __future__ import annotations

import tempfile
import tracemalloc
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from benches.memory import PeakMemory
from benches.timing import interleaved

from recurgolf import compose
from recurgolf.data import ByteCount
from recurgolf.eval import Eval, ScoredModel, SlidingEval, Text, score
from recurgolf.eval.ttt import ReconstructEval
from recurgolf.run import Run

LENGTH, STRIDE, VOCAB, WINDOWS = 1024, 64, 8192, 16
CHUNKED_WINDOWS = 2
"""Of the reconstruction, whose plain side forwards every one 16 times."""
BATCHES = (1, 4)
"""Windows that the plain side forwards together; its faster way is compared."""
AT_LEAST = {"sliding": 1.7, "reconstruction": 3.0}
SHORT, TIMES, WINDOW = 16_384, 4, 64
"""Tokens of the shorter text whose memory is measured, how many times as long the other one is,
and the window."""


@torch.no_grad()
def whole_windows(scored_model: ScoredModel, text: Text, protocol: Eval, batch: int) -> float:
    """Nats, with nothing spared: what a scoring script does that is written without much ado."""
    plan, nats = scored_model.plan(), 0.0
    windows = list(protocol.windows(text, LENGTH))
    for place in range(0, len(windows), batch):
        together = windows[place : place + batch]
        ids = torch.stack([text.ids(w.start, w.stop + 1) for w in together])
        logits = scored_model.model(ids[:, :-1], plan)
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        for window, row in zip(together, losses.view(len(together), -1), strict=True):
            nats += row[window.first - window.start :].double().sum().item()
    return nats


@torch.no_grad()
def whole_forward_per_chunk(
    scored_model: ScoredModel, text: Text, protocol: ReconstructEval
) -> float:
    """Nats of the reconstruction as its source runs it: the whole window anew for every chunk."""
    model, plan, nats = scored_model.model, scored_model.plan(), 0.0
    mlps = [block.mlp for block in model.blocks]
    kept = [mlp.down_proj.weight.clone() for mlp in mlps]
    for window in protocol.windows(text, LENGTH):
        ids = text.ids(window.start, window.stop + 1)[None]
        for start in range(0, window.stop - window.start, protocol.chunk_tokens):
            stop = min(start + protocol.chunk_tokens, window.stop - window.start)
            hidden = model.hidden(ids[:, :-1], plan)
            losses = F.cross_entropy(model.logits(hidden)[0].float(), ids[0, 1:], reduction="none")
            scored = slice(max(start, window.first - window.start), stop)
            nats += losses[scored].double().sum().item()
            states = F.rms_norm(hidden[0, start:stop], hidden.shape[-1:], eps=model.config.norm_eps)
            for mlp in mlps:
                inner: list[torch.Tensor] = []
                look = mlp.down_proj.register_forward_pre_hook(
                    lambda _, given, seen=inner: seen.append(given[0])
                )
                error = mlp(states, {}) - states
                look.remove()
                mlp.down_proj.weight.sub_(protocol.lr / len(states) * error.T @ inner[0])
        for mlp, weight in zip(mlps, kept, strict=True):
            mlp.down_proj.weight.copy_(weight)
    return nats


def random_text(num_tokens: int) -> Text:
    """Of which every token counts for one byte."""
    ones = torch.ones(VOCAB, dtype=torch.int16)
    tokens = np.random.default_rng(0).integers(0, VOCAB, num_tokens).astype(np.uint16)
    return Text(tokens, ByteCount(ones, ones == 0, ones == 0))


def scored_model_of(run: Run) -> ScoredModel:
    """A model of random weights; a projection that starts at zero would do nothing."""
    model = run.build_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and not parameter.any():
                parameter.normal_(std=0.02)
        model.readout.normal_(std=0.3)
    return ScoredModel(model, run.looping, LENGTH)


def side_by_side(
    what: str, ours: Callable[[], float], theirs: dict[str, Callable[[], float]], rounds: int
) -> None:
    """Time both in turns and print the ratio of the fastest of the plain ways to ours."""
    results: dict[str, float] = {}

    def keeping(name: str, way: Callable[[], float]) -> Callable[[], None]:
        return lambda: results.update({name: way()})

    sides = {"here": ours, **theirs}
    times = interleaved({name: keeping(name, way) for name, way in sides.items()}, rounds, warmup=1)
    for name, value in times.items():
        print(f"  {name:<28}{value:9.1f} ms, {results[name]:.6f} nats")
    ratio = min(times[name] for name in theirs) / times["here"]
    apart = max(abs(value / results["here"] - 1) for value in results.values())
    print(f"{what}: {ratio:.2f} times as fast (at least {AT_LEAST[what]}), ", end="")
    print(f"numbers equal to {apart:.1e} (at most 1e-5)\n")


def peak_bytes(scored_model: ScoredModel, num_tokens: int) -> tuple[int, int]:
    """Most bytes alive while a text on disk is scored: of tensors, and of arrays and objects."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens"
        random_text(num_tokens).tokens.tofile(path)
        mapped = np.memmap(path, dtype=np.uint16, mode="r")
        text = Text(mapped, random_text(2).byte_count)
        protocol = SlidingEval(seq_len=WINDOW, stride=WINDOW // 2)
        tracemalloc.start()
        try:
            with PeakMemory() as memory:
                score(protocol, scored_model, text)
            return memory.peak, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


def main(asked: Namespace) -> None:
    overrides = [f"data.vocab_size={VOCAB}", f"model.vocab_size={VOCAB}", *asked.overrides]
    run = compose([*overrides, f"trainer.seq_len={LENGTH}"])
    scored_model, rounds = scored_model_of(run), max(3, asked.rounds // 4)
    print(f"{run.name}: {run.model.dim} wide, {scored_model.plan().num_visits} visits")

    text, sliding = random_text(LENGTH + (WINDOWS - 1) * STRIDE + 1), SlidingEval(stride=STRIDE)
    side_by_side(
        "sliding",
        lambda: score(sliding, scored_model, text).nats,
        {
            f"whole, {n} at once": lambda n=n: whole_windows(scored_model, text, sliding, n)
            for n in BATCHES
        },
        rounds,
    )

    few = random_text(LENGTH + (CHUNKED_WINDOWS - 1) * STRIDE + 1)
    learning = ReconstructEval(stride=STRIDE, chunk_tokens=STRIDE)
    side_by_side(
        "reconstruction",
        lambda: score(learning, scored_model, few).nats,
        {"a whole forward per chunk": lambda: whole_forward_per_chunk(scored_model, few, learning)},
        min(rounds, 3),
    )

    peak_bytes(scored_model, 2 * LENGTH)  # what is made once and kept
    peaks = {n: peak_bytes(scored_model, n) for n in (SHORT, TIMES * SHORT)}
    for tokens, (tensors, arrays) in peaks.items():
        print(
            f"  {tokens:7,} tokens: {tensors / 1e6:6.2f} MB of tensors, {arrays / 1e6:.2f} MB else"
        )
    short, long = (sum(peak) for peak in peaks.values())
    print(f"memory: {TIMES} times the text takes {long / short:.3f} times as much (at most 1.05)")
