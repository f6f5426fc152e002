"""Which parameter goes where."""

import pytest
import torch
from torch import nn

from recurgolf.config import REGISTRY, ConfigError, from_dict, to_dict
from recurgolf.model.mixers.gated_deltanet import GatedDeltaNetConfig
from recurgolf.optim import AllAdamW, MuonAdam, OptimizerConfig, build, parameter_roles


def module(**children):
    found = nn.Module()
    for name, child in children.items():
        if isinstance(child, nn.Parameter):
            found.register_parameter(name, child)
        else:
            found.add_module(name, child)
    return found


def matrix(*shape):
    return module(weight=nn.Parameter(torch.randn(*shape)))


def toy(blocks=2):
    return module(
        embed=nn.Embedding(10, 8),
        bigram=module(
            embed=nn.Embedding(5, 4), proj=matrix(8, 4), scale=nn.Parameter(torch.ones(()))
        ),
        blocks=nn.ModuleList(
            module(
                mixer=module(q_proj=matrix(8, 8), q_gain=nn.Parameter(torch.ones(2))),
                conv1d=matrix(8, 1, 4),
                mlp=module(gate_proj=matrix(16, 8), down_proj=matrix(8, 16)),
                input_mix=matrix(2, 8),
                update_gate=nn.Linear(8, 1),
                A_log=nn.Parameter(torch.zeros(3, 3)),
                mixer_scale=nn.Parameter(torch.ones(8)),
            )
            for _ in range(blocks)
        ),
        qo=module(bank=nn.Parameter(torch.randn(3, 8, 8))),
        skips=module(weight=nn.Parameter(torch.ones(2, 8)), gate=nn.Parameter(torch.ones(2, 8))),
        mixer_visit_gain=nn.Parameter(torch.ones(4, 8)),
        lm_head=matrix(10, 8),
        mtp=module(heads=nn.ModuleList([matrix(10, 8)])),
        adapters=module(
            banks=nn.ModuleDict(
                {
                    "0": module(
                        lora_a=nn.Parameter(torch.randn(2, 3, 8)),
                        lora_b=nn.Parameter(torch.randn(2, 8, 3)),
                    ),
                    "1": module(lora_a=nn.Parameter(torch.randn(2, 1, 8))),
                }
            )
        ),
    )


def group_of(optimizers):
    return {name: group for group in optimizers for name in group.parameters}


def test_names_modules_and_shapes_give_the_roles():
    roles = parameter_roles(toy(blocks=1))
    block = "blocks.0."
    assert {name for name, role in roles.items() if role == "matrix"} == {
        "bigram.proj.weight",
        f"{block}mixer.q_proj.weight",
        f"{block}mlp.gate_proj.weight",
        f"{block}mlp.down_proj.weight",
        "qo.bank",
    }
    assert {name for name, role in roles.items() if role == "embed"} == {
        "embed.weight",
        "bigram.embed.weight",
    }
    assert roles["lm_head.weight"] == "head"
    assert roles["mtp.heads.0.weight"] == "mtp"
    assert all(role == "lora" for name, role in roles.items() if name.startswith("adapters."))
    for name in ("skips.weight", "skips.gate", "mixer_visit_gain", "bigram.scale"):
        assert roles[name] == "scalar"
    for name in ("conv1d.weight", "input_mix.weight", "update_gate.weight", "A_log", "mixer_scale"):
        assert roles[block + name] == "scalar"


@pytest.mark.parametrize(
    "config",
    [
        MuonAdam(),
        AllAdamW(),
        MuonAdam(lora_optimizer="muon", mtp_optimizer="muon", loop_lr_scale="inv_sqrt_passes"),
    ],
    ids=["muon_adam", "adamw", "muon_for_all"],
)
def test_every_parameter_is_in_exactly_one_torch_group(config):
    model = toy()
    optimizers = build(config, model, passes=3, looped_blocks={1})
    held = [
        id(param)
        for member in optimizers.members
        for group in member.param_groups
        for param in group["params"]
    ]
    assert sorted(held) == sorted(map(id, model.parameters()))
    names = [group.name for group in optimizers]
    assert len(names) == len(set(names))


