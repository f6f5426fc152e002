"""`recurgolf evaluate` as it is typed: whose options count, and what is kept under which name."""

import dataclasses
import json
import shutil
import tracemalloc

import numpy as np
import pytest
from command_line import recurgolf
from scored_models import stream, toy
from smoke_runs import train

from recurgolf import compose
from recurgolf.composing import compose_parts
from recurgolf.eval import PlainEval, SlidingEval, Text, score
from recurgolf.eval.several import named_protocols, settings_of
from recurgolf.looping import CycleLooping
from recurgolf.run import Run


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(train(attempt=1).path, tmp_path / "run")


def evaluated(folder, *asked) -> dict:
    ended = recurgolf("evaluate", folder, *asked, "--json", cwd=folder.parent).finished()
    return json.loads(ended.out)


def test_options_are_checked_against_the_runs_own_model(folder):
    """The default run, in which options are composed, has fewer blocks than the one asked for."""
    run = Run.read(folder)
    assert compose([]).model.num_blocks < 12
    deep = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, num_blocks=12),
        looping=CycleLooping(passes=2),
    )
    asked = compose_parts(deep, ["eval=ttt_reconstruct", "eval.blocks=[11]"])
    assert asked.eval.blocks == [11]  # type: ignore[attr-defined]
    assert asked.model == deep.model and asked.looping == deep.looping
    message = recurgolf(
        "evaluate", folder, "eval=ttt_reconstruct", "eval.blocks=[11]", cwd=folder.parent
    ).refused()
    assert f"the model's are 0 to {run.model.num_blocks - 1}" in message


def test_data_of_another_kind_has_the_artifacts_vocabulary(folder):
    run = Run.read(folder)
    dataset = run.data.prepare()
    tokenizer = dataset.tokenizer.path
    data = ["data=shards", f"data.path={dataset.folder}", f"data.tokenizer={tokenizer}"]
    again, own = evaluated(folder, *data), evaluated(folder)
    assert run.data.vocab_size == 512
    assert again["plain"]["val_bpb"] == own["plain"]["val_bpb"]


def test_the_same_evaluation_is_kept_once_and_another_beside_it(folder):
    def kept() -> set[str]:
        return set(json.loads((folder / "summary.json").read_text())["evals"])

    assert kept() == {"plain"}
    evaluated(folder, "eval=sliding")
    evaluated(folder, "eval=sliding", "eval.stride=32", "eval.seq_len=64")
    assert kept() == {"plain", "sliding"}
    found = evaluated(folder, "eval=sliding", "eval.stride=64", "eval=plain", "eval.seq_len=32")
    assert list(found) == ["sliding", "plain"]
    assert kept() == {"plain", "sliding", "sliding/stride=64", "plain/seq_len=32"}
    evaluated(folder, "eval=early_exit", "eval.passes=2", "eval.thresholds=[]")
    evaluated(folder, "eval=early_exit", "eval.passes=3", "eval.thresholds=[]")
    assert {"early_exit/passes=1", "early_exit/passes=3/passes=1"} <= kept()
    assert len(list((folder / "scores").glob("*.npz"))) == len(kept())


def test_per_document_scores_add_up_to_the_entry_in_the_order_of_the_text(folder):
    found = evaluated(folder, "eval=document", "eval=ttt_sgd", "eval.chunk_tokens=512")
    dataset = Run.read(folder).data.prepare()
    tokens = dataset.validation_tokens()
    starts = np.flatnonzero(tokens == dataset.tokenizer.bos_id)
    lengths = np.diff([*starts, len(tokens) - 1])
    for name, entry in found.items():
        kept = np.load(folder / "scores" / f"{name}.npz")
        assert str(kept["text"]) == dataset.fingerprint
        assert json.loads(str(kept["protocol"]))["kind"] == name
        assert kept["tokens"].tolist() == lengths.tolist()
        texts = dataset.tokenizer.decode(np.split(tokens, starts[1:]))
        assert kept["bytes"].tolist() == [len(text.encode()) for text in texts]
        assert kept["nats"].sum() / kept["tokens"].sum() == pytest.approx(
            entry["val_loss"], rel=1e-12
        )


def test_settings_are_written_out_however_they_were_asked_for():
    short, long = SlidingEval(), SlidingEval(seq_len=64, stride=32)
    (found,) = named_protocols([short, long], seq_len=64).values()
    assert settings_of(found)["stride"] == 32
    names = list(named_protocols([SlidingEval(stride=8), short, PlainEval(seq_len=16)], 64))
    assert names == ["sliding", "sliding/stride=32", "plain"]


def test_one_chunk_in_which_nothing_is_learned_is_named(folder):
    asked = ("eval=ttt_sgd", "eval.stride=64")
    shown = recurgolf("evaluate", folder, *asked, cwd=folder.parent).finished().out
    assert "ttt_sgd: eval.chunk_tokens=32768 holds the whole text, so nothing is learned" in shown
    shown = recurgolf("evaluate", folder, *asked, "eval.chunk_tokens=512", cwd=folder).finished()
    assert "nothing is learned" not in shown.out


def test_audit_looks_at_what_evaluate_has_scored_by_since(folder):
    evaluated(folder, "eval=ttt_sgd", "eval.chunk_tokens=512", "eval.passes=[1]")
    ended = recurgolf("audit", folder, "--positions", "1", "--json", cwd=folder.parent).finished()
    found = json.loads(ended.out)
    assert found["passed"] and found["protocols"] == ["plain", "ttt_sgd"]


def test_memory_does_not_grow_with_the_text(tmp_path):
    """A text on disk, eight times as long: nothing but its documents' sums may add up."""

    def peak(num_tokens: int) -> int:
        stream(num_tokens).tokens.tofile(tmp_path / "tokens")
        mapped = np.memmap(tmp_path / "tokens", dtype=np.uint16, mode="r")
        text = Text(mapped, stream(9).byte_count)
        tracemalloc.start()
        try:
            score(SlidingEval(stride=4, batch_tokens=64), toy(), text)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    assert peak(16_000) < 1.2 * peak(2_000)
