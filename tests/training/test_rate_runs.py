"""Runs with the bytes in their loss: they end just below the budget, at the values they trained."""

import json
import re
import shutil

import pytest
import torch
from command_line import recurgolf
from safetensors.torch import load_file
from smoke_runs import RunFolder, composed, small, train

from recurgolf import train as train_here
from recurgolf.artifact import load
from recurgolf.config import ConfigError, Diverged
from recurgolf.plan import make_plan
from recurgolf.quant import QuantizedTensor, dequantize_state
from recurgolf.training.non_finite import check_weights

BUDGET = 40_000
RATE = (
    *("quant/qat=rate", "artifact/codec=ans", f"budget.artifact_bytes={BUDGET}"),
    *("trainer.steps=64", "trainer.log_every=16", "optimizer.ns_dtype=float32"),
    "trainer.checkpoint_every=44",  # which one test continues from
)
EMA = ("averaging=ema", "averaging.decay=0.8")


def last_tensors(run: RunFolder) -> dict[str, torch.Tensor]:
    found = load_file(max((run.path / "checkpoints").iterdir()) / "tensors.safetensors")
    return {n.removeprefix("model/"): t for n, t in found.items() if n.startswith("model/")}


FROM_THE_START = ("quant.qat.start_fraction=0",)


@pytest.mark.parametrize(
    "others",
    [(), *(pytest.param(one, marks=pytest.mark.slow) for one in (EMA, FROM_THE_START))],
    ids=str,
)
def test_the_file_ends_within_half_a_percent_below_its_budget(others):
    run = train(*RATE, *others)
    assert run.ended.code == 0
    left = BUDGET - run.summary["bytes_code"]
    assert 0.995 * left < run.summary["bytes_model"] <= left
    assert run.summary["within_budget"]


def test_an_average_is_the_result_only_where_its_own_codes_are_better():
    """It rounds to codes that training never saw."""
    slow = train(*RATE, "averaging=ema", "averaging.decay=0.98")
    last = train(*RATE).summary["val_bpb"]
    assert "weights: the last ones" in slow.ended.out
    # The header names the average, and a byte there moves the steps; the average is 0.15 behind.
    assert slow.summary["val_bpb"] == pytest.approx(last, abs=0.02)
    own, average = map(float, re.findall(r"(?:ones,|has) (\d\.\d{4})", slow.ended.out))
    assert own < average


@pytest.mark.slow
def test_an_average_of_five_steps_is_not_worse_than_its_end():
    last = train(*RATE).summary["val_bpb"]
    assert train(*RATE, *EMA).summary["val_bpb"] < last + 0.02


def test_the_score_before_packing_is_that_of_the_file():
    summary = train(*RATE).summary
    assert summary["val_bpb"] == pytest.approx(summary["pre_quant_val_bpb"], abs=2e-4)


def test_the_codes_of_the_file_are_the_rounded_weights_of_the_checkpoint():
    run = train(*RATE)
    state = last_tensors(run)
    tensors = load(run.path / "artifact.bin").tensors
    learned = {n: t for n, t in tensors.items() if isinstance(t, QuantizedTensor)}
    rows = run.summary["quantization"]["zero_rows"].get("embedding", [0, 512])
    assert rows == [int((~learned["embed.weight"].codes.any(dim=1)).sum()), 512]
    assert len(learned) > 20 and any("adapters" in name for name in learned)
    for name, tensor in learned.items():
        scales = tensor.scales.float()
        step = scales[:, None] if scales.ndim else scales
        codes = (state[name] / step.clamp_min(1e-30)).round()
        assert torch.equal(torch.where(step > 0, codes, 0), tensor.codes.float()), name
    kept = {n: t for n, t in tensors.items() if n not in learned}
    assert all(t.numel() < 64 for t in kept.values())


def test_losses_are_those_without_it_until_it_begins():
    plain = train(*RATE, "quant/qat=none")
    assert train(*RATE).losses[32] == plain.losses[32]
    assert train(*RATE).losses[48] != plain.losses[48]


