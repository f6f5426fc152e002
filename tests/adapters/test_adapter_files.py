"""Adapter folders: peft's layout, read back exactly, and what is refused."""

import json

import pytest
import torch
from adapted_models import FIXTURE, FLAT, LATE, LOOPED, SHARED, adapted, run_without
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from smoke_runs import composed

from recurgolf import adapters
from recurgolf.adapters.attach import linear_modules
from recurgolf.adapters.files import CONFIG, TENSORS
from recurgolf.config import ConfigError

KINDS = {"each block once": FLAT, "every visit": LOOPED, "shared": SHARED, "repeats": LATE}


@pytest.fixture
def folder(tmp_path):
    """A flat model's adapters, written."""
    _, _, adapter = adapted(composed(*FLAT))
    adapters.write(tmp_path / "adapter", adapter)
    return tmp_path / "adapter"


def rewrite(folder, change):
    """Change the tensors of an adapter folder in place, its header kept."""
    path = folder / TENSORS
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, about)


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
def test_written_adapter_reads_back_bit_for_bit(overrides, tmp_path):
    _, _, adapter = adapted(composed(*overrides))
    adapters.write(tmp_path, adapter)
    back = adapters.read(tmp_path)
    assert back.base == adapter.base
    assert set(back.factors) == set(adapter.factors)
    for place, factors in adapter.factors.items():
        assert torch.equal(back.factors[place].a, factors.a)
        assert torch.equal(back.factors[place].b, factors.b)
        assert back.factors[place].scale == factors.scale == 1.5


@pytest.mark.parametrize("overrides", [FLAT, SHARED], ids=["each block once", "shared"])
def test_names_are_the_paths_of_the_modules_and_nothing_else(overrides, tmp_path):
    run = composed(*overrides)
    model, _, adapter = adapted(run)
    adapters.write(tmp_path, adapter, linear_modules(run.model))
    paths = {name for name, _ in model.named_modules()}
    for name in load_file(tmp_path / TENSORS):
        path = name.removeprefix("base_model.model.")
        assert path.rpartition(".lora_")[0] in paths, name
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 3.0)
    assert config["target_modules"] == sorted([*TARGETS_OF_BOTH, "q_proj"])


TARGETS_OF_BOTH = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "up_proj")


def test_a_name_is_short_only_where_every_layer_of_that_name_is_adapted(tmp_path):
    run = composed(*FLAT)
    _, _, adapter = adapted(run)
    some = {p: f for p, f in adapter.factors.items() if p.path != "blocks.0.mlp.up_proj"}
    adapters.write(tmp_path, adapters.Adapter(some), linear_modules(run.model))
    targets = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert "blocks.1.mlp.up_proj" in targets and "up_proj" not in targets
    assert "in_proj_qkv" in targets


def test_iterations_have_an_index_in_their_names_and_a_type_of_their_own(tmp_path):
    _, _, adapter = adapted(composed(*LATE))
    adapters.write(tmp_path, adapter)
    names = load_file(tmp_path / TENSORS)
    prefix = "base_model.model.blocks.1.mixer.q_proj.iteration_"
    assert {n for n in names if n.startswith(prefix)} == {
        f"{prefix}{nth}.lora_{half}.weight" for nth in (1, 2) for half in "AB"
    }
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "LORA_PER_ITERATION"


def test_what_peft_wrote_gives_the_logits_that_peft_computed():
    run = run_without(composed(*FLAT))
    model = run.build_model().eval()
    model.load_state_dict(
        {n: t.float() for n, t in load_file(FIXTURE / "base.safetensors").items()}
    )
    changed, adapter = adapters.load(run, model, FIXTURE / "adapter")
    assert {f.rank for f in adapter.factors.values()} == {1, 2}
    io = load_file(FIXTURE / "io.safetensors")
    with torch.no_grad():
        logits = model(io["tokens"], changed.eval_plan)
        torch.testing.assert_close(logits, io["logits"], atol=1e-5, rtol=0)
        model.adapters = None
        assert (model(io["tokens"], run.eval_plan) - io["logits"]).abs().max() > 0.1


def test_rank_stabilised_scale_is_read_as_peft_means_it(folder):
    path = folder / CONFIG
    config = json.loads(path.read_text()) | {"use_rslora": True}
    path.write_text(json.dumps(config))
    scales = {factors.scale for factors in adapters.read(folder).factors.values()}
    assert sorted(scales) == pytest.approx([3 / 2**0.5])


KEY = "base_model.model.blocks.1.mixer.q_proj.lora_"


