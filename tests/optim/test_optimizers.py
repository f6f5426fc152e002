"""Steps, clips and the state of the bundled optimizers."""

import math

import pytest
import torch
from test_optim_groups import matrix, module, toy
from torch import nn

from recurgolf.config import ConfigError
from recurgolf.optim import AllAdamW, MuonAdam, build


def fill_gradients(model, seed, skip=()):
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        grad = torch.randn(param.shape, generator=generator)
        param.grad = None if name in skip else grad


def norm_of(params):
    squares = [param.grad.double().square().sum() for param in params]
    return math.sqrt(sum(squares))


def copy_of(model):
    other = toy()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "config",
    [
        MuonAdam(lora_warmup_steps=6, matrix_weight_decay=0.1),
        MuonAdam(lora_optimizer="muon", buffer_dtype="bf16", row_normalize=True),
        AllAdamW(),
    ],
    ids=["warmup", "bf16", "adamw"],
)
def test_a_loaded_state_continues_bit_for_bit(config):
    model = toy()
    optimizers = build(config, model)
    for step in range(3):
        fill_gradients(model, step, skip=("qo.bank",))
        optimizers.step(0.9, config.momentum_at(step))
    other = copy_of(model)
    resumed = build(config, other)
    resumed.load_state_dict(optimizers.state_dict())
    for step in range(3, 6):
        for each, by in ((model, optimizers), (other, resumed)):
            fill_gradients(each, step)
            by.step(0.5, config.momentum_at(step))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    saved, again = optimizers.state_dict(), resumed.state_dict()
    assert saved.keys() == again.keys()
    assert all(saved[key].dtype == again[key].dtype for key in saved)
    assert all(torch.equal(saved[key], again[key]) for key in saved)


def test_a_state_of_another_model_is_refused_by_name():
    optimizers = build(MuonAdam(), toy())
    with pytest.raises(ConfigError, match=r"qo\.banks.*'qo\.bank'"):
        optimizers.load_state_dict({"qo.banks:momentum_buffer": torch.zeros(3, 8, 8)})
    with pytest.raises(ConfigError, match=r"\[3, 8, 9\].*\[3, 8, 8\]"):
        optimizers.load_state_dict({"qo.bank:momentum_buffer": torch.zeros(3, 8, 9)})


def test_reset_forgets_everything_and_compat_keeps_muon():
    for kept in (False, True):
        config = MuonAdam(compat_keep_momentum_after_warmup=kept)
        model = toy()
        optimizers = build(config, model)
        fill_gradients(model, 0)
        optimizers.step()
        optimizers.reset_state()
        entries = {key.rpartition(":")[2] for key in optimizers.state_dict()}
        assert entries == {"lora"} | ({"momentum_buffer"} if kept else set())


def test_each_role_is_clipped_by_its_own_norm():
    model = toy()
    optimizers = build(MuonAdam(grad_clip=1.0, lora_grad_clip=0.25), model)
    fill_gradients(model, 0)
    before = {
        role: norm_of([p for g in optimizers if g.role == role for p in g.parameters.values()])
        for role in ("matrix", "lora")
    }
    norms = optimizers.clip_gradients()
    assert set(norms) == {"embed", "head", "matrix", "scalar", "lora", "mtp"}
    for role, limit in (("matrix", 1.0), ("lora", 0.25)):
        assert norms[role] == pytest.approx(before[role], rel=1e-5)
        params = [p for g in optimizers if g.role == role for p in g.parameters.values()]
        assert norm_of(params) == pytest.approx(limit, rel=1e-4)


def test_a_global_norm_covers_everything_but_adapters_with_their_own_clip():
    model = toy()
    optimizers = build(MuonAdam(grad_clip=0.3, clip_scope="global"), model)
    fill_gradients(model, 0)
    everything = norm_of(model.parameters())
    assert optimizers.clip_gradients() == {"global": pytest.approx(everything, rel=1e-5)}
    assert norm_of(model.parameters()) == pytest.approx(0.3, rel=1e-4)

    apart = build(MuonAdam(grad_clip=0.3, clip_scope="global", lora_grad_clip=0.1), model)
    assert set(apart.clip_gradients()) == {"global", "lora"}


def test_gradients_stay_as_they_are_without_a_clip():
    model = toy()
    optimizers = build(MuonAdam(), model)
    fill_gradients(model, 0)
    before = [param.grad.clone() for param in model.parameters()]
    optimizers.clip_gradients()
    assert all(map(torch.equal, before, (param.grad for param in model.parameters())))


def test_adapters_warm_up_over_steps_that_reach_them():
    model = module(proj=matrix(4, 4), adapters=module(lora_a=nn.Parameter(torch.zeros(1, 1, 4))))
    optimizers = build(MuonAdam(lora_warmup_steps=4, lora_lr=0.01), model)
    adapter, moved = model.adapters.lora_a, []
    for step in range(6):
        before = adapter.detach().clone()
        model.proj.weight.grad = torch.ones(4, 4)
        adapter.grad = torch.ones_like(adapter) if step >= 2 else None
        optimizers.step()
        moved.append((before - adapter).max().item())
    # A constant gradient moves Adam by exactly the rate.
    assert moved == pytest.approx([0, 0, 0.0025, 0.005, 0.0075, 0.01], rel=1e-4)


def test_adamw_takes_the_textbook_step():
    model = module(proj=matrix(3, 5))
    config = AllAdamW(matrix_lr=0.1, matrix_weight_decay=0.2)
    optimizers = build(config, model)
    w = model.proj.weight.detach().double()
    m = v = torch.zeros_like(w)
    for step in range(1, 4):
        fill_gradients(model, step)
        g = model.proj.weight.grad.double()
        optimizers.step(lr_scale=0.5)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w * (1 - 0.05 * 0.2)
        w = w - 0.05 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        torch.testing.assert_close(model.proj.weight.detach().double(), w, atol=1e-6, rtol=0)


def test_numuon_needs_to_know_the_progress():
    model = module(proj=matrix(6, 6))
    optimizers = build(MuonAdam(matrix_optimizer="numuon"), model)
    fill_gradients(model, 0)
    with pytest.raises(ConfigError, match="fraction"):
        optimizers.step()
    optimizers.step(fraction=0.5)


def test_an_empty_parameter_does_no_harm():
    model = module(proj=matrix(4, 4), skips=module(weight=nn.Parameter(torch.ones(0, 4))))
    optimizers = build(MuonAdam(), model)
    fill_gradients(model, 0)
    assert set(optimizers.clip_gradients()) == {"matrix", "scalar"}
    optimizers.step()