def test_the_curves_say_where_the_bytes_go():
    run = train(*RATE)
    events = [event for event in run.events if "rate/lambda" in event]
    assert {event["step"] for event in events} == {48, 64}
    last = events[-1]
    assert last["rate/predicted_bytes"] == pytest.approx(run.summary["bytes_model"], rel=0.05)
    assert {"rate/bits_per_weight/mixer", "rate/bits_per_weight/adapters"} <= last.keys()
    assert "bits/weight" in run.ended.out
    ledger = run.json("ledger.json")
    assert ledger["predicted_bytes"] == pytest.approx(ledger["actual_bytes"], rel=0.01)


def test_a_run_that_stopped_goes_on_to_the_same_file(tmp_path):
    whole = train(*RATE)
    folder = tmp_path / "run"
    shutil.copytree(whole.path, folder)
    for name in ("summary.json", "artifact.bin", "score.py", "ledger.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints/step_000064")
    recurgolf("resume", folder, cwd=tmp_path).finished()
    assert (folder / "artifact.bin").read_bytes() == (whole.path / "artifact.bin").read_bytes()


def test_two_ranks_end_within_the_budget_as_well():
    two = train(*RATE, "trainer.steps=24", "trainer.devices=2")
    assert two.ended.code == 0
    left = BUDGET - two.summary["bytes_code"]
    assert 0.995 * left < two.summary["bytes_model"] <= left


