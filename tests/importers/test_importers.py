"""Foreign checkpoints come in whole, or not at all with the name of what is wrong."""

import json
from pathlib import Path

import pytest
import source_names
import torch
from gated_delta_layer import ImportedLayer
from safetensors.torch import load_file, save_file

from recurgolf import importers
from recurgolf.config import ConfigError
from recurgolf.run import Run

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
MODELS = sorted(path.parent for path in GOLDEN.glob("*/models/*/config.json"))
# The first recorded model of every system.
FOLDERS = {folder.parents[1].name: folder for folder in reversed(MODELS)}


def read(folder):
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "weights.safetensors"), folder / "weights.safetensors"


def source(system):
    return read(FOLDERS[system])


def model_with(system, **settings):
    """A recorded model that has something in its settings, where there is one."""
    for folder in (folder for folder in MODELS if folder.parents[1].name == system):
        config, weights, path = read(folder)
        if all(test(config["hyperparameters"][name]) for name, test in settings.items()):
            return config, weights, path
    pytest.skip(f"no recorded {system} with {', '.join(settings)}")


@pytest.fixture
def saved(tmp_path):
    def save(weights):
        path = tmp_path / "weights.safetensors"
        save_file(weights, path)
        return path

    return save


@pytest.mark.parametrize("folder", MODELS, ids=lambda f: f"{f.parents[1].name}-{f.name}")
def test_all_tensors_come_back_under_the_sources_names(folder):
    config, weights, path = read(folder)
    found = importers.load(folder.parents[1].name, config, path)
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    ours = dict(found.model.transformer.named_parameters())
    back = source_names.to_source(found.places, ours, shapes)
    back = {name: tensor for name, tensor in back.items() if tensor.numel()}
    assert set(back) == {name for name, tensor in weights.items() if tensor.numel()}
    for name, tensor in back.items():
        if name == "skip_weights" and "universal" in str(folder):
            tensor, weights[name] = tensor[:1], weights[name][:1]  # it reads the first row alone
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("system", FOLDERS)
def test_environment_spelling_gives_the_same_model(system):
    config, _, path = source(system)
    capitals = {
        key.upper(): str(int(value)) if isinstance(value, bool) else str(value)
        for key, value in config["hyperparameters"].items()
    }
    first, second = (importers.load(system, c, path) for c in (config, capitals))
    assert first.run == second.run
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(first.model.eval()(ids), second.model.eval()(ids))