def _poke(value):
    def change(tensors):
        tensors[f"{KEY}A.weight"][0, 1] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{KEY}B.weight"),
            r"layer 1, module mixer\.q_proj: lora_B is missing; expected a pair, found only lora_A",
        ),
        (
            lambda t: t.update({f"{KEY}A.weight": torch.ones(3, 16)}),
            r"layer 1, module mixer\.q_proj: expected one rank, found 3 in lora_A \(3, 16\) and 2",
        ),
        (
            lambda t: t.update(
                {f"{KEY}A.weight": torch.ones(3, 16), f"{KEY}B.weight": torch.ones(16, 3)}
            ),
            r"layer 1, module mixer\.q_proj: expected rank 2 by adapter_config\.json, found 3",
        ),
        (
            _poke(float("nan")),
            r"layer 1, module mixer\.q_proj: expected finite numbers, found 1 in",
        ),
        (_poke(float("-inf")), r"module mixer\.q_proj: expected finite numbers, found 1 in lora_A"),
        (lambda t: t.clear(), "holds no tensors: the adapter is empty"),
        (
            lambda t: t.update({f"{KEY}A.weight": torch.ones(2)}),
            r"lora_A is \(2,\); expected a matrix",
        ),
        (
            lambda t: t.update({f"{KEY}magnitude_vector": torch.ones(2)}),
            "no use for the tensor 'base_model.model.blocks.1.mixer.q_proj.lora_magnitude_vector'",
        ),
        (
            lambda t: t.update({f"{KEY}A.weight": torch.ones(2, 16, dtype=torch.int32)}),
            r"q_proj\.lora_A\.weight is torch\.int32; expected floating point",
        ),
        (
            lambda t: t.update(
                {
                    f"base_model.model.blocks.0.mlp.up_proj.iteration_1.lora_{half}.weight": x
                    for half, x in (("A", torch.ones(2, 16)), ("B", torch.ones(32, 2)))
                }
            ),
            "some factors are for all visits and some for single iterations",
        ),
    ],
)
def test_a_wrong_tensor_is_refused_by_layer_and_module(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ConfigError, match=message):
        adapters.read(folder)


def test_a_gap_in_the_iterations_is_refused(tmp_path):
    _, _, adapter = adapted(composed(*LOOPED))
    adapters.write(tmp_path, adapter)
    rewrite(tmp_path, lambda t: [t.pop(n) for n in list(t) if "q_proj.iteration_1" in n])
    with pytest.raises(ConfigError, match=r"q_proj has iterations \[0, 2\]; expected each one"):
        adapters.read(tmp_path)


def test_iterations_far_apart_are_refused_at_once_and_odd_numbers_are_no_names(tmp_path):
    _, _, adapter = adapted(composed(*LOOPED))
    adapters.write(tmp_path, adapter)

    def rename(number):
        def change(tensors):
            for name in [n for n in tensors if "q_proj.iteration_2." in n]:
                tensors[name.replace("iteration_2", f"iteration_{number}")] = tensors.pop(name)

        return change

    whole = (tmp_path / TENSORS).read_bytes()
    for number, message in (
        ("999999", r"q_proj has iterations \[0, 1, 999999\]"),
        ("9999999999999", "no use for the tensor .*iteration_9999999999999"),
        ("02", r"no use for the tensor .*iteration_02\."),
    ):
        (tmp_path / TENSORS).write_bytes(whole)
        rewrite(tmp_path, rename(number))
        with pytest.raises(ConfigError, match=message):
            adapters.read(tmp_path)


@pytest.mark.parametrize("about", ["[1]", '"x"', '{"fingerprint": 3}', "{"])
def test_a_header_that_says_nothing_about_a_base_is_refused(folder, about):
    save_file(load_file(folder / TENSORS), folder / TENSORS, {"recurgolf": about})
    with pytest.raises(ConfigError, match="is damaged"):
        adapters.read(folder)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected LORA"),
        ({"use_dora": True}, "use_dora=True means more than a pair"),
        ({"modules_to_save": ["embed"]}, "modules_to_save"),
        ({"r": None}, "r is None; expected a number"),
        ({"lora_alpha": "2"}, "lora_alpha is '2'; expected a number"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern is .*nan.*none of them 0"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is no regular expression"),
        ({"lora_alpha": 0}, "lora_alpha is 0; expected a number other than 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf; expected a number other than 0"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens=\[1\] means more than"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the weights of the base"),
    ],
)
def test_settings_that_mean_something_else_are_refused(folder, setting, message):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(ConfigError, match=message):
        adapters.read(folder)


def test_missing_empty_cut_and_foreign_files_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no_such is not an adapter folder"):
        adapters.read(tmp_path / "no_such")
    whole = (folder / TENSORS).read_bytes()
    for content, message in (
        (b"", "is empty: 0 bytes"),
        (whole[: len(whole) // 2], "is damaged"),
        (b"\x80\x04not tensors", "is damaged"),
    ):
        (folder / TENSORS).write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            adapters.read(folder)
    (folder / TENSORS).unlink()
    with pytest.raises(ConfigError, match=r"it has no adapter_model\.safetensors"):
        adapters.read(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        adapters.read(folder)
