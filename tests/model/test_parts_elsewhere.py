"""Parts of one public system run in the frame of another, by overrides alone."""

import pytest
import torch

import recurgolf
from recurgolf import optim
from recurgolf.artifact import load, pack
from recurgolf.artifact.score import rebuild
from recurgolf.config import ConfigError, kind_of, to_dict
from recurgolf.model.mixers.gated_deltanet import PROJECTIONS
from recurgolf.quant import dequantize_state, quantize_state

NARROW = ["model.dim=32", "model.num_blocks=4", "data.vocab_size=64"]
SMALL = [*NARROW, "model.mixer.num_heads=2", "model.mixer.num_kv_heads=1"]
HYBRID = [
    "model/mixer=gated_deltanet",
    "model.mixer_pattern=[mixer,attention]",
]
FIVE = "lora.targets=[in_proj_qkv,in_proj_z,in_proj_b,in_proj_a,out_proj]"
MIXES = {
    "unet skips under prelude, core and coda": [
        "looping=prelude_core_coda",
        "looping.passes=3",
        "model.skips=unet_gated",
    ],
    "rank-1 adapters on the golf band": [
        "looping=segment",
        "looping.start=1",
        "looping.end=2",
        "looping.passes=3",
        "lora=rank1",
    ],
    "output norms in a flat model": ["model/block=peri_norm", "model.block.input_mix=none"],
    "parallel blocks in the universal frame": [
        "model/block=parallel",
        "looping=prelude_core_coda",
        "model.skips=prelude_to_coda",
        "model.visit_gains=true",
        "lora=residual",
    ],
    "the golf band's network run as a cycle": [
        "model=per_iteration_lora",
        "model.block_pattern=[block,block,block,parallel]",
        "model.rope.dims=8",
        "looping=cycle",
        "looping.passes=2",
        "lora=attention",
    ],
}


DELTA_MIXES = {
    "an adapter per iteration in a cycle": [
        "model/mixer=gated_deltanet",
        "looping=cycle",
        "looping.passes=3",
        "lora=rank1",
        FIVE,
        "lora.alpha=2",
    ],
    "an adapter per layer in the ready example": ["experiment=gated_delta_lora_cpu"],
    "some targets in a hybrid with a looped core": [
        *HYBRID,
        "looping=prelude_core_coda",
        "lora=rank1",
        "lora.targets=[in_proj_qkv,q_proj]",
    ],
    "output norms and gated skips without attention": [
        "model/mixer=gated_deltanet",
        "model/block=peri_norm",
        "looping=segment",
        "model.skips=unet_gated",
    ],
    "the widths of the official baseline's frame": [
        "model=parameter_golf_baseline",
        "model/mixer=gated_deltanet",
    ],
}


def trained(run):
    """The model after a few steps on one batch, which must lower its loss."""
    model = run.build_model()
    optimizers = optim.build(run.optimizer, model)
    ids = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(6):
        loss = model(ids[:, :-1], run.plan(1.0), ids[:, 1:])
        loss.backward()
        optimizers.step(0.2, run.optimizer.momentum_at(step))
        optimizers.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    logits = model.eval()(ids, run.eval_plan)
    assert logits.shape == (4, 17, 64) and logits.isfinite().all()
    return model


@pytest.mark.parametrize("name", MIXES)
def test_parts_of_different_systems_train_together(name):
    trained(recurgolf.compose([*SMALL, *MIXES[name]]))


@pytest.mark.parametrize("name", DELTA_MIXES)
def test_gated_delta_nets_train_and_come_back_from_their_file_in_any_frame(name, tmp_path):
    run = recurgolf.compose([*DELTA_MIXES[name], *NARROW, "quant.keep_float_max_numel=0"])
    model = trained(run)
    state = model.state_dict()
    rules = run.quant.assign({name: tuple(tensor.shape) for name, tensor in state.items()})
    assert sum(rule.method == "rtn" for rule in rules.values()) > run.model.num_blocks
    stored = quantize_state(state, rules)
    parts = ("model", "looping", "lora", "eval")
    metadata = {part: to_dict(getattr(run, part)) for part in parts} | {"seq_len": 16}
    pack(tmp_path / "artifact.bin", metadata, stored, run.artifact.codec)
    again = rebuild(load(tmp_path / "artifact.bin")).model
    model.load_state_dict(dequantize_state(stored))
    ids = torch.arange(34).view(2, 17)
    assert torch.equal(again(ids, run.eval_plan), model(ids, run.eval_plan))


