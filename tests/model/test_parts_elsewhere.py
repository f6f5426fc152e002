"""Parts of one public system run in the frame of another, by overrides alone."""

import pytest
import torch

import recurgolf
from recurgolf import optim
from recurgolf.config import ConfigError

SMALL = [
    "model.dim=32",
    "model.mixer.num_heads=2",
    "model.mixer.num_kv_heads=1",
    "model.num_blocks=4",
    "data.vocab_size=64",
]
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
        "model.second_block_at=[3]",
        "model.rope.dims=8",
        "looping=cycle",
        "looping.passes=2",
        "lora=attention",
    ],
}


@pytest.mark.parametrize("name", MIXES)
def test_parts_of_different_systems_train_together(name):
    run = recurgolf.compose([*SMALL, *MIXES[name]])
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
        (["eval.passes=3", "looping=none"], "eval passes=3 asked for, but looping=none"),
        (
            ["model.second_block_at=[7]"],
            r"second_block_at=\[7\] is outside the 3 blocks \(0 to 2\)",
        ),
        (["model.skips=u_net"], r"model.skips='u_net' \(did you mean 'unet'"),
        (["model.rope.dims=3"], "model.rope.dims=3: an even number"),
    ],
)
def test_what_cannot_be_combined_fails_at_composition_with_the_numbers(overrides, message):
    with pytest.raises(ConfigError, match=message):
        recurgolf.compose(overrides)
