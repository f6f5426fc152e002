"""Calibration in a run: recorded Gram matrices, ranks, text of the model's own, both phases."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from command_line import recurgolf
from safetensors.torch import load_file
from smoke_runs import EXACT, composed, small, small_text, train

from recurgolf import importers
from recurgolf.artifact import load
from recurgolf.config import ConfigError
from recurgolf.data.calibration_text import CalibrationText
from recurgolf.log import Log
from recurgolf.quant import (
    GramCollector,
    QuantizedTensor,
    QuantizerGrid,
    SigmaClip,
    dequantize,
    dequantize_state,
    gptq_quantize_many,
)
from recurgolf.quant.gptq import hessian_error
from recurgolf.quant.rtn import exported
from recurgolf.run import Run
from recurgolf.training.base import weights_of
from recurgolf.training.calibration import (
    check_calibration,
    collect_grams,
    layers_of,
    readout_name,
)
from recurgolf.training.job import Job
from recurgolf.training.quantize import quantize_model, rules_of, weights_under

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden/per_iteration_lora/quantization"
GPTQ = (
    "quant=gptq_int6_tiny",
    "quant.tolerance=null",
    "quant.calibration.sequences=6",
    "quant.calibration.batch=2",
    *("trainer.steps=8", "trainer.log_every=4"),
)


def silent(run):
    """A job that only computes."""
    return Job.watched(run, Path(), log=Log(None, False))


def text_of(run, dataset, model):
    """Calibration text as a run takes it."""
    seeds = run.seed_of("data"), run.seed_of("noise")
    return CalibrationText(dataset, model, run.eval_plan, *seeds, run.data.vocab_size)


@pytest.fixture(scope="module")
def recorded():
    """The recorded network of per_iteration_lora with its calibration batches."""
    found = importers.load(
        "per_iteration_lora",
        json.loads((GOLDEN / "mixed.json").read_text()),
        GOLDEN / "mixed.weights.safetensors",
    )
    batches = load_file(GOLDEN / "mixed.batches.safetensors")
    return found, [batches[name].long() for name in sorted(batches)]


def grams_over(model, plan, batches):
    """Grams over given ids, by the same hooks that a run uses."""
    readout = readout_name(model)
    collector = GramCollector(layers_of(model), {readout: model.readout.shape[1]})
    model.eval()
    with torch.no_grad(), collector:
        for ids in batches:
            collector.begin(ids.numel())
            collector.add(readout, model.hidden(ids, plan))
    return collector.grams()


def test_recorded_gram_matrices_codes_and_logits_come_out(recorded):
    found, batches = recorded
    model = found.model.transformer
    grams = grams_over(model, found.model.eval().plan, batches)
    hessians = load_file(GOLDEN / "mixed.hessians.safetensors")
    checks = json.loads((GOLDEN / "mixed.json").read_text())["hessian_checks"]
    # The recording divides by batches, we by tokens.
    tokens = batches[0].numel()
    names = {place.source: place.ours for place in found.places if place.source in checks}
    assert set(names) == set(checks)
    for source, name in names.items():
        ours = grams[name] * tokens
        if source in hessians:
            torch.testing.assert_close(ours, hessians[source], rtol=1e-4, atol=1e-3)
        else:
            diag, rows = hessians[f"{source}.diag"], hessians[f"{source}.rows0_4"]
            torch.testing.assert_close(ours.diagonal(), diag, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(ours[:4], rows, rtol=1e-4, atol=1e-2)
        assert float(ours.norm()) == pytest.approx(checks[source]["l2"], rel=1e-5)
    codes = load_file(GOLDEN / "mixed.quantized.safetensors")
    asked = json.loads((GOLDEN / "mixed.json").read_text())["hyperparameters"]
    for source, name in names.items():
        kind = "embed" if "emb" in source else "matrix"
        spec = QuantizerGrid(asked[f"{kind}_bits"], SigmaClip(asked[f"{kind}_clip_sigmas"]))
        weight = model.get_parameter(name)
        (result,) = gptq_quantize_many([weight], [grams[name]], spec)
        assert torch.equal(result.scales, codes[f"{source}.scale"])
        off = (result.codes.int() - codes[f"{source}.q"].int()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() <= 0.005
        weight.data = dequantize(codes[f"{source}.q"], codes[f"{source}.scale"])
    logits = load_file(GOLDEN / "mixed.quantized_logits.safetensors")["logits"]
    with torch.no_grad():
        ours = found.model(batches[0][:2])
    torch.testing.assert_close(ours, logits, rtol=1e-3, atol=2e-3)


@pytest.fixture(scope="module")
def trained():
    """A trained looped network with adapters: run, model, data."""
    folder = train("trainer.steps=16", "quant=int6_tiny")
    run = Run.read(folder.path)
    model, _, _ = weights_of(run, next((folder.path / "checkpoints").iterdir()))
    return run, model.eval(), run.data.prepare(lambda line: None)


def other(run, **fields):
    """The Run with another calibration, rules under gptq."""
    quant = composed(*small("quant=gptq_int6_tiny", "quant.tolerance=null")).quant
    made = Run.from_dict({**run.to_dict(), "quant": _dict(quant)})
    for name, value in {"sequences": 6, "batch": 2, **fields}.items():
        setattr(made.quant.calibration, name, value)
    return made


def _dict(node):
    from recurgolf.config import to_dict

    return to_dict(node)


class Recorder:
    """Inputs of every matrix product with a weight, in order of the calls: no hooks."""

    def __init__(self, model):
        self.by_weight = {p.data_ptr(): (n, []) for n, p in model.named_parameters()}

    def __call__(self, x, weight, *rest):
        if weight.data_ptr() in self.by_weight and weight.ndim == 2:
            self.by_weight[weight.data_ptr()][1].append(x.double().flatten(0, -2))
        return self.linear(x, weight, *rest)

    linear = staticmethod(F.linear)


def test_visits_of_a_looped_network_pooled_by_hand_equal_the_hooks(trained, monkeypatch):
    run, model, dataset = trained
    visit_weights = [0.25, 2.0]
    run = other(run, visit_weights=visit_weights)
    names = weights_under("gptq", rules_of(run, model))
    grams = collect_grams(silent(run), model, names)
    assert set(grams) == set(names) and "embed.weight" in names
    rows = text_of(run, dataset, model).training_rows(range(6), 64, 6)
    assert len({tuple(row.tolist()) for row in rows}) == 6
    recorder = Recorder(model)
    monkeypatch.setattr(F, "linear", recorder)
    with torch.no_grad():
        model(rows, run.eval_plan)
    assert len(run.eval_plan.visits) == 4, "both blocks twice"
    for name, inputs in recorder.by_weight.values():
        if name in names:
            looped = name.startswith("blocks.")
            assert len(inputs) == (2 if looped else 1), name
            weights = visit_weights if looped else [1.0]
            total = sum(w * x.T @ x for w, x in zip(weights, inputs, strict=True))
            expected = (total / rows.numel()).float()
            torch.testing.assert_close(grams[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_are_active(trained):
    run, model, _ = trained
    run = other(run)
    names = [n for n in weights_under("gptq", rules_of(run, model)) if ".o_proj." in n]
    with_them = collect_grams(silent(run), model, names)
    adapters, model.adapters = model.adapters, None
    without = collect_grams(silent(run), model, names)
    model.adapters = adapters
    for name in names:
        assert not torch.allclose(with_them[name], without[name], rtol=1e-3)


def test_gptq_beats_rounding_on_every_layer(trained):
    run, model, _ = trained
    run = other(run, sequences=24)
    rules = rules_of(run, model)
    names = weights_under("gptq", rules)
    grams = collect_grams(silent(run), model, names)
    assert len(names) >= 13
    for name in names:
        weight, spec = model.get_parameter(name).detach(), rules[name].grid
        assert spec is not None
        (result,) = gptq_quantize_many([weight], [grams[name]], spec)
        rounding = hessian_error(weight - exported(weight, spec), grams[name])
        assert result.error < rounding, name


def test_two_phases_calibrate_the_core_on_the_network_quantized_elsewhere(trained, monkeypatch):
    run, model, _ = trained
    run = other(run, two_phase=True)
    rules = rules_of(run, model)
    names = weights_under("gptq", rules)
    core = [n for n in names if n.startswith("blocks.")]
    flat = [n for n in names if n not in core]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    seen = []

    def spied(job, model, names):
        seen.append((sorted(names), {n: t.clone() for n, t in model.state_dict().items()}))
        return collect_grams(job, model, names)

    monkeypatch.setattr("recurgolf.training.quantize.collect_grams", spied)
    stored = quantize_model(silent(run), model)
    assert stored is not None and set(stored) == set(before)
    assert [names for names, _ in seen] == [sorted(flat), sorted(core)]
    values = dequantize_state(stored)
    for name, weight in seen[1][1].items():
        expected = before[name] if name.startswith("blocks.") else values[name]
        assert torch.equal(weight, expected), name
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), f"{name} was not put back"
    grams = collect_grams(silent(run), model, core)
    (one_phase,) = gptq_quantize_many([before[core[0]]], [grams[core[0]]], rules[core[0]].grid)
    assert not torch.equal(one_phase.codes, stored[core[0]].codes)


def test_text_of_the_models_own_is_its_distribution_and_follows_the_seed_alone(trained):
    run, model, dataset = trained
    run = Run.from_dict({**run.to_dict()})
    text = text_of(run, dataset, model)
    rows = text.sampled_rows([0, 1, 2], 12, 1.0)
    assert rows.shape == (3, 12) and rows.max() < run.data.vocab_size
    assert (rows[:, 0] == dataset.tokenizer.bos_id).all()
    assert torch.equal(text.sampled_rows([2], 12, 1.0)[0], rows[2])
    assert len({tuple(row.tolist()) for row in rows}) == 3
    run.seeds.noise = 5
    other = text_of(run, dataset, model)
    assert not torch.equal(other.sampled_rows([0, 1, 2], 12, 1.0), rows)
    # Without heat the likeliest token always: greedy decoding.
    greedy = rows[:1, :1]
    with torch.no_grad():
        while greedy.shape[1] < 8:
            logits = model(greedy, run.eval_plan)[:, -1, : run.data.vocab_size]
            greedy = torch.cat((greedy, logits.argmax(-1, keepdim=True)), 1)
        assert torch.equal(text.sampled_rows([0], 8, 1e-4), greedy)
        # The second token over many rows, against the softmax of the model.
        drawn = text.sampled_rows(range(400), 2, 1.0)[:, 1]
        shares = torch.softmax(model(rows[:1, :1], run.eval_plan)[0, 0], -1)
    likely = shares.argmax()
    share, deviation = float(shares[likely]), float((shares[likely] / 400) ** 0.5)
    assert float((drawn == likely).float().mean()) == pytest.approx(share, abs=4 * deviation)


def test_a_run_calibrates_on_its_own_text_and_says_what_it_took():
    run = train(*GPTQ, "quant/calibration=self_generated", "quant.calibration.seq_len=16")
    summary = run.summary
    assert summary["quantization"]["weights"] == {"gptq": 13}
    assert summary["quantization"]["cholesky_retries"] == 0
    # What reads no training data is not on the training clock.
    assert summary["seconds"]["calibration"] == 0 < summary["seconds"]["quantization"]
    stored = load(run.path / "artifact.bin").tensors
    methods = [v.method for v in stored.values() if isinstance(v, QuantizedTensor)]
    assert methods == ["gptq"] * 13


def test_two_ranks_calibrate_as_one_does():
    """Each sees its share of the rows; in both phases, with the weights of rank 0 handed round.

    They trained with the exported weights in sight, as one rank does.
    """
    exact = (*GPTQ, "optimizer.ns_dtype=float32", "quant.calibration.two_phase=true")
    exact = (*exact, "quant/qat=straight_through", "quant.qat.start_fraction=0.4")
    one = train(*exact)
    two = train(*exact, "trainer.devices=2")
    assert two.losses == pytest.approx(one.losses, abs=1e-3)
    assert one.summary["seconds"]["calibration"] > 0
    stored = [dequantize_state(load(r.path / "artifact.bin").tensors) for r in (one, two)]
    for name, tensor in stored[0].items():
        off = (stored[1][name] - tensor).abs()
        step = tensor.abs().max() / 8
        assert off.max() <= step and (off > 1e-3 * step).float().mean() < 0.02, name
    figures = [r.summary["quantization"]["mean_error"]["gptq"] for r in (one, two)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-2)
    assert two.summary["val_bpb"] == pytest.approx(one.summary["val_bpb"], abs=2e-3)


def test_more_text_than_there_is_is_refused_before_training(tmp_path):
    overrides = small("quant=gptq_int6_tiny", "quant.calibration.sequences=1_000_000")
    message = recurgolf(*overrides, "hydra.run.dir=run", cwd=tmp_path).refused()
    assert "quant.calibration.sequences=1000000 of 64 tokens" in message
    assert "at most" in message and small_text().exists()


def test_weights_whose_inputs_nobody_sees_are_refused():
    run = composed(*small("quant=gptq_int6_tiny", *EXACT))

    class Dataset:
        train_tokens = 10**9

    with pytest.raises(ConfigError, match=r"'?skips\.weight"):
        check_calibration(run, run.build_model(), Dataset(), ["skips.weight"])
    run = Run.from_dict(run.to_dict())
    run.quant.calibration.visit_weights = [0.0, 0.0, 1.0]
    with pytest.raises(ConfigError, match="2 visits"):
        check_calibration(run, run.build_model(), Dataset(), ["embed.weight"])


def test_a_failed_factorisation_is_in_the_log(monkeypatch, capsys):
    """A Gram matrix that is no sum of squares by a hair: damping is raised, and said."""
    run = composed(*small("quant=gptq_int6_tiny"))
    model = run.build_model()
    bad = torch.eye(32)
    bad[0, 1] = bad[1, 0] = 1.05
    monkeypatch.setattr(
        "recurgolf.training.quantize.collect_grams",
        lambda job, model, names: {
            n: bad if s == 32 else torch.eye(s)
            for n in names
            if (s := model.get_parameter(n).shape[1])
        },
    )
    stored = quantize_model(Job.watched(run, Path(), log=Log(None)), model)
    from recurgolf.training.quantize import quantization_summary

    assert stored is not None
    summary = quantization_summary(stored)
    assert summary["cholesky_retries"] == len(summary["retried"]) > 0
    assert "not positive definite; its damping was raised 1 time, to 0.1" in (
        capsys.readouterr().out
    )
