"""recurgolf adapters: folders in, folders out, as a user types it."""

import json

import pytest
import torch
from command_line import recurgolf
from smoke_runs import train

from recurgolf import adapters
from recurgolf.artifact import load
from recurgolf.artifact.score import rebuild
from recurgolf.training.base import read_finished

EXACT = ("quant=none", "quant.keep_dtype=float32")


def verb(*arguments, cwd):
    return recurgolf("adapters", *map(str, arguments), cwd=cwd)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The adapters of the smoke run, which has one pair for each of two visits."""
    folder = tmp_path_factory.mktemp("verb") / "adapter"
    ended = verb("save", train().path, folder, cwd=folder.parent).finished()
    assert "16 pairs for single iterations, rank 1" in ended.out
    return folder


def logits_of(folder):
    """Of a run folder's file, on some tokens."""
    scorable = rebuild(load(folder / "artifact.bin"))
    tokens = torch.randint(0, 512, (2, 30), generator=torch.Generator().manual_seed(3))
    plan = scorable.looping.eval_plan(scorable.model.config.num_blocks)
    with torch.no_grad():
        return scorable.model(tokens, plan)


def test_adapters_put_back_on_their_run_give_the_same_file_and_score(saved, tmp_path):
    run = train()
    verb("load", run.path, saved, tmp_path / "again", cwd=tmp_path).finished()
    assert torch.equal(logits_of(tmp_path / "again"), logits_of(run.path))
    ended = recurgolf("evaluate", tmp_path / "again", "--json", cwd=tmp_path).finished()
    (score,) = json.loads(ended.out.splitlines()[-1]).values()
    assert score["val_bpb"] == run.summary["val_bpb"]


def test_untied_and_merged_run_gives_the_logits_of_the_looped_one(saved, tmp_path):
    run = train()
    message = verb("merge", run.path, saved, tmp_path / "no", cwd=tmp_path).refused()
    assert "share one weight" in message and "--untie" in message
    assert not (tmp_path / "no").exists()
    arguments = ("merge", "--untie", run.path, saved, tmp_path / "flat", *EXACT)
    verb(*arguments, cwd=tmp_path).finished()
    found = read_finished(tmp_path / "flat")
    assert found.run.plan(1.0).blocks == (0, 1, 2, 3) and found.run.lora.rank == 0
    looped = read_finished(run.path)
    tokens = torch.randint(0, 512, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = looped.model()(tokens, looped.run.eval_plan)
    torch.testing.assert_close(logits_of(tmp_path / "flat"), expected, atol=1e-5, rtol=0)


def test_blend_with_weights_is_written_as_one_adapter(saved, tmp_path):
    ended = verb("blend", saved, saved, tmp_path / "both", "--weights", "0.75,0.5", cwd=tmp_path)
    assert "rank 2" in ended.finished().out
    one, both = adapters.read(saved), adapters.read(tmp_path / "both")
    assert both.base == one.base
    for place, factors in one.factors.items():
        torch.testing.assert_close(
            both.factors[place].delta(), 1.25 * factors.delta(), atol=1e-6, rtol=1e-5
        )


def test_what_cannot_be_is_refused_before_anything_is_written(saved, tmp_path):
    run, other = train().path, train("lora=none", "averaging=ema").path
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    dest = tmp_path / "dest"
    for arguments, message in (
        (("load", other, saved, dest), "these are other weights than it was trained on"),
        (("load", run, tmp_path, dest), "is not an adapter folder"),
        (("load", run, saved, tmp_path / "full"), "is not empty"),
        (("load", run, saved, dest, "model.dim=3"), "takes overrides of quant and data"),
        (("save", other, dest), "has no adapters to save"),
        (("save", tmp_path, dest), "is not a run folder"),
        (("blend", saved, dest, "--weights", "1,2"), "2 weights for 1 adapters"),
        (("blend", saved, dest, "--weights", "much"), "expected numbers"),
    ):
        assert message in verb(*arguments, cwd=tmp_path).refused()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
