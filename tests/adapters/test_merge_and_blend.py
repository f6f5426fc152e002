"""Merged equals unmerged; a blend is the weighted sum of corrections."""

import pytest
import torch
from adapted_models import FLAT, LATE, LOOPED, SHARED, adapted, run_without, some_tokens
from smoke_runs import composed

from recurgolf import adapters
from recurgolf.adapters import Adapter, Base
from recurgolf.adapters.adapter import Factors, Place
from recurgolf.config import ConfigError, kind_of


@pytest.mark.parametrize("overrides", [FLAT, SHARED], ids=["each block once", "shared by visits"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_merged_equals_unmerged(overrides, dtype, atol):
    run = composed(*overrides)
    model, base, _ = adapted(run)
    model, base = model.to(dtype), base.to(dtype)
    facts = adapters.Base(adapters.fingerprint(base.state_dict()), "f00d" * 16)
    adapter = adapters.adapter_of(run, model.adapters, facts)
    bare, tokens = run_without(run), some_tokens(run)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    merged_run, merged = adapters.merge(bare, base, adapter, "f00d" * 16)
    assert merged.adapters is None and merged_run.lora.rank == 0
    logits = merged(tokens, merged_run.eval_plan)
    torch.testing.assert_close(logits, model(tokens, run.eval_plan), atol=atol, rtol=0)
    assert (logits - base(tokens, bare.eval_plan)).abs().max() > 0.1
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name]), "the base itself was changed"


@pytest.mark.parametrize("overrides", [LOOPED, LATE], ids=["every visit", "repeats"])
@torch.no_grad()
def test_single_iterations_merge_into_untied_blocks_and_into_nothing_else(overrides):
    run = composed(*overrides)
    model, base, adapter = adapted(run)
    bare, tokens = run_without(run), some_tokens(run)
    with pytest.raises(
        ConfigError, match=r"layer 0, module .*3 visits of block 0 share one weight"
    ):
        adapters.merge(bare, base, adapter)
    untied_run, untied = adapters.merge(bare, base, adapter, untied=True)
    assert untied_run.plan(1.0).blocks == (0, 1, 2, 3, 4, 5)
    assert [kind_of(untied_run.model.mixer_of(block)) for block in range(6)] == [
        *("gated_deltanet", "attention") * 3
    ]
    logits = untied(tokens, untied_run.eval_plan)
    torch.testing.assert_close(logits, model(tokens, run.eval_plan), atol=1e-5, rtol=0)
    # The Run is whole: it can be written and built again.
    again = type(run).from_dict(untied_run.to_dict()).build_model()
    again.load_state_dict(untied.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["model.depth_scaled_norm=true"], "compute something else"),
        (["looping=segment", "model.num_blocks=3", "model.skips=prelude_to_coda"], "untie"),
    ],
)
def test_a_loop_that_cannot_be_undone_is_refused(own, message):
    run = composed(
        *("experiment=smoke", "data.vocab_size=64", "model.dim=16", "lora.visits=all", *own)
    )
    _, base, adapter = adapted(run)
    with pytest.raises(ConfigError, match=message):
        adapters.merge(run_without(run), base, adapter, untied=True)


def test_a_correction_of_the_blocks_output_has_no_weight_to_merge_into():
    run = composed("experiment=smoke", "data.vocab_size=64", "model.dim=16", "lora=residual")
    _, base, adapter = adapted(run)
    with pytest.raises(ConfigError, match=r"module residual.*on no linear layer"):
        adapters.merge(run_without(run), base, adapter, untied=True)


def test_merging_checks_before_it_copies():
    run = composed(*FLAT)
    _, base, adapter = adapted(run)
    other = Adapter(adapter.factors, Base("0" * 16))
    with pytest.raises(ConfigError, match="fingerprint 0000000000000000"):
        adapters.merge(run_without(run), base, other)


def pair(out_dim, in_dim, rank, alpha, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, in_dim, generator=g), torch.randn(out_dim, rank, generator=g)
    return Factors(a, b, alpha)


def product(factors):
    """The correction written out, in numpy's float64."""
    a, b = factors.a.numpy().astype("f8"), factors.b.numpy().astype("f8")
    return torch.from_numpy(factors.alpha / factors.rank * (b @ a))


