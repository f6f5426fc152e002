"""Recorded numbers of the public systems, read from tests/fixtures/golden."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


@pytest.fixture(scope="session")
def golden():
    """`golden("baseline/quantization/x.safetensors")`: tensors, or JSON by the ending."""

    def read(name):
        path = GOLDEN / name
        return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)

    return read


@pytest.fixture(scope="session")
def quant_inputs(golden):
    return golden("shared/quant_inputs.safetensors")


@pytest.fixture(scope="session")
def formula_tensor():
    """A large input that is recorded as a formula: ((i·a) mod m − ⌊m/2⌋) / d."""

    def build(shape, a, m, d):
        shape = torch.Size(shape)
        i = torch.arange(shape.numel(), dtype=torch.int64)
        return (((i * a) % m - m // 2).float() / d).reshape(shape)

    return build