RANKS = ("trainer.devices=2",)
RECOMPUTED = ("trainer.activation_checkpointing=true",)
COMPILED = ("trainer.compile=true", "trainer.compile_backend=aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("others", [RECOMPUTED, RANKS, COMPILED], ids=str)
def test_ranks_and_recomputed_and_compiled_blocks_train_at_the_same_values(others):
    """The first step, from the same weights: a sum in another order lets them round to other codes
    later on."""
    first = (*RATE, "quant.qat.start_fraction=0", "model.init.zero_output=false")
    first = (*first, "trainer.steps=2", "trainer.log_every=1")
    plain, other = (
        next(event for event in train(*first, *more).events if event.get("step") == 1)
        for more in ((), others)
    )
    told = {key: value for key, value in plain.items() if key.startswith("train/")}
    assert {"train/loss", "train/grad_norm/matrix", "train/grad_norm/rate"} <= told.keys()
    assert all(told.values())
    assert {key: other[key] for key in told} == pytest.approx(told, rel=1e-3)


@pytest.mark.slow
def test_nothing_is_compiled_anew_when_bytes_begin_to_count(tmp_path):
    """On a GPU a compilation takes a minute of the clock."""
    graphs = torch._dynamo.utils.counters["stats"]
    compiled = []
    for name, steps in (("before", 4), ("through", 10)):
        torch._dynamo.reset()
        graphs.clear()
        own = (*RATE, *COMPILED, f"trainer.steps={steps}", "looping=none", "lora=none")
        run = composed(*small(*own, f"quant.qat.start_fraction={0.5 if steps == 10 else 0.95}"))
        train_here(run, tmp_path / name, quiet=True)
        compiled.append(graphs["unique_graphs"])
    assert compiled[0] == compiled[1] > 0


@pytest.mark.slow
def test_a_fixed_price_buys_fewer_bytes_the_higher_it_is():
    sizes = [
        train(*RATE, "budget.artifact_bytes=16000000", f"quant.qat.price={price}").summary
        for price in (0.003, 3.0)
    ]
    assert sizes[1]["bytes_model"] < 0.9 * sizes[0]["bytes_model"]


@pytest.mark.slow
def test_a_budget_with_room_for_everything_costs_nothing():
    """Of 16 MB the smallest network takes 0.2 %: its codes become as fine as they can be."""
    roomy = train(*RATE, "budget.artifact_bytes=16000000")
    assert roomy.ended.code == 0
    exact = train(*RATE, "quant/qat=none", "quant=none")
    assert roomy.summary["val_bpb"] == pytest.approx(exact.summary["val_bpb"], abs=0.02)


def test_counts_of_codes_may_be_larger_than_what_a_file_holds_of_a_weight():
    """A table of a vocabulary has more zeros than float16 can count; it is no part of the file."""
    model = composed(*small(*RATE)).build_model()
    counts = model.get_buffer("quantizers.counts")
    counts += 1e6
    check_weights(model, "float16")
    counts[0, 0] = torch.nan
    with pytest.raises(Diverged, match=r"quantizers\.counts"):
        check_weights(model, "float16")
    counts[0, 0] = 0
    model.embed.weight.data[3, 1] = 1e5
    with pytest.raises(Diverged, match=r"embed\.weight are beyond 65,504"):
        check_weights(model, "float16")


def test_the_plan_predicts_the_budget():
    plan = make_plan(composed(*small(*RATE)))
    assert 0.99 * BUDGET < plan.total_bytes <= BUDGET


REFUSED = [
    (("quant=none",), ["quant=none", "quant=int6"]),
    (("quant.fill_budget=true",), ["fill_budget", "use one"]),
    (("trainer.trainable=lora", "trainer.base=x"), ["trainable=lora", "quant/qat=rate"]),
    (("quant.qat.snap.strength=0.1",), ["snap.strength=0.1"]),
]


@pytest.mark.parametrize(("others", "words"), REFUSED, ids=lambda part: str(part)[:40])
def test_what_it_cannot_be_combined_with_is_refused(others, words):
    with pytest.raises(ConfigError) as refused:
        make_plan(composed(*small(*RATE, *others)))
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_budget_below_what_zeros_cost_is_refused():
    code = make_plan(composed(*small(*RATE))).code_bytes
    with pytest.raises(ConfigError, match="smaller than what a model of zeros costs"):
        make_plan(composed(*small(*RATE, f"budget.artifact_bytes={code + 400}")))


def test_a_stranger_scores_the_file_with_the_same_digits(tmp_path):
    run = train(*RATE)
    said = recurgolf("evaluate", str(run.path), "--json", cwd=tmp_path).finished().out
    assert json.loads(said)["plain"]["val_bpb"] == run.summary["val_bpb"]
    values = dequantize_state(load(run.path / "artifact.bin").tensors)
    assert all(tensor.isfinite().all() for tensor in values.values())


def test_a_finished_run_is_finished_for_fewer_bytes(tmp_path):
    """Against the same run packed by its rules at as many bytes."""
    base = train("trainer.steps=64", "optimizer.ns_dtype=float32")
    asked = ["quant/qat=rate", "artifact/codec=ans", "budget.artifact_bytes=32000"]
    folder = tmp_path / "smaller"
    said = recurgolf("pack", str(base.path), str(folder), *asked, "--steps", "48", cwd=tmp_path)
    assert said.code == 0, said.err
    summary = RunFolder(folder, said).summary
    assert 0.995 * 32_000 < summary["artifact_bytes"] <= 32_000
    assert summary["seconds"]["base"] == pytest.approx(
        base.summary["seconds"]["training"] + base.summary["seconds"]["checkpoint"], abs=2
    )
    filled = tmp_path / "filled"
    asked = ["quant.fill_budget=true", "budget.artifact_bytes=32000"]
    recurgolf("pack", str(base.path), str(filled), *asked, cwd=tmp_path).finished()
    assert summary["val_bpb"] < RunFolder(filled, said).summary["val_bpb"]


def test_a_file_is_packed_again_by_another_codec_for_another_budget_and_by_rules(tmp_path):
    run = train(*RATE)

    def packed(name, *asked):
        folder = tmp_path / name
        said = recurgolf("pack", str(run.path), str(folder), *asked, cwd=tmp_path)
        assert said.code == 0, said.err
        return RunFolder(folder, said)

    other = packed("brotli", "artifact/codec=brotli", "budget.artifact_bytes=60000")
    smaller = packed("smaller", "budget.artifact_bytes=37000")
    assert 0.995 * 37_000 < smaller.summary["artifact_bytes"] <= 37_000
    assert smaller.summary["val_bpb"] > run.summary["val_bpb"]
    rounded = packed("rounded", "quant=int8", "budget.artifact_bytes=100000")
    tensors = load(rounded.path / "artifact.bin").tensors.values()
    assert {t.method for t in tensors if isinstance(t, QuantizedTensor)} == {"rtn"}
    # The file's last factor on all steps, found after training, is not in the checkpoint.
    assert rounded.summary["val_bpb"] == pytest.approx(run.summary["val_bpb"], abs=0.03)
    assert other.summary["val_bpb"] < smaller.summary["val_bpb"]


def test_steps_are_asked_for_where_only_training_can_find_them(tmp_path):
    base = train("trainer.steps=64", "optimizer.ns_dtype=float32")
    said = recurgolf("pack", str(base.path), str(tmp_path / "new"), "quant/qat=rate", cwd=tmp_path)
    assert said.code == 2 and "--steps 400" in said.err