def test_the_ready_example_has_attention_in_every_fourth_block_and_adapters_in_the_others():
    run = recurgolf.compose(["experiment=gated_delta_lora"])
    kinds = [kind_of(run.model.mixer_of(block)) for block in range(run.model.num_blocks)]
    assert kinds == (["gated_deltanet"] * 3 + ["attention"]) * 2
    small = recurgolf.compose(["experiment=gated_delta_lora_cpu", *NARROW]).build_model()
    adapted = [sorted(small.adapters.bank(block)) for block in range(4)]
    assert adapted == [sorted(PROJECTIONS)] * 3 + [[]]
    assert run.lora.scale == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.dim=30", "model.mixer.num_heads=4"], r"model.dim=30 .*num_heads=4"),
        (
            ["model.mixer.num_heads=4", "model.mixer.num_kv_heads=3"],
            "num_kv_heads=3",
        ),
        (
            ["looping=segment", "looping.start=3", "looping.end=9"],
            r"looping.end=9 .*3 blocks .0 to 2",
        ),
        (["lora=attention", "lora.targets=[in_proj]", "looping=cycle"], "no projection 'in_proj'"),
        (["lora=rank1", "looping=none"], "lora.rank=1 .*no visit qualifies"),
        (["eval.passes=3", "looping=none"], "eval passes=3 asked for, but looping=none has 1"),
        (
            ["model.block_pattern=[block,block,block,parallel]"],
            "block_pattern=.* 4 entries for 3 blocks",
        ),
        (["model.skips=u_net"], r"model.skips='u_net': one of .*\(did you mean 'unet'"),
        (["model.rope.dims=3"], "model.rope.dims=3: an even number"),
        (
            ["model/mixer=gated_deltanet", "model.mixer.num_value_heads=3"],
            "num_value_heads=3 is not a multiple of model.mixer.num_key_heads=2",
        ),
        (["model/mixer=gated_deltanet", "model.mixer.conv_size=0"], "conv_size=0: at least 1"),
        (
            ["model/mixer=gated_deltanet", "model.rope.dims=16"],
            "model.rope.dims=16, but no block attends",
        ),
        (
            [*HYBRID, "model.mixer.key_head_dim=-8"],
            "key_head_dim=-8: at least 0",
        ),
        (
            ["lora=rank1", "looping=cycle", "lora.alpha=0"],
            "lora.alpha=0.0: the scale is alpha / rank",
        ),
        (
            ["model/mixer=gated_deltanet", "lora=attention"],
            "no projection 'q_proj'; theirs are .*in_proj_qkv",
        ),
        (["model.mixer_pattern=[attention,gated_delta]"], "did you mean 'gated_deltanet'"),
        (
            ["model.mixer_pattern=[gated_deltanet]"],
            "does not name model.mixer, which is attention",
        ),
        (
            ["model.mixer_pattern=[attention,attention,gated_deltanet,attention]"],
            "mixer_pattern=.* 4 entries for 3 blocks",
        ),
        (
            ["model.mixer_pattern=[mixer,{kind:attention,num_heads:4}]"],
            r"heads of this hybrid are \[32, 64\] wide; model.rope.dims=0",
        ),
        (
            [*HYBRID, "model.value_embed.dim=8", "model.value_embed.visits=[1]"],
            r"values of one width, but .* \[0, 64, 0\] wide",
        ),
    ],
)
def test_what_cannot_be_combined_fails_at_composition_with_the_numbers(overrides, message):
    with pytest.raises(ConfigError, match=message):
        recurgolf.compose(overrides)
