"""A looped gated delta net with adapters of its own for every visit, any subset of projections."""

import itertools

import pytest
import torch
from smoke_runs import composed
from torch.func import functional_call

from recurgolf.model.mixers.gated_deltanet import PROJECTIONS
from recurgolf.run import Run

SIZES = (
    *("experiment=smoke", "data.vocab_size=16", "model.dim=8", "model.mlp_mult=1"),
    *("model/mixer=gated_deltanet", "model.mixer.key_head_dim=3", "model.mixer.value_head_dim=2"),
    *("model.mixer.chunk_size=4", "model.mixer.conv_size=3", "lora=gated_delta"),
)
SUBSETS = [c for n in range(1, 6) for c in itertools.combinations(PROJECTIONS, n)]
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def changed(*overrides, **lora):
    """The Run of these overrides with some `lora` options changed."""
    data = composed(*SIZES, *overrides).to_dict()
    data["lora"].update(lora)
    return Run.from_dict(data)


def built(run, dtype=torch.float64, seed=3):
    """The run's model with every parameter drawn anew, none of them zero."""
    model = run.build_model().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.5 * drawn)
    return model


@pytest.mark.parametrize("visits", ["all", "shared", "repeats"])
def test_any_subset_of_the_five_projections_is_adapted_and_nothing_else(visits):
    """All 31 subsets, under a loop: what is named has factors, each of which gets a gradient."""
    for subset in SUBSETS:
        run = changed("model.num_blocks=1", targets=list(subset), visits=visits)
        model = built(run, torch.float32)
        plan = run.plan(1.0)
        assert plan.num_visits == 2
        (bank,) = (model.adapters.bank(block) for block in model.adapters.num_slots)
        assert set(bank) == set(subset)
        assert model.adapters.config.scale == 2.0
        model(TOKENS, plan, TOKENS.roll(-1, 1)).backward()
        for name, parameter in model.adapters.named_parameters():
            by_visit = parameter.grad.flatten(1).abs().amax(1)
            assert (by_visit > 0).all(), (subset, name)
        assert {"all": 2, "shared": 1, "repeats": 1}[visits] == len(by_visit)


def test_rank_0_and_factors_of_zero_change_no_bit():
    run, plain = changed(), changed(rank=0)
    model = built(run, torch.float32).eval()
    bare = plain.build_model().eval()
    assert bare.adapters is None
    state = model.state_dict()
    bare.load_state_dict({n: t for n, t in state.items() if not n.startswith("adapters.")})
    with torch.no_grad():
        adapted = model(TOKENS, run.eval_plan)
        expected = bare(TOKENS, plain.eval_plan)
        assert not torch.equal(adapted, expected)
        for name, parameter in model.adapters.named_parameters():
            if name.endswith("lora_b"):
                parameter.zero_()
        assert torch.equal(model(TOKENS, run.eval_plan), expected)
        model.adapters = None
        assert torch.equal(model(TOKENS, run.eval_plan), expected)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (1, 2)], ids=["one", "several", "value>key"])
def test_gradcheck_of_every_factor_of_every_visit_and_every_base_weight(heads):
    own = [f"model.mixer.num_key_heads={heads[0]}", f"model.mixer.num_value_heads={heads[1]}"]
    run = changed("model.num_blocks=1", *own, "lora.rank=1", alpha=1.5)
    model = built(run)
    plan, ids = run.plan(1.0), TOKENS[:1, :6]
    names = [n for n, _ in model.named_parameters() if n.startswith(("adapters.", "blocks."))]
    assert sum(n.startswith("adapters.") for n in names) == 10
    assert sum(".mixer." in n for n in names) == 9
    leaves = [model.get_parameter(n).detach().clone().requires_grad_() for n in names]
    readout = torch.linspace(-1, 1, 16, dtype=torch.float64)

    def output(*values):
        named = dict(zip(names, values, strict=True))
        return (functional_call(model, named, (ids, plan)) * readout).sum(-1)

    assert torch.autograd.gradcheck(output, leaves, fast_mode=True)
    grads = torch.autograd.grad(output(*leaves).sum(), leaves)
    for name, grad in zip(names, grads, strict=True):
        assert grad.abs().max() > 1e-6, f"the gradient of {name} is zero: nothing was checked"
        if name.startswith("adapters."):  # [visits, ...]: each visit's own
            assert (grad.flatten(1).abs().amax(1) > 1e-6).all(), name