def test_only_matrices_reach_muon_unless_adapters_are_sent_there():
    muon = {name for name, group in group_of(build(MuonAdam(), toy())).items() if group.muon}
    roles = parameter_roles(toy())
    assert muon == {name for name, role in roles.items() if role == "matrix"}

    sent = group_of(build(MuonAdam(lora_optimizer="muon"), toy()))
    assert sent["adapters.banks.0.lora_a"].muon
    assert not sent["adapters.banks.1.lora_a"].muon, "rank-1 factors are vectors"
    assert not any(group.muon for group in build(AllAdamW(), toy()))


def test_rates_and_decays_follow_the_role():
    config = MuonAdam(
        embed_lr=0.6, embed_weight_decay=0.085, mtp_optimizer="muon", mtp_lr=0.01, lora_lr=0.003
    )
    groups = group_of(build(config, toy()))
    assert (groups["bigram.embed.weight"].lr, groups["embed.weight"].weight_decay) == (0.6, 0.085)
    assert groups["mtp.heads.0.weight"].muon and groups["mtp.heads.0.weight"].lr == 0.01
    assert groups["adapters.banks.0.lora_b"].lr == 0.003


def test_looped_blocks_learn_slower_by_the_root_of_passes():
    config = MuonAdam(matrix_lr=0.04, loop_lr_scale="inv_sqrt_passes")
    groups = group_of(build(config, toy(), passes=4, looped_blocks={1}))
    assert groups["blocks.0.mixer.q_proj.weight"].lr == 0.04
    assert groups["blocks.1.mixer.q_proj.weight"].lr == 0.02
    assert groups["qo.bank"].lr == 0.04
    assert groups["blocks.1.mixer.q_gain"].lr == config.scalar_lr


def test_a_parameter_may_name_its_role_and_frozen_ones_stay_out():
    model = toy()
    model.get_parameter("lm_head.weight").optimizer_role = "matrix"
    model.get_parameter("embed.weight").requires_grad_(False)
    roles = parameter_roles(model)
    assert roles["lm_head.weight"] == "matrix"
    assert "embed.weight" not in roles
    model.get_parameter("qo.bank").optimizer_role = "matrices"
    with pytest.raises(ConfigError, match=r"qo\.bank.*'matrix'"):
        parameter_roles(model)


def test_tied_weights_are_embeddings_once():
    model = module(embed=nn.Embedding(6, 4), lm_head=module())
    model.lm_head.register_parameter("weight", model.embed.weight)
    assert parameter_roles(model) == {"embed.weight": "embed"}


@pytest.mark.parametrize("kind", sorted(REGISTRY["optimizer"]))
@pytest.mark.parametrize("schedule", sorted(REGISTRY["optimizer/schedule"]))
def test_options_survive_json(kind, schedule):
    config = REGISTRY["optimizer"][kind](
        beta1=0.8, schedule=REGISTRY["optimizer/schedule"][schedule](warmup_steps=7)
    )
    again = from_dict(OptimizerConfig, to_dict(config))
    assert again == config and type(again.schedule) is type(config.schedule)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"matrix_lr": -1.0}, "matrix_lr=-1.0"),
        ({"clip_scope": "grop"}, "did you mean 'group'"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"lora_optimizer": "adam"}, "did you mean 'adamw'"),
        ({"ns_steps": 0}, "at least 1"),
        ({"numuon_min_rank": 0.0}, "numuon_min_rank=0.0"),
    ],
)
def test_contradictions_are_refused_with_the_value(wrong, message):
    with pytest.raises(ConfigError, match=message):
        MuonAdam(**wrong)


def test_of_the_gated_delta_net_only_the_large_projections_reach_muon():
    config = GatedDeltaNetConfig(num_key_heads=2, num_value_heads=4)
    model = module(blocks=nn.ModuleList([module(mixer=config.build(16))]))
    roles = {name.removeprefix("blocks.0.mixer."): r for name, r in parameter_roles(model).items()}
    large = ["in_proj_qkv.weight", "in_proj_z.weight", "out_proj.weight"]
    small = ["in_proj_a.weight", "in_proj_b.weight", "conv1d.weight", "norm.weight"]
    small += ["A_log", "dt_bias"]
    assert roles == dict.fromkeys(large, "matrix") | dict.fromkeys(small, "scalar")
    muon = {name for name, group in group_of(build(MuonAdam(), model)).items() if group.muon}
    assert muon == {f"blocks.0.mixer.{name}" for name in large}