UP, QUERY = Place(0, "mlp.up_proj"), Place(1, "mixer.q_proj")


def test_blend_is_the_weighted_sum_of_the_corrections():
    one = Adapter({UP: pair(32, 16, 2, 3.0, 1), QUERY: pair(16, 16, 2, 3.0, 2)}, Base("aa", "t"))
    two = Adapter({UP: pair(32, 16, 3, 1.0, 3)}, Base("aa", "t"))
    three = Adapter({UP: pair(32, 16, 1, 1.0, 4)}, Base("aa", "t"))
    mixed = adapters.blend([one, two, three], [0.7, -0.4, 0.0])
    assert mixed.base.fingerprint == "aa" and mixed.base.tokenizer == "t"
    assert {p: f.rank for p, f in mixed.factors.items()} == {UP: 5, QUERY: 2}
    expected = 0.7 * product(one.factors[UP]) - 0.4 * product(two.factors[UP])
    torch.testing.assert_close(product(mixed.factors[UP]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        product(mixed.factors[QUERY]), 0.7 * product(one.factors[QUERY]), atol=1e-5, rtol=0
    )


def test_blend_of_limited_rank_is_the_nearest_of_that_rank():
    parts = [Adapter({UP: pair(32, 16, 3, 3.0, seed)}) for seed in (1, 2)]
    exact = product(adapters.blend(parts, [1, 1]).factors[UP])
    limited = adapters.blend(parts, [1, 1], rank=2).factors[UP]
    assert limited.rank == 2
    singular = torch.linalg.svdvals(exact)
    error = torch.linalg.matrix_norm(product(limited) - exact)
    assert error == pytest.approx(float(singular[2:].norm()), rel=1e-5)
    full = adapters.blend(parts, [1, 1], rank=6).factors[UP]
    torch.testing.assert_close(product(full), exact, atol=1e-5, rtol=0)


@torch.no_grad()
def test_blend_of_iterations_gives_the_blended_corrections_in_the_model(tmp_path):
    run = composed(*LATE)
    _, base, one = adapted(run)
    other = {p: pair(f.b.shape[0], f.a.shape[1], 1, 1.0, 7) for p, f in one.factors.items()}
    two = Adapter({p: f for p, f in other.items() if p.iteration == 1}, one.base)
    mixed = adapters.blend([one, two], [0.5, 2.0])
    adapters.write(tmp_path, mixed)
    bare = run_without(run)
    changed, _ = adapters.load(bare, base, tmp_path)
    assert changed.lora.visits == "repeats"
    x = torch.randn(3, 16)
    for nth in (1, 2):  # the second has no iteration 2: its last one stands in
        place = Place(1, "mixer.q_proj", nth)
        visit = next(v for v in changed.eval_plan.visits if (v.block, v.nth) == (1, nth))
        expected = 0.5 * product(one.factors[place]) + 2.0 * product(
            other[place._replace(iteration=1)]
        )
        delta = base.adapters.of_visit(visit)["q_proj"](x)
        torch.testing.assert_close(delta.double(), x.double() @ expected.T, atol=1e-4, rtol=0)


def test_adapters_that_cannot_be_one_are_refused():
    plain = Adapter({UP: pair(32, 16, 2, 2.0, 1)}, Base("aa", "t"))
    wide = Adapter({UP: pair(32, 18, 2, 2.0, 1)})
    late = Adapter({UP._replace(iteration=0): pair(32, 16, 2, 2.0, 1)})
    for parts, weights, message in (
        ([], [], "no adapters"),
        ([plain], [1, 2], "2 weights for 1 adapters"),
        ([plain], [float("nan")], "expected finite numbers"),
        ([plain], [0], "all weights are 0"),
        (
            [plain, wide],
            [1, 1],
            r"layer 0, module mlp.up_proj: expected one width, found \[16, 18\]",
        ),
        ([plain, late], [1, 1], "single iterations and some for all visits"),
        ([plain, Adapter(plain.factors, Base("bb"))], [1, 1], "another fingerprint: aa, bb"),
        ([plain, Adapter(plain.factors, Base(None, "u"))], [1, 1], "another tokenizer: t, u"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapters.blend(parts, weights)
