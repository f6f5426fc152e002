"""Entropy coding of trained codes against their entropy and brotli-11; decoding time."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import recurgolf
from recurgolf.artifact import load
from recurgolf.artifact.codecs import AnsCodec, BrotliCodec
from recurgolf.artifact.decode import decode_ans, segments_of
from recurgolf.quant import QuantizedTensor, code_entropy

RUNS = {
    "demo": ["experiment=demo", "trainer.steps=60"],
    "per_iteration_lora_cpu": ["experiment=per_iteration_lora_cpu", "trainer.steps=60"],
    "gated_delta_lora_cpu": ["experiment=gated_delta_lora_cpu", "trainer.steps=60"],
}
"""What is trained where no finished runs are given."""
DECODED_BYTES = 16_000_000

Arrays = list[np.ndarray]


def main(asked: argparse.Namespace) -> None:
    """Three finished runs, given as folders or trained for a minute each.

    `bound` is the zeroth-order entropy of every matrix's codes on its own, without any table.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(text) for text in asked.overrides] or trained(Path(temporary))
        found = {
            f"{folder.name}, {bits} bits": a for folder in folders for bits, a in codes(folder)
        }
    heads = ("codes", "bound", "ans", "of bound", "brotli-11", "of bound")
    print(f"{'':<38}" + "".join(f"{head:>11}" for head in heads))
    for name, arrays in found.items():
        bound = sum(code_entropy(torch.from_numpy(a)) * a.size / 8 for a in arrays)
        ans, brotli = coded(arrays, AnsCodec()), coded(arrays, BrotliCodec(transform="shuffle"))
        size = sum(a.size for a in arrays)
        print(
            f"{name:<38}{size:>11,}{bound:>11,.0f}{ans:>11,}{ans / bound:>11.4f}{brotli:>11,}"
            f"{brotli / bound:>11.4f}"
        )
    largest = max(found.values(), key=lambda arrays: sum(a.size for a in arrays))
    print(
        f"\ndecoding {DECODED_BYTES:,} bytes of ans: {decoding_seconds(largest):.2f} s (at most 2)"
    )


def trained(folder: Path) -> list[Path]:
    """The runs of `RUNS`, trained now."""
    for name, overrides in RUNS.items():
        quiet = ["tracker=none", "trainer.log_every=1000"]
        recurgolf.train(recurgolf.compose([*overrides, *quiet]), folder / name)
    return [folder / name for name in RUNS]


def codes(folder: Path) -> list[tuple[int, Arrays]]:
    """Bits -> the code matrices of a run's artifact, as they lie in one section."""
    by_bits: dict[int, Arrays] = {}
    for _, tensor in sorted(load(folder / "artifact.bin").tensors.items()):
        if isinstance(tensor, QuantizedTensor):
            by_bits.setdefault(tensor.bits, []).append(tensor.codes.numpy())
    # A section of a few thousand codes is mostly tables, whoever codes it.
    return [(b, arrays) for b, arrays in by_bits.items() if sum(a.size for a in arrays) >= 100_000]


def stream(arrays: Arrays) -> tuple[bytes, list[tuple[int, ...]]]:
    """The arrays of a section, one after the other, and their shapes."""
    return b"".join(a.tobytes() for a in arrays), [a.shape for a in arrays]


def coded(arrays: Arrays, codec: AnsCodec | BrotliCodec) -> int:
    """Bytes of the payload."""
    raw, shapes = stream(arrays)
    return len(codec.encode(raw, shapes, 1).payload)


def decoding_seconds(arrays: Arrays) -> float:
    """Seconds to decode a payload of `DECODED_BYTES`, the same codes over and over."""
    raw, shapes = stream(arrays)
    size = len(AnsCodec().encode(raw, shapes, 1).payload)
    times = -(-DECODED_BYTES // size)
    raw, shapes = raw * times, shapes * times
    payload = AnsCodec().encode(raw, shapes, 1).payload
    segments = segments_of("none", shapes, 1)
    took = []
    for _ in range(3):
        began = time.perf_counter()
        back = decode_ans(payload, len(raw), segments)
        took.append((time.perf_counter() - began) * DECODED_BYTES / len(payload))
        assert back == raw
    return min(took)
