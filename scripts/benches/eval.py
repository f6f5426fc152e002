"""Sliding windows against forwarding every window whole, head on all positions."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import torch
import torch.nn.functional as F
from benches.timing import interleaved

from recurgolf import compose
from recurgolf.data import ByteCount
from recurgolf.eval import SlidingEval, Subject, Text, score

LENGTH, STRIDE, VOCAB, WINDOWS = 1024, 64, 8192, 16
BATCHES = (1, 4)
"""Windows that the straightforward side forwards together; its faster way is compared."""
AT_LEAST = 1.7


@torch.no_grad()
def whole_windows(subject: Subject, text: Text, protocol: SlidingEval, batch: int) -> float:
    """Nats, with nothing spared: what a scoring script does that is written without much ado."""
    plan, nats = subject.plan(), 0.0
    windows = list(protocol.windows(text, LENGTH))
    for place in range(0, len(windows), batch):
        together = windows[place : place + batch]
        ids = torch.stack([text.ids(w.start, w.stop + 1) for w in together])
        logits = subject.model(ids[:, :-1], plan)
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        for window, row in zip(together, losses.view(len(together), -1), strict=True):
            nats += row[window.first - window.start :].double().sum().item()
    return nats


def main(asked: Namespace) -> None:
    overrides = [f"data.vocab_size={VOCAB}", f"model.vocab_size={VOCAB}", *asked.overrides]
    run = compose([*overrides, f"trainer.seq_len={LENGTH}"])
    model = run.build_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and not parameter.any():
                parameter.normal_(std=0.02)  # a projection that starts at zero does nothing
        model.readout.normal_(std=0.3)
    subject = Subject(model, run.looping, LENGTH)
    tokens = np.random.default_rng(0).integers(0, VOCAB, LENGTH + (WINDOWS - 1) * STRIDE + 1)
    ones = torch.ones(VOCAB, dtype=torch.int16)
    table = ByteCount(ones, ones == 0, ones == 0)
    text = Text(tokens.astype(np.uint16), table)
    protocol = SlidingEval(stride=STRIDE)
    results: dict[str, float] = {}

    def ours() -> None:
        results["here"] = score(protocol, subject, text).nats

    def theirs(batch: int) -> None:
        results[f"whole, {batch} at once"] = whole_windows(subject, text, protocol, batch)

    sides = {f"whole, {n} at once": lambda n=n: theirs(n) for n in BATCHES}
    times = interleaved({"here": ours, **sides}, max(3, asked.rounds // 4), warmup=1)
    print(f"{run.name}: {model.config.dim} wide, {subject.plan().num_visits} visits")
    for name, value in times.items():
        print(f"  {name:<28}{value:9.1f} ms, {results[name]:.6f} nats")
    best = min(value for name, value in times.items() if name != "here")
    worst = max(abs(value / results["here"] - 1) for value in results.values())
    print(f"sliding: {best / times['here']:.2f} times as fast (at least {AT_LEAST}), ", end="")
    print(f"numbers equal to {worst:.1e} (at most 1e-5)")
