"""Fresh models have the recorded statistics, and the published numbers of parameters."""

import functools
import json
import math

import pytest
import torch
from recordings import GOLDEN, turning
from source_names import to_source

import recurgolf
from recurgolf import importers
from recurgolf.importers.settings import read_settings

RECORDED = [
    (path.parent.name, number, recorded)
    for path in sorted(GOLDEN.glob("*/init.json"))
    for number, recorded in enumerate(json.loads(path.read_text()))
]

# name -> the whole, of it adapters, of it extra heads
COUNTS = {
    "parameter_golf_baseline": (17_059_912, 0, 0),
    "per_iteration_lora": (35_944_536 + 8_388_608 + 172_032, 172_032, 8_388_608),
    "depth_recurrent_qat": (13_181_976 + 55_296, 55_296, 0),
    "universal_rank1": (23_533_636, 88_320, 0),
    "parallel_recurrent": (25_175_076, 0, 0),
}


@functools.cache
def composed(experiment):
    return recurgolf.compose([f"experiment={experiment}"])


def count(module):
    return 0 if module is None else sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("experiment", COUNTS)
def test_full_size_has_the_published_number_of_parameters(experiment):
    with torch.device("meta"):
        model = composed(experiment).build_model()
    assert (count(model), count(model.adapters), count(model.mtp)) == COUNTS[experiment]


@pytest.mark.parametrize(
    ("reading", "adapters"),
    [
        ("lora=residual", 55_296),
        ("lora=attention lora.visits=all", 193_536),
        ("lora.targets=[q_proj,v_proj]", 96_768),
    ],
)
def test_both_readings_of_the_depth_recurrent_adapters(reading, adapters):
    run = recurgolf.compose(["experiment=depth_recurrent_qat", *reading.split()])
    with torch.device("meta"):
        model = run.build_model()
    assert count(model.adapters) == adapters


def fresh(system, settings, shapes):
    """A fresh model of these settings, its tensors under the source's names."""
    known = importers.SYSTEMS[system]
    values = read_settings(known, turning(settings))
    transformer = importers.run_of(known, values).build_model()
    places = known.places(transformer, values, {})
    return to_source(places, dict(transformer.named_parameters()), shapes)


@pytest.mark.parametrize(
    ("system", "number", "recorded"), RECORDED, ids=[f"{s}-{n}" for s, n, _ in RECORDED]
)
@torch.no_grad()
def test_fresh_weights_have_the_recorded_statistics(system, number, recorded):
    shapes = {name: entry["shape"] for name, entry in recorded["params"].items()}
    tensors = fresh(system, recorded["hyperparameters"], shapes)
    assert set(tensors) == {name for name, shape in shapes.items() if 0 not in shape}
    for name, tensor in tensors.items():
        expected = recorded["params"][name]
        assert list(tensor.shape) == expected["shape"], name
        if expected["min"] == expected["max"]:
            assert torch.all(tensor == expected["min"]), name
            continue
        zeros = (tensor == 0).float().mean().item()
        assert zeros == pytest.approx(expected["fraction_zero"], abs=1e-4), name
        # Five per cent, and four standard errors of two samples where these are few.
        sampling = 4 * math.sqrt(2) / math.sqrt(2 * tensor.numel())
        assert tensor.std().item() == pytest.approx(expected["std"], rel=max(0.05, sampling)), name
        errors = expected.get(
            "orthogonality_max_error_per_slice", [expected.get("orthogonality_max_error", 1.0)]
        )
        for part, error in zip(tensor if tensor.ndim == 3 else [tensor], errors, strict=True):
            if error is not None and error < 1e-4:
                assert deviation(part) < 1e-5, name


def deviation(matrix):
    """Largest deviation from orthonormal rows, or columns where these are fewer."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return (short @ short.T - torch.eye(len(short))).abs().max().item()


STARTS = sorted(GOLDEN.glob("*/trajectory/trajectory.json"))


@pytest.mark.parametrize("path", STARTS, ids=lambda path: path.parents[1].name)
@torch.no_grad()
def test_fresh_weights_have_the_size_of_those_that_a_recorded_run_began_with(path):
    """The recorded checksums: what is zero is zero, what is constant or orthogonal has its norm."""
    recorded = json.loads(path.read_text())
    shapes = {name: entry["shape"] for name, entry in recorded["init"].items()}
    settings = recorded["hyperparameters"] | {"vocab_size": shapes["tok_emb.weight"][0]}
    tensors = fresh(path.parents[1].name, settings, shapes)
    assert set(tensors) == {name for name, shape in shapes.items() if 0 not in shape}
    for name, tensor in tensors.items():
        # Four standard errors of the norm of two samples, which is about 1 / sqrt(2 n) each.
        allowed = 4 / math.sqrt(tensor.numel())
        norm = recorded["init"][name]["l2"]
        assert tensor.norm().item() == pytest.approx(norm, rel=allowed), name


def test_a_table_too_narrow_for_orthogonal_rows_is_projected_from_zero():
    """The source's rule: both sides at least 64, or the zeros that the projection began with."""
    for dim, narrow in ((63, True), (64, False)):
        sizes = {"bigram_dim": dim, "ve_dim": dim, "model_dim": 128, "num_heads": 1}
        sizes |= {"num_kv_heads": 1, "rope_dims": 0, "ve_layers": "1"}
        known = importers.SYSTEMS["universal_rank1"]
        model = importers.run_of(known, read_settings(known, sizes)).build_model()
        for table in (model.bigram, model.value_embed):
            weight = table.proj.weight
            if narrow:
                assert torch.all(weight == 0)
            else:
                assert deviation(weight) < 1e-5
