"""Muon against recorded runs of four systems, against torch.optim.Muon and against exact SVDs."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from recurgolf.config import ConfigError
from recurgolf.optim import Muon, NuMuon, zeropower
from recurgolf.optim.numuon import rank_at

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"

OPTIONS = {
    "baseline": {},
    "per_iteration_lora": {"compat_decay_without_grad": True},
    "parallel_recurrent": {"weight_decay_mode": "coupled_l2"},
    "universal_rank1": {"buffer_dtype": "bf16", "ns_arithmetic": "square_first"},
}

NOTES = {
    path.parents[1].name: json.loads(path.read_text())
    for path in sorted(GOLDEN.glob("*/optimizer/muon.json"))
}
RUNS = [(system, run) for system, notes in NOTES.items() for run in notes["runs"]]


def tensors_of(system, run):
    return load_file(GOLDEN / system / "optimizer" / run["file"])


# The recorder kept one reference to each parameter, so a file of a single-process run holds the
# values after the last step in every place, `param.<i>.init` included. The initial values are
# 0.2 * normal draws of a generator whose seed, a small one, is the one that fits.
SEEDS = range(40)


def starts(run, tensors):
    """What the parameters may have been before the first step."""
    count, last = len(run["shapes"]), run["steps"] - 1
    inits = [tensors[f"param.{i}.init"] for i in range(count)]
    if not all(torch.equal(init, tensors[f"param.{last}.{i}"]) for i, init in enumerate(inits)):
        yield inits
        return
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        yield [0.2 * torch.randn(*shape, generator=generator) for shape in run["shapes"]]


def muon_of(run, params, **options):
    # The baseline's code drops its momentum when nesterov is off and orthogonalises the gradient.
    nesterov = run.get("nesterov", True)
    optimizer = Muon(
        params,
        nesterov=nesterov,
        ns_steps=run["backend_steps"],
        weight_decay=run.get("weight_decay", 0.0),
        row_normalize=run.get("row_normalize", False),
        **options,
    )
    for lr, momentum in zip(run["lr_per_step"], run["momentum_per_step"], strict=True):
        optimizer.param_groups[0].update(lr=lr, momentum=momentum if nesterov else 0.0)
        yield optimizer


def tolerance(lrs, shape):
    return sum(lrs) * 2e-2 * math.sqrt(max(1, shape[-2] / shape[-1]))


def errors_after_all_steps(system, run, tensors, inits):
    """Of every parameter, the largest."""
    params = [nn.Parameter(init.clone()) for init in inits]
    for step, optimizer in enumerate(muon_of(run, params, **OPTIONS[system])):
        for i, param in enumerate(params):
            param.grad = tensors.get(f"grad.{step}.{i}")
        optimizer.step()
    ends = [tensors[f"param.{run['steps'] - 1}.{i}"] for i in range(len(params))]
    return [(p - end).abs().max().item() for p, end in zip(params, ends, strict=True)]


@pytest.mark.parametrize(
    ("system", "run"), RUNS, ids=[f"{s}-{r['file'].removesuffix('.safetensors')}" for s, r in RUNS]
)
def test_parameters_after_all_steps_are_the_recorded_ones(system, run):
    tensors = tensors_of(system, run)
    found = (errors_after_all_steps(system, run, tensors, inits) for inits in starts(run, tensors))
    errors = min(found, key=max)
    for shape, error in zip(run["shapes"], errors, strict=True):
        assert error <= tolerance(run["lr_per_step"], shape)
        # Only the factor of tall matrices is rounded elsewhere: to bfloat16 with the update there.
        if system == "universal_rank1" or shape[-2] <= shape[-1]:
            assert error <= 1e-6


def test_row_shards_repeat_the_recorded_two_process_run():
    run = NOTES["universal_rank1"]["two_process_run"]
    tensors = tensors_of("universal_rank1", run)
    params = [nn.Parameter(tensors[f"param.{i}.init"].clone()) for i in range(len(run["shapes"]))]
    options = OPTIONS["universal_rank1"] | {"compat_shard_rows": run["world_size"]}
    for step, optimizer in enumerate(muon_of(run, params, **options)):
        for i, param in enumerate(params):
            ranks = [
                tensors[f"grad.{step}.{i}.rank{r}"].bfloat16() for r in range(run["world_size"])
            ]
            param.grad = (sum(ranks) / len(ranks)).float()
        optimizer.step()
        for i, param in enumerate(params):
            error = (param.detach() - tensors[f"param.{step}.{i}"]).abs().max().item()
            assert error <= tolerance(run["lr_per_step"][: step + 1], param.shape)


@pytest.mark.parametrize(
    ("system", "arithmetic"), [("baseline", "scale_first"), ("universal_rank1", "square_first")]
)
def test_newton_schulz_is_the_recorded_one_bit_for_bit(system, arithmetic):
    tensors = load_file(GOLDEN / system / "optimizer" / "newton_schulz.safetensors")
    outputs = {key: value for key, value in tensors.items() if key.startswith("output")}
    assert outputs
    for key, expected in outputs.items():
        _, number, steps = key.split(".")
        found = zeropower(
            tensors[f"input.{number}"], int(steps.removeprefix("steps")), arithmetic=arithmetic
        )
        assert torch.equal(found, expected), key


@pytest.mark.parametrize("arithmetic", ["scale_first", "square_first", "fused"])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (3, 20, 31)], ids=str)
def test_singular_values_come_near_one_and_directions_stay(arithmetic, shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = zeropower(matrix, 5, torch.float32, arithmetic).double()
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    x = s / torch.linalg.matrix_norm(matrix.double())[..., None]
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(found, u @ torch.diag_embed(x) @ vh, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shapes", [[(40, 17)] * 3 + [(17, 40)] * 2, [(4, 33, 21), (33, 21)]])
@pytest.mark.parametrize("ns_dtype", ["bf16", "float32"])
def test_equal_shapes_of_a_group_in_one_call_change_no_bit(shapes, ns_dtype):
    results = []
    for together in (True, False):
        generator = torch.Generator().manual_seed(3)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        groups = [params] if together else [[param] for param in params]
        optimizer = Muon([{"params": group} for group in groups], ns_dtype=ns_dtype)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        results.append(params)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("shape", [(32, 80), (80, 32), (48, 48)], ids=str)
def test_updates_agree_with_torch_muon(shape):
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    # torch's own rounds like "fused"; the rest is how either forms its momentum.
    first = Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.1, ns_arithmetic="fused")
    second = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1)
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        first.step()
        second.step()
    assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_a_parameter_without_gradient_keeps_value_and_momentum():
    params = [nn.Parameter(torch.randn(6, 9)) for _ in range(2)]
    optimizer = Muon(params, weight_decay=0.5)
    for param in params:
        param.grad = torch.randn(6, 9)
    optimizer.step()
    value, momentum = params[0].clone(), optimizer.state[params[0]]["momentum_buffer"].clone()
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0], value)
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], momentum)


def test_bfloat16_momentum_uses_the_exact_factor():
    param = nn.Parameter(torch.randn(8, 64))
    optimizer = Muon([param], momentum=0.99, buffer_dtype="bf16")
    grad = torch.randn(8, 64).bfloat16()
    param.grad = grad.float()
    optimizer.step()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    expected = (grad.double() * 0.99).to(torch.bfloat16)
    assert torch.equal(optimizer.state[param]["momentum_buffer"], expected)


def test_torch_state_dict_keeps_bfloat16_buffers():
    make = lambda p: Muon([p], buffer_dtype="bf16")  # noqa: E731
    first = nn.Parameter(torch.randn(5, 7))
    optimizer = make(first)
    first.grad = torch.randn(5, 7)
    optimizer.step()
    second = nn.Parameter(first.detach().clone())
    other = make(second)
    other.load_state_dict(optimizer.state_dict())
    second.grad = first.grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(first, second)


def test_vectors_and_unknown_choices_are_refused():
    with pytest.raises(ConfigError, match="no matrix"):
        Muon([nn.Parameter(torch.zeros(4))])
    with pytest.raises(ConfigError, match="decoupled"):
        Muon([nn.Parameter(torch.zeros(4, 4))], weight_decay_mode="decupled")


def test_numuon_starts_with_every_direction_and_ends_with_few():
    param = nn.Parameter(torch.zeros(12, 20))
    optimizer = NuMuon([param], lr=1.0, momentum=0.0, min_rank=0.25)
    grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(2))
    u, _, vh = torch.linalg.svd(grad.double(), full_matrices=False)
    for fraction, rank in ((0.0, 12), (0.5, 8), (1.0, 3)):
        assert rank_at(fraction, 12, 0.25) == rank
        param.data.zero_()
        param.grad = grad.clone()
        optimizer.param_groups[0]["fraction"] = fraction
        optimizer.step()
        expected = -(u[:, :rank] @ vh[:rank])
        torch.testing.assert_close(param.detach().double(), expected, atol=5e-3, rtol=0)
