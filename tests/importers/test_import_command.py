"""`recurgolf import` makes a run folder of which the source's own score comes out."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import recurgolf
from safetensors.torch import load_file, save_file

from recurgolf import importers
from recurgolf.artifact import load
from recurgolf.artifact.score import rebuild
from recurgolf.data.shards import read_shard
from recurgolf.loaded import load as load_folder
from recurgolf.run import Run
from recurgolf.training import checkpoint

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
SYSTEMS = sorted(path.parents[1].name for path in GOLDEN.glob("*/eval/eval.json"))
DATA = [
    "data=shards",
    f"data.path={GOLDEN / 'data' / 'shards'}",
    f"data.tokenizer={GOLDEN / 'data' / 'tokenizer.model'}",
]


def files_of(system):
    folder = GOLDEN / system / "eval"
    return folder / "weights.safetensors", folder / "eval.json"


def command(system, folder, *overrides, weights=None, config=None):
    known = files_of(system)
    arguments = [str(weights or known[0]), str(config or known[1]), str(folder)]
    return recurgolf("import", system, *arguments, *DATA, *overrides, cwd=folder.parent)


def validation_tokens():
    shards = sorted((GOLDEN / "data" / "shards").glob("fineweb_val_*.bin"))
    return torch.from_numpy(np.concatenate([read_shard(p) for p in shards]).astype(np.int64))


@torch.no_grad()
def mean_loss(model, length):
    """Nats per token of windows side by side, one after the other."""
    tokens = validation_tokens()
    losses = []
    for start in range(0, (len(tokens) - 1) // length * length, length):
        window = tokens[start : start + length + 1]
        logits = model(window[None, :-1])[0].double()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request):
    return request.param


@pytest.fixture(scope="module")
def folder(system, tmp_path_factory):
    path = tmp_path_factory.mktemp("imported") / system
    command(system, path, "trainer.device=cpu").finished()
    return path


@pytest.fixture(scope="module")
def source(system):
    weights, config = files_of(system)
    return importers.load(system, json.loads(config.read_text()), weights)


def test_evaluate_gives_the_imported_models_own_score(system, folder, source):
    ended = recurgolf("evaluate", folder, "eval=plain", "--json", cwd=folder).finished()
    result = json.loads(ended.out.strip().splitlines()[-1])["plain"]
    length = source.run.trainer.seq_len
    assert result["val_loss"] == pytest.approx(mean_loss(source.model.eval(), length), abs=1e-6)
    nats = result["val_loss"] * result["tokens"]
    assert result["val_bpb"] == pytest.approx(nats / math.log(2) / result["bytes"], rel=1e-9)
    recorded = json.loads(files_of(system)[1].read_text())["results"]
    for how in recorded:
        one = how["world_size"] == 1 and how.get("looping_active", True)
        same = length in (how.get("eval_seq_len"), how.get("seq_len"), how.get("train_seq_len"))
        if how["fn"] == "eval_val" and one and same:
            atol = 2e-5 if system == "universal_rank1" else 2e-6
            assert result["val_bpb"] == pytest.approx(how["val_bpb"], abs=atol)
            assert (result["tokens"], result["bytes"]) == (how["token_count"], how["byte_count"])


@torch.no_grad()
def test_the_file_holds_the_weights_exactly(folder, source):
    scorable = rebuild(load(folder / "artifact.bin"))
    ids = validation_tokens()[:96].view(2, 48)
    assert torch.equal(scorable.model(ids, source.run.eval_plan), source.model.eval()(ids))


@torch.no_grad()
def test_its_logits_for_a_text_are_the_source_s(folder, source):
    loaded = load_folder(folder)
    ids = torch.tensor([loaded.ids("A short text.")])
    assert torch.equal(loaded.logits("A short text."), source.model.eval()(ids)[0])


def test_the_folder_is_a_finished_runs_without_its_training(folder, source):
    run = Run.read(folder)
    assert run.model == source.run.model
    assert run.optimizer == source.run.optimizer
    scored = {"evals.json", "scores"}  # what evaluate leaves, wherever it ran before
    found = {p.name for p in folder.iterdir()} - scored
    files = {"run.json", "train.log", "checkpoints", "artifact.bin", "score.py", "ledger.json"}
    files |= {"seal.json"}
    assert found == files
    parts, state = checkpoint.load(folder / "checkpoints" / "step_000000")
    expected = source.model.transformer.state_dict()
    assert parts["model"].keys() == expected.keys()
    assert all(torch.equal(parts["model"][name], tensor) for name, tensor in expected.items())
    assert state["fingerprint"] == run.fingerprint
    assert state["imported"]["weights"] == "weights.safetensors"


def test_plan_reads_the_folder(system, folder, source):
    out = recurgolf("plan", folder, cwd=folder).finished().out
    count = sum(p.numel() for p in source.model.transformer.parameters())
    assert f"{count:,}" in out
    if system != "baseline":
        return  # what follows does not depend on the system
    smaller = recurgolf("plan", folder, "quant=int6", cwd=folder).finished().out
    assert model_bytes(smaller) < 0.7 * model_bytes(out)
    refused = recurgolf("plan", folder, "model.dim=3", cwd=folder).refused()
    assert "plan FOLDER takes overrides of quant, looping and eval" in refused


def model_bytes(table):
    line = next(line for line in table.splitlines() if line.strip().startswith("model file"))
    return int(line.split()[-1].replace(",", ""))


def test_a_quantizer_may_be_chosen_at_once(tmp_path):
    exact, small = tmp_path / "exact", tmp_path / "small"
    command("baseline", exact).finished()
    eight_bits = ["quant=parameter_golf_baseline", "quant.keep_float_max_numel=0"]
    command("baseline", small, *eight_bits).finished()
    sizes = [(path / "artifact.bin").stat().st_size for path in (exact, small)]
    assert sizes[1] < 0.4 * sizes[0]
    recurgolf("evaluate", small, cwd=tmp_path).finished()


def torch_file(path, content):
    torch.save(content, path)
    return path


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_what_cannot_be_imported_is_said_and_leaves_nothing(tmp_path):
    weights, config = files_of("baseline")
    folder = tmp_path / "imported"

    def refused(*overrides, system="baseline", **files):
        arguments = [files.get("weights", weights), files.get("config", config), folder]
        ended = recurgolf("import", system, *arguments, *DATA, *overrides, cwd=tmp_path)
        assert not folder.exists()
        assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".imported")]
        return ended.refused()

    assert "no such system (did you mean 'baseline'?)" in refused(system="base_line")
    assert "nothing.safetensors: no such file" in refused(weights="nothing.safetensors")
    assert "nothing.json: no such file" in refused(config="nothing.json")
    assert "no JSON" in refused(config=weights)
    (tmp_path / "list.json").write_text("[1]")
    assert "holds a list" in refused(config=tmp_path / "list.json")
    harmful = torch_file(tmp_path / "code.pt", {"tok_emb.weight": Harmful(tmp_path / "ran")})
    assert "no plain state dict (it asks for getattr, and code" in refused(weights=harmful)
    assert not (tmp_path / "ran").exists()
    tensors = load_file(weights)
    tensors.pop("tok_emb.weight")
    save_file(tensors, tmp_path / "part.safetensors")
    assert "'tok_emb.weight'" in refused(weights=tmp_path / "part.safetensors")
    assert "no such folder" in refused("data.path=/nowhere")
    settings = json.loads(config.read_text())["hyperparameters"]
    size = settings["vocab_size"]
    (tmp_path / "wide.json").write_text(json.dumps(settings | {"vocab_size": 2 * size}))
    message = refused(config=tmp_path / "wide.json")
    assert str(size) in message and str(2 * size) in message
    assert "no key 'rnk'" in refused("lora.rnk=3")


def test_a_folder_in_use_is_refused_and_stays(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep")
    assert "is not empty" in command("baseline", folder).refused()
    assert (folder / "notes.txt").read_text() == "keep"
