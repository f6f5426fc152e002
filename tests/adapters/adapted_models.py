"""Small looped and flat models with adapters away from zero, and the same models as peft sees them.

    python tests/adapters/adapted_models.py

makes the fixture in tests/fixtures/peft anew; it needs the package peft.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from recurgolf import adapters, compose
from recurgolf.model.linear import Linear

FIXTURE = Path(__file__).parents[1] / "fixtures/peft"
HYBRID = (
    "experiment=smoke",
    "data.vocab_size=64",
    "model.dim=16",
    "model/mixer=gated_deltanet",
    "model.mixer_pattern=[mixer,attention]",
)
TARGETS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "q_proj", "up_proj")
LORA = ("lora.rank=2", f"lora.targets=[{','.join(TARGETS)}]", "lora.alpha=3", "lora.visits=all")
FLAT = (*HYBRID, "looping=none", "lora=rank1", *LORA, "lora.blocks=all")
"""A block of each mixer, both visited once."""
LOOPED = (*HYBRID, "looping=cycle", "looping.passes=3", *LORA)
SHARED = (*LOOPED, "lora.visits=shared")
LATE = (*LOOPED, "lora.visits=repeats")


def disturbed(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with every parameter drawn anew: nothing is zero, nothing is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(run, seed: int = 1):
    """(model with adapters, the same weights without them, the adapters with their base)."""
    model = disturbed(run.build_model(), seed).eval()
    base = run_without(run).build_model().eval()
    state = model.state_dict()
    base.load_state_dict({n: t for n, t in state.items() if not n.startswith("adapters.")})
    facts = adapters.Base(adapters.fingerprint(state), "f00d" * 16, "some_run")
    return model, base, adapters.adapter_of(run, model.adapters, facts)


def run_without(run):
    """The Run without adapters."""
    data = run.to_dict()
    data["lora"]["rank"] = 0
    return type(run).from_dict(data)


def some_tokens(run, length=13):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, run.model.vocab_size, (2, length), generator=generator)


class Ordinary(nn.Linear):
    """A linear layer that peft knows, where a block calls ours."""

    def forward(self, x, adapter=None):
        assert adapter is None
        return super().forward(x)


def as_peft_sees_it(model: nn.Module) -> nn.Module:
    """A model in which every linear layer is torch's own, under the same name and weight."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            parent, _, own = name.rpartition(".")
            layer = Ordinary(module.in_dim, module.out_dim, bias=False)
            layer.weight = module.weight
            setattr(model.get_submodule(parent), own, layer)
    return model


class Logits(nn.Module):
    """A forward without a plan, as peft calls it; the names below it are the model's own."""

    def __init__(self, model: nn.Module, plan):
        super().__init__()
        for name, child in model.named_children():
            setattr(self, name, child)
        object.__setattr__(self, "whole", model)
        object.__setattr__(self, "plan", plan)

    def forward(self, tokens):
        return self.whole(tokens, self.plan)


def make_fixture() -> None:
    """Adapters that peft made and saved, their base, and peft's own logits."""
    from peft import LoraConfig, get_peft_model

    run = run_without(compose([*FLAT]))
    base = disturbed(run.build_model(), seed=5).eval()
    FIXTURE.mkdir(exist_ok=True)
    save_file(
        {n: t.half().clone() for n, t in base.state_dict().items()}, FIXTURE / "base.safetensors"
    )
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(parameter.half().float())
    config = LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=["in_proj_qkv", "in_proj_b", "blocks.1.mixer.q_proj", "up_proj"],
        rank_pattern={"in_proj_b": 1},
        alpha_pattern={r"blocks\.1\.mlp\.up_proj": 7},
    )
    wrapped = get_peft_model(Logits(as_peft_sees_it(base), run.eval_plan), config)
    trained = [p for n, p in wrapped.named_parameters() if "lora_" in n]
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(FIXTURE / "adapter")
    (FIXTURE / "adapter/README.md").unlink(missing_ok=True)
    tokens = some_tokens(run)
    logits = wrapped(tokens).detach().contiguous()
    save_file({"tokens": tokens, "logits": logits}, FIXTURE / "io.safetensors")
    print(json.dumps({p.name: p.stat().st_size for p in FIXTURE.rglob("*") if p.is_file()}))


if __name__ == "__main__":
    make_fixture()
