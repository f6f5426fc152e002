"""The round trip through peft itself, which is a dependency of the tests alone.

It is imported where it is used: with transformers it takes three seconds, in every worker.
"""

import warnings

import pytest
import torch
from adapted_models import (
    FLAT,
    LOOPED,
    SHARED,
    Logits,
    adapted,
    as_peft_sees_it,
    run_without,
    some_tokens,
)
from safetensors.torch import load_file
from smoke_runs import composed

from recurgolf import adapters
from recurgolf.adapters.attach import linear_modules
from recurgolf.adapters.files import TENSORS


@pytest.mark.parametrize("overrides", [FLAT, SHARED], ids=["each block once", "shared by visits"])
@torch.no_grad()
def test_peft_computes_our_logits_from_our_file_and_writes_it_back(overrides, tmp_path):
    from peft import PeftModel

    run = composed(*overrides)
    model, base, adapter = adapted(run)
    tokens, bare = some_tokens(run), run_without(run)
    expected = model(tokens, run.eval_plan)
    adapters.write(tmp_path / "ours", adapter, linear_modules(run.model))
    before = {n: t.clone() for n, t in base.state_dict().items()}

    seen = Logits(as_peft_sees_it(base), bare.eval_plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns of settings and tensors it has no use for
        theirs = PeftModel.from_pretrained(seen, tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(tokens), expected, atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")

    ours, back = (load_file(tmp_path / name / TENSORS) for name in ("ours", "theirs"))
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[name], back[name]) for name in ours)
    fresh = bare.build_model().eval()
    fresh.load_state_dict(before)
    changed, _ = adapters.load(bare, fresh, tmp_path / "theirs")
    assert torch.equal(fresh(tokens, changed.eval_plan), expected)


def test_peft_refuses_an_adapter_of_single_iterations_by_its_type(tmp_path):
    from peft import PeftModel

    run = composed(*LOOPED)
    _, base, adapter = adapted(run)
    adapters.write(tmp_path, adapter)
    seen = Logits(as_peft_sees_it(base), run_without(run).eval_plan)
    with pytest.raises(KeyError, match="LORA_PER_ITERATION"):
        PeftModel.from_pretrained(seen, tmp_path)


@torch.no_grad()
def test_pairs_of_several_ranks_and_scales_mean_the_same_to_peft(tmp_path):
    from peft import PeftModel

    run = composed(*FLAT)
    _, base, adapter = adapted(run)
    mixed = adapters.blend([adapter, adapter], [0.5, 0.25])
    some = dict(list(mixed.factors.items())[:3])
    adapters.write(tmp_path, adapters.Adapter({**adapter.factors, **some}))
    tokens, bare = some_tokens(run), run_without(run)
    changed, _ = adapters.load(bare, base, tmp_path)
    expected = base(tokens, changed.eval_plan)
    base.adapters = None
    theirs = PeftModel.from_pretrained(
        Logits(as_peft_sees_it(base), bare.eval_plan), tmp_path
    ).eval()
    torch.testing.assert_close(theirs(tokens), expected, atol=1e-5, rtol=0)