def test_a_pt_file_is_read_without_running_code(tmp_path):
    config, weights, path = source("baseline")
    torch.save(weights, tmp_path / "weights.pt")
    first = importers.load("baseline", config, path)
    second = importers.load("baseline", config, tmp_path / "weights.pt")
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(first.model(ids), second.model(ids))

    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"tok_emb.weight": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(ConfigError, match="no plain state dict"):
        importers.load("baseline", config, tmp_path / "harmful.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("system", FOLDERS)
def test_a_tensor_without_use_fails_the_import_by_name(system, saved):
    config, weights, _ = source(system)
    with pytest.raises(ConfigError, match=r"no use for 'blocks\.0\.attn\.rotary\.table'"):
        extra = {"blocks.0.attn.rotary.table": torch.ones(3)}
        importers.load(system, config, saved(weights | extra))


@pytest.mark.parametrize("system", FOLDERS)
def test_a_missing_tensor_is_named(system, saved):
    config, weights, _ = source(system)
    for name in list(weights)[:: len(weights) // 2 + 1]:
        rest = {other: tensor for other, tensor in weights.items() if other != name}
        with pytest.raises(ConfigError, match=f"'{name}'.* is missing"):
            importers.load(system, config, saved(rest))


@pytest.mark.parametrize("system", FOLDERS)
def test_a_wrong_shape_is_named_with_what_was_expected(system, saved):
    config, weights, _ = source(system)
    name = "qo_bank" if "qo_bank" in weights else "blocks.1.attn.c_q.weight"
    shape = tuple(weights[name].shape)
    wrong = weights | {name: torch.ones(shape[0] + 1, *shape[1:])}
    with pytest.raises(ConfigError, match=rf"{name} is \({shape[0] + 1}, .*asks for \({shape[0]},"):
        importers.load(system, config, saved(wrong))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(value, saved):
    config, weights, _ = source("baseline")
    name = list(weights)[-1]
    bad = weights[name].clone()
    bad.view(-1)[-1] = value
    for given in (weights | {name: bad}, saved(weights | {name: bad})):
        words = rf"1 of {bad.numel():,} values in '{name}' are not finite"
        with pytest.raises(ConfigError, match=words):
            importers.load("baseline", config, given)


def test_a_file_that_was_cut_is_no_checkpoint(saved):
    config, weights, _ = source("baseline")
    path = saved(weights)
    for size in (0, 5, path.stat().st_size - 3):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ConfigError, match=r"no whole \.safetensors file"):
            importers.load("baseline", config, path)


def test_what_cannot_be_read_is_said(tmp_path):
    config, _, path = source("baseline")
    with pytest.raises(ConfigError, match=r"no such system .did you mean 'baseline'"):
        importers.load("base_line", config, path)
    with pytest.raises(ConfigError, match="no such file"):
        importers.load("baseline", config, tmp_path / "absent.safetensors")
    with pytest.raises(ConfigError, match=r"expected \.safetensors or \.pt"):
        importers.load("baseline", config, Path(__file__))
    with pytest.raises(ConfigError, match="NUM_LAYERS='many' is no int"):
        importers.load("baseline", {"NUM_LAYERS": "many"}, path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConfigError, match="holds a list"):
        importers.load("baseline", config, tmp_path / "list.pt")


def test_delayed_looping_can_be_switched():
    config, _, path = model_with("per_iteration_lora", num_loops=lambda n: n > 0)
    settings = config["hyperparameters"]
    found = importers.load("per_iteration_lora", config, path)
    model = found.model.eval()
    ids = torch.arange(10).view(1, 10)
    looped = model(ids)
    source_names.set_looping(found, False)
    assert model.plan.blocks == tuple(range(settings["num_layers"]))
    assert not torch.allclose(model(ids), looped)
    source_names.set_looping(found, True)
    assert torch.equal(model(ids), looped)


def test_evaluation_runs_twice_the_passes_where_none_are_named():
    config, _, path = source("parallel_recurrent")
    settings = config["hyperparameters"] | {"num_eval_recurrences": 0}
    model = importers.load("parallel_recurrent", settings, path).model
    visits = settings["num_unique_layers"] * settings["num_recurrences"]
    assert model.train().plan.num_visits == visits
    assert model.eval().plan.num_visits == 2 * visits


def test_the_run_carries_the_sources_training_and_survives_its_file(tmp_path):
    config, _, path = source("per_iteration_lora")
    settings = config["hyperparameters"] | {
        "matrix_lr": 0.031,
        "ema_decay": 0.9,
        "MUON_WD": "0.2",
        "iterations": 77,
        "train_batch_tokens": 1000,
    }
    run = importers.load("per_iteration_lora", settings, path).run
    assert run.optimizer.matrix_lr == 0.031
    assert run.optimizer.matrix_weight_decay == 0.2
    assert run.averaging.decay == 0.9
    assert run.trainer.steps == 77
    assert run.trainer.batch_tokens % (8 * settings["train_seq_len"]) == 0  # rows, on 8 ranks
    run.write(tmp_path)
    assert Run.read(tmp_path) == run


LAYER = GOLDEN / "gated_delta" / "layer"
LAYOUTS = sorted(folder.parent for folder in LAYER.glob("*/config.json"))
LAYER_CASES = [
    (layout, path.stem)
    for layout in LAYOUTS
    for path in sorted(layout.glob("io_*.safetensors"))
    if "incremental" not in path.stem  # a state is carried along: tests/model
]


def read_layer(folder, case):
    """Settings, tensors (a case's adapters among them) and what was recorded for the case."""
    config = json.loads((folder / "config.json").read_text())
    recorded = load_file(folder / f"{case}.safetensors")
    weights = load_file(folder / "weights.safetensors")
    weights |= {name: t for name, t in recorded.items() if name.startswith("lora.")}
    settings = config["hyperparameters"]
    if "scale" in config["cases"].get(case, {}):
        settings = settings | {"lora_scale": config["cases"][case]["scale"]}
    return settings, weights, recorded


@pytest.mark.parametrize(
    ("layout", "case"), LAYER_CASES, ids=[f"{folder.name}-{case}" for folder, case in LAYER_CASES]
)
@pytest.mark.parametrize("form", ["file", "state dict", "capitals"])
def test_a_gated_delta_layer_and_its_gradients_equal_the_recording(layout, case, form, saved):
    config, weights, recorded = read_layer(layout, case)
    if form == "capitals":
        config = {key.upper(): value for key, value in config.items()}
    source = saved(weights) if form == "file" else weights
    found = ImportedLayer(config, source)
    x = recorded["hidden_states"].requires_grad_()
    masks = (recorded["attention_mask"],) if "attention_mask" in recorded else ()
    output = found(x, *masks)
    torch.testing.assert_close(output, recorded["output"], atol=2e-5, rtol=1e-5)
    if "grad_output" not in recorded:
        return
    output.backward(recorded["grad_output"])
    own = source_names.layer_gradients(found, weights) | {"input": x.grad}
    wanted = {n[5:]: t for n, t in recorded.items() if n.startswith(("grad.", "grad_input"))}
    # With adapters the recording has the factors' gradients alone.
    adapted = any(name.startswith("lora.") for name in weights)
    assert wanted and wanted.keys() <= own.keys()
    assert adapted or wanted.keys() == own.keys()
    for name, grad in wanted.items():
        atol = 1e-5 + 1e-4 * grad.abs().max().item()
        torch.testing.assert_close(own[name], grad, atol=atol, rtol=0)


def test_a_layers_factors_are_scaled_by_alpha_over_their_rank():
    folder = next(f for f in LAYOUTS if (f / "io_lora.safetensors").exists())
    config, weights, recorded = read_layer(folder, "io_lora")
    (rank,) = {len(t) for name, t in weights.items() if name.endswith(".A")}
    config = config | {"lora_alpha": config.pop("lora_scale") * rank}
    found = ImportedLayer(config, weights)
    output = found(recorded["hidden_states"])
    torch.testing.assert_close(output, recorded["output"], atol=2e-5, rtol=1e-5)


def test_a_layer_tells_what_it_leaves_unread_of_its_networks_configuration():
    config, weights, _ = read_layer(*LAYER_CASES[0])
    found = ImportedLayer(config | {"num_hidden_layers": 24}, weights)
    assert found.passed_over == ["num_hidden_layers"]


def test_a_layer_needs_its_sizes_and_its_tensors():
    config, weights, _ = read_layer(*LAYER_CASES[-1])
    less = {key: value for key, value in config.items() if key != "linear_num_value_heads"}
    with pytest.raises(ConfigError, match="lacks 'linear_num_value_heads'"):
        ImportedLayer(less, weights)
    with pytest.raises(ConfigError, match="hidden_act='gelu'; only 'silu'"):
        ImportedLayer(config | {"hidden_act": "gelu"}, weights)
    with pytest.raises(ConfigError, match=r"no use for the tensor 'conv1d.bias'"):
        ImportedLayer(config, weights | {"conv1d.bias": torch.ones(60)})
    with pytest.raises(ConfigError, match="weights given: 'A_log' is a list, no tensor"):
        ImportedLayer(config, weights | {"A_log": [1.0]})


def test_a_finished_checkpoint_needs_no_heads_of_training(saved):
    config, weights, path = model_with("per_iteration_lora", mtp_num_heads=lambda n: n > 1)
    bare = {name: t for name, t in weights.items() if not name.startswith("mtp_heads.")}
    found = importers.load("per_iteration_lora", config, saved(bare))
    assert found.run.model.mtp_heads == 0
    whole = importers.load("per_iteration_lora", config, path)
    ids = torch.arange(10).view(1, 10)
    assert torch.equal(found.model.eval()(ids), whole.model.eval()(ids))
    one = bare | {"mtp_heads.1.weight": weights["mtp_heads.1.weight"]}
    with pytest.raises(ConfigError, match=r"'mtp_heads\.0\.weight'.* is missing"):
        importers.load("per_iteration_lora", config, saved(one))
