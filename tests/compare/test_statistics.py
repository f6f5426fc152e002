"""compare: against hand-computed cases and null simulations; grouping, refusals, verdicts."""

import io
import json
import math
from itertools import product

import numpy as np
import pytest
from command_line import recurgolf
from rich.console import Console
from run_folders import BYTES, MACHINE, TEXT, TOKENS, write_run
from scipy import integrate, special
from smoke_runs import train

from recurgolf.compare import statistics
from recurgolf.compare.comparison import Rules, compare
from recurgolf.compare.groups import grouped, seed_list
from recurgolf.compare.runs import find_runs
from recurgolf.compare.sweep import table
from recurgolf.config import ConfigError

MARGIN = 0.005 / math.log(2) * TOKENS / BYTES


def upper_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t, by integrating its density."""
    log_constant = special.gammaln((df + 1) / 2) - special.gammaln(df / 2)
    constant = math.exp(log_constant) / math.sqrt(df * math.pi)
    area, _ = integrate.quad(lambda x: (1 + x * x / df) ** (-(df + 1) / 2), t, np.inf)
    return constant * area


def test_welch_is_the_textbooks_formula():
    # Means 4 and 1; squared errors of the means 4/3/... worked out below with fractions.
    a, b, margin = [0.0, 1.0, 2.0], [2.0, 3.0, 5.0, 6.0], 0.5
    found = statistics.welch(a, b, margin)
    assert found is not None
    # Variances 1 and 10/3; squared standard errors 1/3 and 5/6.
    error = math.sqrt(1 / 3 + 5 / 6)
    df = (1 / 3 + 5 / 6) ** 2 / ((1 / 3) ** 2 / 2 + (5 / 6) ** 2 / 3)
    assert found.n == (3, 4)
    assert found.gain == pytest.approx(3.0)
    assert found.df == pytest.approx(df, rel=1e-12)
    assert found.t == pytest.approx((3.0 - margin) / error, rel=1e-12)
    assert found.p_better == pytest.approx(upper_tail((3 - margin) / error, df), rel=1e-7)
    assert found.p_worse == pytest.approx(1 - upper_tail((3 + margin) / error, df), rel=1e-7)
    assert found.p_level == pytest.approx(1 - upper_tail((3 - margin) / error, df), rel=1e-7)
    # The two ends of the interval lie where the tail holds 2.5 %.
    for end, sign in zip(found.interval, (1, -1), strict=True):
        assert upper_tail(sign * (3.0 - end) / error, df) == pytest.approx(0.025, rel=1e-6)


def test_paired_is_the_textbooks_formula():
    a, b, margin = [1.0, 2.0, 4.0, 4.0], [2.0, 4.0, 5.0, 8.0], 0.25
    found = statistics.paired(a, b, margin)
    assert found is not None
    error = math.sqrt(2.0 / 4)  # gains 1, 2, 1, 4: mean 2, variance 2
    assert (found.gain, found.df) == (2.0, 3.0)
    assert found.t == pytest.approx(1.75 / error, rel=1e-12)
    assert found.p_better == pytest.approx(upper_tail(1.75 / error, 3), rel=1e-7)
    half = found.interval[1] - 2.0
    assert found.interval == pytest.approx((2 - half, 2 + half))
    assert upper_tail(half / error, 3) == pytest.approx(0.025, rel=1e-6)


def test_one_value_or_no_variation_is_no_sample():
    assert statistics.welch([1.0], [1.0, 2.0], 0.0) is None
    assert statistics.welch([1.0, 1.0], [2.0, 2.0], 0.0) is None
    assert statistics.paired([1.0, 2.0], [2.0, 3.0], 0.0) is None


@pytest.mark.parametrize("method", ["welch", "paired"])
def test_a_gain_of_just_the_margin_is_called_better_as_often_as_said(method):
    """5 % of 600 null sweeps, within three deviations of that count."""
    chance, hits, sweeps = np.random.default_rng(1), 0, 600
    test = getattr(statistics, method)
    for _ in range(sweeps):
        seeds = chance.normal(0, 0.004, 5)  # what a seed does to both
        baseline = seeds + chance.normal(1.6, 0.002, 5)
        candidate = seeds + chance.normal(1.6 - MARGIN, 0.003, 5)
        if method == "welch":  # independent seeds
            candidate = chance.normal(1.6 - MARGIN, 0.005, 5)
        found = test(candidate, baseline, MARGIN)
        hits += found.p_better < 0.05
    # Welch's degrees of freedom are an approximation, a little conservative at n = 5.
    assert abs(hits - 0.05 * sweeps) < 3 * math.sqrt(0.05 * 0.95 * sweeps)


def test_the_bootstrap_over_documents_has_the_size_of_its_level():
    chance, hits, sweeps = np.random.default_rng(2), 0, 300
    for _ in range(sweeps):
        sizes = chance.integers(50, 400, 150)
        baseline = sizes * chance.gamma(20, 0.05, 150)
        gain = MARGIN * math.log(2) * sizes + chance.normal(0, 5, 150)
        found = statistics.over_documents(baseline - gain, baseline, sizes, MARGIN, resamples=400)
        assert found is not None
        hits += found.p_better < 0.05
    assert abs(hits - 0.05 * sweeps) < 3 * math.sqrt(0.05 * 0.95 * sweeps)


def test_the_bootstrap_agrees_with_a_normal_approximation_of_the_ratio():
    chance = np.random.default_rng(3)
    sizes = chance.integers(50, 400, 2000)
    gains = 0.01 * sizes + chance.normal(0, 3, 2000)
    baseline = 0.7 * sizes
    found = statistics.over_documents(baseline - gains, baseline, sizes, 0.0)
    assert found is not None
    ratio = gains.sum() / (math.log(2) * sizes.sum())
    residuals = gains - gains.sum() / sizes.sum() * sizes
    error = math.sqrt((residuals**2).sum()) / (math.log(2) * sizes.sum())
    assert found.gain == pytest.approx(ratio, rel=1e-12)
    low, high = found.interval
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert (high + low) / 2 == pytest.approx(ratio, abs=0.1 * error)


def test_documents_without_bytes_do_not_count():
    sizes = np.array([0, 10, 20])
    found = statistics.over_documents(np.array([9.0, 1, 2]), np.array([0.0, 2, 4]), sizes, 0.0)
    assert found is not None
    assert found.n == (2, 2)
    assert found.gain == pytest.approx(3 / (30 * math.log(2)))


def test_holm_by_hand():
    # Sorted: 0.01 x 3, 0.02 x 2, 0.03 x 1; none may fall below the one before.
    assert statistics.holm([0.02, 0.01, 0.03]) == pytest.approx([0.04, 0.03, 0.04])
    assert statistics.holm([0.6]) == [0.6]


def test_the_margin_is_a_token_loss_in_bits_per_byte():
    # field.md's rule: 0.005 nats at 3.73 and 2.44 bytes a token.
    assert statistics.margin_bpb(1000, 3730) == pytest.approx(0.00194, abs=2e-5)
    assert statistics.margin_bpb(1000, 2440) == pytest.approx(0.0030, abs=5e-5)


@pytest.mark.parametrize(
    ("gain", "wanted"),
    [
        (0.012, "p_better"),
        pytest.param(-0.012, "p_worse", marks=pytest.mark.slow),
        pytest.param(0.0, "p_level", marks=pytest.mark.slow),
    ],
)
def test_the_seeds_needed_give_the_power_promised(gain, wanted):
    """Simulated sweeps with so many seeds decide about four times in five."""
    deviations, alpha = (0.006, 0.004), 0.05
    n = statistics.seeds_needed(gain, deviations, MARGIN, alpha)
    assert n is not None and n > 2
    chance, sweeps, decided = np.random.default_rng(4), 600, 0
    for _ in range(sweeps):
        candidate = chance.normal(1.6 - gain, deviations[0], n)
        found = statistics.welch(candidate, chance.normal(1.6, deviations[1], n), MARGIN)
        decided += getattr(found, wanted) < alpha
    assert 0.75 < decided / sweeps < 0.93


def test_a_difference_that_is_the_margin_is_never_decided():
    assert statistics.seeds_needed(MARGIN, (0.005, 0.005), MARGIN, 0.01) is None


# ---- folders


def sweep(folder, values: dict[str, list[float]], **figures) -> None:
    """A sweep over lora.rank: rank -> val_bpb of the seeds 1, 2, …"""
    jobs = []
    for rank, bpbs in values.items():
        for seed, bpb in enumerate(bpbs, 1):
            job = folder / str(len(jobs))
            write_run(job, seed, bpb, f"lora.rank={rank}", **figures)
            jobs.append({"folder": str(job), "overrides": [f"lora.rank={rank}", f"seed={seed}"]})
    (folder / "sweep.json").write_text(json.dumps({"jobs": jobs}))


BETTER = {"1": [1.600, 1.602, 1.601, 1.603], "2": [1.580, 1.581, 1.583, 1.582]}


def test_groups_show_only_what_differs_and_never_the_seed(tmp_path):
    sweep(tmp_path, BETTER)
    groups = grouped(find_runs([tmp_path]))
    assert [group.differs for group in groups] == [{"lora.rank": "1"}, {"lora.rank": "2"}]
    assert [group.label for group in groups] == ["lora.rank=1", "lora.rank=2"]
    assert groups[0].seeds == ["1", "2", "3", "4"]


def test_other_kinds_are_named_without_the_settings_of_those_not_chosen(tmp_path):
    write_run(tmp_path / "a", 1, 1.6, "looping=cycle", "looping.passes=2", "lora=none")
    write_run(tmp_path / "b", 1, 1.6, "looping=cycle", "looping.passes=3", "lora=none")
    write_run(tmp_path / "c", 1, 1.6, "looping=none", "lora=none")
    labels = [group.label for group in grouped(find_runs([tmp_path]))]
    assert labels == [
        "looping=cycle looping.passes=2",
        "looping=cycle looping.passes=3",
        "looping=none",
    ]


def test_a_sweep_over_options_is_told_by_their_names_not_by_all_that_is_in_them(tmp_path):
    for number, (quant, rank, seed) in enumerate(product(("int8", "int6_tiny"), "12", (1, 2))):
        asked = [f"quant={quant}", f"lora.rank={rank}"]
        run = write_run(tmp_path / str(number), seed, 1.6, *asked)
        (run / ".hydra").mkdir()
        (run / ".hydra" / "overrides.yaml").write_text(f"{[*asked, f'seed={seed}']}")
    groups = grouped(find_runs([tmp_path]))
    labels = [f"lora.rank={r} quant={q}" for q in ("int8", "int6_tiny") for r in "12"]
    assert [group.label for group in groups] == labels
    assert [group.differs["quant"] for group in groups] == ["int8"] * 2 + ["int6_tiny"] * 2
    assert all(len(group.differs) == 2 and len(group.runs) == 2 for group in groups)
    # One may still be called by what is in it.
    (one,) = [g for g in groups if {"quant.rules.0.bits=8", "lora.rank=2"} <= g.words]
    assert one.label == "lora.rank=2 quant=int8"


def test_groups_that_differ_in_much_still_have_labels_of_their_own(tmp_path):
    many = {f"optimizer.{name}_lr": 0.5 for name in ("matrix", "embed", "head", "scalar", "mtp")}
    for number, own in enumerate(({"lora.rank": 1}, {"lora.rank": 2}, {"lora.rank": 2, **many})):
        overrides = [f"{key}={value}" for key, value in own.items()]
        write_run(tmp_path / str(number), 1, 1.6, *overrides)
    labels = [group.label for group in grouped(find_runs([tmp_path]))]
    assert len(set(labels)) == 3
    assert max(len(label) for label in labels) < 90


def test_a_seed_run_twice_counts_once(tmp_path):
    write_run(tmp_path / "old", 1, 1.6)
    write_run(tmp_path / "new", 1, 1.5)
    found = compare([tmp_path])
    assert found.groups[0].values("val_bpb") == [1.5]
    assert any("seed 1 ran again" in note and "old" in note for note in found.notes)


def test_better_is_said_when_the_gain_exceeds_the_margin(tmp_path):
    sweep(tmp_path, BETTER)
    found = compare([tmp_path], "lora.rank=1")
    (verdict,) = found.verdicts
    assert found.margin_bpb == pytest.approx(MARGIN)
    assert (verdict.word, verdict.group.label) == ("better", "lora.rank=2")
    assert set(verdict.tests) == {"welch", "paired"}
    assert verdict.tests["welch"].gain == pytest.approx(0.02)
    (mirror,) = compare([tmp_path], "lora.rank=2").verdicts
    assert mirror.word == "worse"


def test_a_difference_within_the_margin_is_called_that(tmp_path):
    close = [1.6000, 1.6001, 1.5999, 1.60005]
    sweep(tmp_path, {"1": close, "2": close[::-1]})
    (verdict,) = compare([tmp_path], "lora.rank=1").verdicts
    assert verdict.word == "equal within the margin"
    assert verdict.why == f"of {MARGIN:.4f} bpb, at 0.01"


def test_what_cannot_be_told_says_how_many_seeds_could(tmp_path):
    sweep(tmp_path, {"1": [1.60, 1.61, 1.62], "2": [1.59, 1.60, 1.61]})
    (verdict,) = compare([tmp_path], "lora.rank=1").verdicts
    assert verdict.word == "cannot tell"
    needed = statistics.seeds_needed(0.01, (0.01, 0.01), MARGIN, 0.01)
    assert needed is not None
    assert verdict.seeds_needed == needed
    assert f"{needed - 3} more of this" in verdict.why


def test_one_seed_each_cannot_tell(tmp_path):
    sweep(tmp_path, {"1": [1.60], "2": [1.50]})
    (verdict,) = compare([tmp_path], "lora.rank=1").verdicts
    assert verdict.word == "cannot tell" and verdict.tests == {}
    assert "at least 2 seeds each" in verdict.why


def test_several_candidates_have_to_clear_a_higher_bar(tmp_path):
    sweep(tmp_path, {**BETTER, "4": [1.60, 1.61, 1.59, 1.60], "3": [1.60, 1.62, 1.59, 1.61]})
    verdicts = compare([tmp_path], "lora.rank=1").verdicts
    alone = {v.group.label: v.tests["welch"].p_better for v in verdicts}
    assert len(verdicts) == 3
    for verdict in verdicts:
        assert verdict.p is not None
        assert verdict.p >= alone[verdict.group.label]
    assert min(v.p for v in verdicts if v.p) == pytest.approx(3 * min(alone.values()))


def test_documents_are_compared_where_both_sides_kept_them(tmp_path):
    chance = np.random.default_rng(5)
    sizes = chance.integers(50, 300, 400)
    base = 0.7 * sizes * chance.gamma(30, 1 / 30, 400)
    for seed in (1, 2, 3):
        noise = 1 + 0.001 * chance.normal()
        sides = {"1": base * noise, "2": (base - 0.01 * sizes) * noise}
        for rank, nats in sides.items():
            bpb = nats.sum() / sizes.sum() / math.log(2)
            folder = tmp_path / f"{rank}_{seed}"
            write_run(folder, seed, bpb, f"lora.rank={rank}", nats=nats, sizes=sizes)
    (verdict,) = compare([tmp_path], "lora.rank=1").verdicts
    documents, seeds = verdict.tests["documents"], verdict.tests["welch"]
    assert documents.n == (400, 400)
    # Ratio of sums is what val_bpb is: both tests estimate the same gain.
    assert documents.gain == pytest.approx(seeds.gain, rel=1e-9)
    assert documents.interval[0] < documents.gain < documents.interval[1]


def test_the_baseline_may_be_a_folder_even_of_the_same_settings(tmp_path):
    for name, bpbs in (("before", [1.60, 1.601, 1.602]), ("after", [1.55, 1.551, 1.552])):
        for seed, bpb in enumerate(bpbs, 1):
            write_run(tmp_path / name / str(seed), seed, bpb)
    found = compare([tmp_path / "after"], str(tmp_path / "before"))
    (verdict,) = found.verdicts
    assert verdict.word == "better"
    assert verdict.group.label == f"folder={tmp_path / 'after'}"
    # Nor does it matter that the baseline lies among the folders.
    assert [v.word for v in compare([tmp_path], str(tmp_path / "before")).verdicts] == ["better"]


def test_missing_and_extra_seeds_are_said(tmp_path):
    sweep(tmp_path, BETTER)
    (tmp_path / "1" / "summary.json").unlink()
    found = compare([tmp_path])
    assert found.groups[0].missing_seeds == ["2"]
    assert any("seeds missing: 2" in note for note in found.notes)
    assert any("seed 2 did not finish" in note for note in found.notes)
    asked = compare([tmp_path], seeds=seed_list("1-3,9"))
    assert asked.groups[0].missing_seeds == ["2", "9"]
    assert asked.groups[0].extra_seeds == ["4"]
    assert asked.groups[1].seeds == ["1", "2", "3"]
    assert any("left out: 4" in note for note in asked.notes)


def test_seed_lists():
    assert seed_list("1-3, 7") == ["1", "2", "3", "7"]
    for wrong in ("3-1", "a", ""):
        with pytest.raises(ConfigError, match=r"--seeds .* a list such as 1-5"):
            seed_list(wrong)


OTHER_TEXT = {"text": {**TEXT, "fingerprint": "d" * 64}}


@pytest.mark.parametrize(
    ("overrides", "figures", "said"),
    [
        ([], OTHER_TEXT, r"differ in validation text \(a{12}… in .*/one; d{12}… in .*/other\)"),
        ([], {"text": {**TEXT, "tokenizer": "e" * 64}}, r"differ in tokenizer \(b{12}…"),
        (["eval=sliding"], {}, r"differ in protocol \(plain .*; sliding "),
        (["eval.seq_len=96"], {}, r"differ in protocol \(.*seq_len=96"),
    ],
    ids=["text", "tokenizer", "protocol", "length"],
)
def test_figures_that_do_not_compare_are_refused(tmp_path, overrides, figures, said):
    write_run(tmp_path / "one", 1, 1.6)
    write_run(tmp_path / "other", 1, 1.5, *overrides, **figures)
    with pytest.raises(ConfigError, match=said):
        compare([tmp_path])


def test_runs_that_do_not_say_their_text_are_held_against_its_size(tmp_path):
    write_run(tmp_path / "old", 1, 1.6, text={})
    write_run(tmp_path / "new", 2, 1.5)
    compare([tmp_path])
    write_run(tmp_path / "longer", 3, 1.5, val_tokens=TOKENS + 1)
    with pytest.raises(ConfigError, match="differ in validation text"):
        compare([tmp_path])


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        ("lora.rank=9", r"names? one setting \(no match\); there are 'lora.rank=1', 'lora.rank=2'"),
        ("smoke", r"\(more than one match\)"),
    ],
)
def test_a_baseline_that_is_none_names_what_there_is(tmp_path, baseline, said):
    sweep(tmp_path, BETTER)
    with pytest.raises(ConfigError, match=said):
        compare([tmp_path], baseline)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"metric": "loss"}, "--metric 'loss'"),
        ({"test": "wilcoxon"}, "--test 'wilcoxon'"),
        ({"alpha": 0.7}, "--alpha 0.7"),
        ({"margin_nats": -1.0}, "--margin -1.0"),
    ],
)
def test_impossible_rules_are_refused(rules, said):
    with pytest.raises(ConfigError, match=said):
        Rules(**rules)


def test_figures_of_different_machines_are_labelled(tmp_path):
    write_run(tmp_path / "one", 1, 1.6)
    gpu = {**MACHINE, "device": "test accelerator", "ranks": 8, "precision": "bfloat16"}
    write_run(tmp_path / "two", 2, 1.6, environment=gpu, steps=500)
    (note,) = [n for n in compare([tmp_path]).notes if n.startswith("measured on different")]
    assert "test processor" in note and "test accelerator x 8" in note and "bfloat16" in note


def test_the_command_says_it_in_words_and_in_json(tmp_path):
    sweep(tmp_path / "sweep", BETTER)
    ended = recurgolf("compare", "sweep", "--baseline", "lora.rank=1", cwd=tmp_path).finished()
    assert "lora.rank=2 against lora.rank=1: BETTER" in ended.out
    assert "1.5815 ± 0.0013" in ended.out
    assert "test processor" in ended.out and "430 steps" in ended.out
    asked = ("compare", "sweep", "--baseline", "lora.rank=1", "--json")
    told = json.loads(recurgolf(*asked, cwd=tmp_path).finished().out)
    assert told["verdicts"][0]["verdict"] == "better"
    welch = told["verdicts"][0]["tests"]["welch"]
    expected = statistics.welch(BETTER["2"], BETTER["1"], told["margin_bpb"])
    assert expected is not None
    assert (welch["t"], welch["df"], welch["p_better"]) == (
        expected.t,
        expected.df,
        expected.p_better,
    )
    refused = recurgolf("compare", "nowhere", cwd=tmp_path).refused()
    assert "nowhere: no such folder" in refused


def test_runs_as_they_are_left_can_be_compared(tmp_path):
    """Two real runs, with the text and the documents that they say they were scored on."""
    one, two = train("seed=1"), train("seed=2")
    found = compare([one.path, two.path])
    (group,) = found.groups
    assert group.values("val_bpb") == [one.summary["val_bpb"], two.summary["val_bpb"]]
    assert len(one.summary["text"]["fingerprint"]) >= 16
    both = compare([two.path], str(one.path), rules=Rules(margin_nats=0.0))
    documents = both.verdicts[0].tests["documents"]
    gain = one.summary["val_bpb"] - two.summary["val_bpb"]
    assert documents.gain == pytest.approx(gain, rel=1e-6)
    assert documents.n[0] >= 25


def test_a_run_that_diverged_takes_no_other_figure_with_it(tmp_path):
    for seed, bpb in ((1, 2.0), (2, float("nan")), (3, 2.1)):
        write_run(tmp_path / str(seed), seed, bpb)
    found = compare([tmp_path])
    assert found.groups[0].values("val_bpb") == [2.0, 2.1]
    assert [run.seed for run in found.groups[0].unfinished] == ["2"]


def test_brackets_in_a_label_are_text(tmp_path):
    write_run(tmp_path / "1", 1, 2.0, name="a[/red]b")
    write_run(tmp_path / "2", 2, 2.0, name="a[/red]b")
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(table(compare([tmp_path]).groups))
    assert "a[/red]b" in console.export_text()
