"""Quantization-aware training in runs: from its fraction on, and over a break."""

import shutil

import torch
from command_line import recurgolf
from safetensors.torch import load_file
from smoke_runs import RunFolder, train

from recurgolf.quant import QuantizedTensor, dequantize_state, quantize_state
from recurgolf.run import Run
from recurgolf.training.base import weights_of
from recurgolf.training.quantize import packed_state, rules_of

SHORT = ("trainer.steps=16", "trainer.log_every=4", "optimizer.ns_dtype=float32")
NOISE = (*SHORT, "quant/qat=noise", "quant.qat.start_fraction=0.5")


def last_tensors(run: RunFolder) -> dict[str, torch.Tensor]:
    found = load_file(max((run.path / "checkpoints").iterdir()) / "tensors.safetensors")
    return {name: t for name, t in found.items() if name.startswith("model/")}


def test_losses_are_those_without_it_until_it_begins():
    plain, noisy = train(*SHORT), train(*NOISE)
    assert noisy.losses[4] == plain.losses[4] and noisy.losses[8] == plain.losses[8]
    assert noisy.losses[12] != plain.losses[12]
    assert "training knows its quantizer: UniformNoise on 12 weights" in noisy.ended.out
    assert "knows its quantizer" not in plain.ended.out


def test_snapped_weights_lie_closer_to_their_grid():
    def distance(folder: RunFolder) -> float:
        run = Run.read(folder.path)
        model, _, _ = weights_of(run, max((folder.path / "checkpoints").iterdir()))
        state = packed_state(model)
        stored = quantize_state(state, rules_of(run, model))
        values = dequantize_state(stored)
        coded = [name for name, value in stored.items() if isinstance(value, QuantizedTensor)]
        errors = [(values[n] - state[n]).norm() / state[n].norm() for n in coded]
        return float(torch.stack(errors).mean())

    snapped = train(*SHORT, "quant.qat.snap.strength=0.9", "quant.qat.snap.start_fraction=0.5")
    assert distance(snapped) < 0.5 * distance(train(*SHORT))


def test_a_run_that_stopped_goes_on_with_the_same_noise(tmp_path):
    """The noise comes from torch's generator, whose state a checkpoint holds."""
    whole = train(*NOISE, "trainer.checkpoint_every=12")
    folder = tmp_path / "run"
    shutil.copytree(whole.path, folder)
    for name in ("summary.json", "artifact.bin", "score.py", "ledger.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints/step_000016")
    recurgolf("resume", folder, cwd=tmp_path).finished()
    again = last_tensors(RunFolder(folder, whole.ended))
    for name, tensor in last_tensors(whole).items():
        assert torch.equal(again[name], tensor), name
