"""Every way of cheating that the audit looks for is planted here, and caught."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from command_line import recurgolf
from smoke_runs import train

from recurgolf.audit import prediction_checks, validation_text
from recurgolf.audit.accounts import ValidationText, byte_check, separation_check
from recurgolf.audit.separation import shared_documents
from recurgolf.budget import Budget
from recurgolf.data import ByteCount
from recurgolf.data.shards import write_shard
from recurgolf.eval import PlainEval, ScoredModel, SlidingEval, Text
from recurgolf.eval.ttt import SgdEval
from recurgolf.eval.ttt.descent import Descent, Learner, borrowed
from recurgolf.looping import CycleLooping
from recurgolf.model.transformer import Model, Transformer
from recurgolf.run import Run

VOCAB, LENGTH = 40, 16


def model() -> Transformer:
    torch.manual_seed(0)
    config = Model(vocab_size=VOCAB, dim=16, num_blocks=2)
    config.mixer.num_heads, config.mixer.num_kv_heads = 2, 1  # type: ignore[attr-defined]
    built = config.build(CycleLooping(passes=2).largest_plan(2))
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built


def audited(protocol, network=None, vocab: int = VOCAB) -> dict[str, str]:
    """Check -> verdict of checks 1 to 4."""
    chance = np.random.default_rng(0)
    tokens = chance.integers(4, VOCAB, 400).astype(np.uint16)
    tokens[[0, 60, 65, 200, 290]] = 1
    table = ByteCount(torch.ones(VOCAB, dtype=torch.int16), *[torch.zeros(VOCAB, dtype=bool)] * 2)
    scored_model = ScoredModel(network or model(), CycleLooping(passes=2), LENGTH)
    checks = prediction_checks([protocol], scored_model, Text(tokens, table, bos=1))
    assert all("\n" not in check.line and check.line for check in checks)
    return {check.name: check.verdict for check in checks}


HONEST = dict.fromkeys(("causality", "normalised", "score_before_update", "single_pass"), "pass")


class SeesAhead(torch.nn.Module):
    """A model that mixes a little of a later position into every state."""

    def __init__(self, distance: int, share: float):
        super().__init__()
        self.inner, self.distance, self.share = model(), distance, share
        self.config = self.inner.config

    def hidden(self, tokens, plan, documents=None, read_from=0, rope_base=None):
        states = self.inner.hidden(tokens, plan, documents)
        ahead = states.roll(-self.distance, dims=1)
        ahead[:, -self.distance :] = states[:, -self.distance :]
        return ((1 - self.share) * states + self.share * ahead)[:, read_from:]

    def logits(self, hidden):
        return self.inner.logits(hidden)


@pytest.mark.parametrize("share", [0.5, 1e-3])
@pytest.mark.parametrize("protocol", [PlainEval(), SlidingEval(stride=8)], ids=["plain", "sliding"])
def test_a_model_that_sees_the_future(protocol, share):
    found = audited(protocol, SeesAhead(2, share))
    assert found["causality"] == found["score_before_update"] == "fail"


def test_a_model_that_sees_its_target():
    """No later token is needed for that; the target itself, exchanged, gives it away."""
    assert audited(PlainEval(), SeesAhead(1, 0.1)) == {**HONEST, "normalised": "fail"}


class Wrapped(ScoredModel):
    """A scored_model whose scores are changed on their way out."""

    def nats(self, *args, **kwargs):
        return self.change(super().nats(*args, **kwargs))


def changing(change):
    @dataclasses.dataclass
    class Changed(SlidingEval):
        def run(self, scored_model, text, accumulator, **options):
            wrapped = Wrapped(scored_model.model, scored_model.looping, scored_model.seq_len)
            wrapped.change = change
            super().run(wrapped, text, accumulator, **options)

    return Changed(stride=4)


@pytest.mark.parametrize(
    "change",
    [
        # A second expert that gives a twentieth to whatever the target is, as hashed caches do.
        lambda nats: -torch.log(torch.exp(-nats) * 0.98 + 0.05),
        lambda nats: nats - 0.01,
        # Too little is wrong as well: these are no probabilities either.
        lambda nats: nats + 0.01,
    ],
    ids=["unnormalised mixture", "a discount", "a surcharge"],
)
def test_probabilities_that_do_not_sum_to_one(change):
    assert audited(changing(change)) == {**HONEST, "normalised": "fail"}


def test_an_honest_mixture_passes():
    assert (
        audited(changing(lambda nats: -torch.log(torch.exp(-nats) * 0.9 + 0.1 / VOCAB))) == HONEST
    )


@dataclasses.dataclass
class AdaptsFirst(SgdEval):
    """Trains on every chunk and scores it then."""

    def run(self, scored_model, text, accumulator, **options):
        plan, length = scored_model.plan(), scored_model.seq_len
        names = [name for name, _ in scored_model.model.named_parameters()]
        with borrowed(scored_model.model, names) as parameters:
            learner = Learner(self.sgd, scored_model, plan, parameters)
            for chunk, windows in self.chunks(text, length):
                start = chunk * self.chunk_tokens
                stop = min(start + self.chunk_tokens, text.num_targets)
                learner.learn(text, start, stop, length, self.sgd.lr)
                for window in windows:
                    ids = text.ids(window.start, window.stop + 1)[None]
                    with torch.no_grad():
                        nats = scored_model.nats(ids, window.first - window.start, plan)
                    accumulator.add(window.first, nats[0])


def test_adapting_before_scoring():
    found = audited(AdaptsFirst(stride=8, chunk_tokens=32, sgd=Descent(lr=0.005)))
    assert found["score_before_update"] == found["causality"] == "fail"
    honest = SgdEval(stride=8, chunk_tokens=32, sgd=Descent(lr=0.005))
    assert audited(honest) == HONEST


@dataclasses.dataclass
class BestOfTwo(PlainEval):
    """Scores with one pass and with two, and keeps the better of both for every target."""

    secretly: bool = False

    def run(self, scored_model, text, accumulator, **options):
        if self.secretly:
            for window in self.windows(text, scored_model.seq_len):
                ids = text.ids(window.start, window.stop + 1)[None]
                both = [
                    scored_model.nats(ids, 0, scored_model.plan(passes))[0] for passes in (1, 2)
                ]
                accumulator.add(window.first, torch.minimum(*both))
            return
        for passes in (1, 2):
            for window in self.windows(text, scored_model.seq_len):
                ids = text.ids(window.start, window.stop + 1)[None]
                accumulator.add(
                    window.first, scored_model.nats(ids, 0, scored_model.plan(passes))[0]
                )


def test_best_of_two_passes():
    assert audited(BestOfTwo())["single_pass"] == "fail"
    # Entered once, it shows in the mass that the better of two predictions has.
    assert audited(BestOfTwo(secretly=True)) == {**HONEST, "normalised": "fail"}


def test_a_second_reading_after_learning_from_the_first():
    @dataclasses.dataclass
    class Twice(SgdEval):
        def run(self, scored_model, text, accumulator, **options):
            names = [name for name, _ in scored_model.model.named_parameters()]
            with borrowed(scored_model.model, names) as parameters:
                learner = Learner(self.sgd, scored_model, scored_model.plan(), parameters)
                learner.learn(text, 0, text.num_targets, scored_model.seq_len, self.sgd.lr)
                with torch.no_grad():
                    SlidingEval(stride=4).run(scored_model, text, accumulator)

    found = audited(Twice(chunk_tokens=32, sgd=Descent(lr=0.1)))
    assert found["causality"] == found["score_before_update"] == "fail"


def test_a_tail_that_is_scored_twice():
    found = audited(SlidingEval(stride=4, compat_rescore_tail=True))
    assert found["single_pass"] == "fail"


def test_scoring_from_right_to_left():
    class Backwards(PlainEval):
        def run(self, scored_model, text, accumulator, **options):
            for window in reversed(list(self.windows(text, scored_model.seq_len))):
                ids = text.ids(window.start, window.stop + 1)[None]
                accumulator.add(window.first, scored_model.nats(ids, 0, scored_model.plan())[0])

    assert audited(Backwards()) == {**HONEST, "single_pass": "fail"}


def validation() -> ValidationText:
    return validation_text(Run.read(train().path).data.prepare())


def test_the_honest_byte_count_passes():
    found = byte_check(validation(), train().summary["evals"])
    assert (found.verdict, found.number) == ("pass", 0)


def test_a_space_that_is_counted_twice():
    text = validation()
    table = text.byte_count
    double = ByteCount(
        table.base_bytes + table.has_leading_space.to(torch.int16),
        table.has_leading_space,
        table.is_boundary,
    )
    found = byte_check(dataclasses.replace(text, byte_count=double), {})
    assert found.verdict == "fail"
    spaces = table.total(text.tokens) - ByteCount(
        table.base_bytes, torch.zeros_like(table.has_leading_space), table.is_boundary
    ).total(text.tokens)
    assert found.number is not None and found.number >= spaces > 0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"tokens": 10**9, "bytes": 10}, "targets of"),
        ({"tokens": 10, "bytes": 10**9}, "divided by"),
    ],
)
def test_totals_that_the_text_does_not_have(entry, message):
    found = byte_check(validation(), {"sliding": entry})
    assert found.verdict == "fail" and message in found.line


def test_a_manifest_and_public_totals_that_do_not_fit():
    text = dataclasses.replace(validation(), entry={"tokens_val": 3, "docs_val": 30})
    assert "tokens_val=3" in byte_check(text, {}).line
    public = dataclasses.replace(validation(), name="fineweb10B_sp1024", documents=50_000)
    found = byte_check(public, {})
    assert found.verdict == "fail" and "151,080,891" in found.line


def leaked(tmp_path, change, at: int = 3):
    """What is found when a validation document stands, changed, in the middle of training."""
    dataset = Run.read(train().path).data.prepare()
    tokens, bos = dataset.validation_tokens(), dataset.tokenizer.bos_id
    starts = np.flatnonzero(tokens == bos)
    document = tokens[starts[at] : starts[at + 1]]
    assert len(document) > 60
    training = np.concatenate([np.fromfile(p, "<u2")[512:] for p in dataset.train_shards])
    cut = np.flatnonzero(training == bos)[50]
    stream = np.concatenate((training[:cut], change(document.copy()), training[cut:]))
    # The document straddles two shards.
    middle = int(cut) + 20
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path, part in zip(paths, (stream[:middle], stream[middle:]), strict=True):
        write_shard(path, part.astype(np.uint16))
    return shared_documents(tokens, paths, bos), tokens, bos, at


def every_tenth(document: np.ndarray) -> np.ndarray:
    """One word in about every forty exchanged."""
    document[20::40] = document[5]
    return document


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda document: document, "exact"),
        (every_tenth, "near"),
        (lambda document: np.concatenate((document, document[5:40])), "near"),
    ],
    ids=["the same", "words exchanged", "longer"],
)
def test_a_validation_document_in_training(tmp_path, change, kind):
    shared, tokens, bos, at = leaked(tmp_path, change)
    assert (len(shared.exact), len(shared.near)) == ((1, 0) if kind == "exact" else (0, 1))
    assert shared.exact.get(50, shared.near.get(50, (None,))) in (at, shared.near.get(50))
    check = separation_check(shared, [], tokens, bos)
    assert check.verdict == "fail" and check.number == 1


def test_training_without_it_passes():
    dataset = Run.read(train().path).data.prepare()
    tokens, bos = dataset.validation_tokens(), dataset.tokenizer.bos_id
    shared = shared_documents(tokens, dataset.train_shards, bos)
    assert shared.val_documents == dataset.val_documents and shared.train_documents > 200
    rows = [dataset.train_shards and np.fromfile(dataset.train_shards[0], "<u2")[600:700]]
    assert separation_check(shared, rows, tokens, bos).verdict == "pass"


def test_calibration_on_validation_text():
    dataset = Run.read(train().path).data.prepare()
    tokens, bos = dataset.validation_tokens(), dataset.tokenizer.bos_id
    shared = shared_documents(tokens, [], bos)
    found = separation_check(shared, [tokens[100:164]], tokens, bos)
    assert found.verdict == "fail" and "1 of 1 calibration rows" in found.line


def edited(tmp_path, **changes):
    """A copy of a finished run whose ledger of clocks says something else."""
    folder = tmp_path / "run"
    shutil.copytree(train().path, folder)
    summary = json.loads((folder / "summary.json").read_text())
    summary["seconds"].update(changes)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def limits_of(folder):
    from recurgolf.audit.finished_run import _limits, _read

    return _limits(Run.read(folder), folder, _read(folder / "summary.json"))


def test_an_honest_ledger_passes(tmp_path):
    found = limits_of(edited(tmp_path))
    assert found.verdict == "pass" and found.number is not None and 0 < found.number < 1


def test_calibration_behind_the_clock(tmp_path):
    run = Run.read(train().path)
    cap = run.budget.train_seconds
    assert cap is not None
    assert limits_of(edited(tmp_path / "on", training=cap - 9, calibration=5.0)).verdict == "pass"
    late = limits_of(edited(tmp_path / "late", training=cap, calibration=5.0))
    assert late.verdict == "fail" and "calibration 5.0" in late.line


def test_training_beyond_its_cap(tmp_path):
    cap = Run.read(train().path).budget.train_seconds
    assert cap is not None
    assert limits_of(edited(tmp_path, training=cap + 30)).verdict == "fail"


def test_an_artifact_over_the_budget_or_exchanged_since(tmp_path):
    folder = edited(tmp_path)
    with (folder / "artifact.bin").open("ab") as file:
        file.write(bytes(10))
    found = limits_of(folder)
    assert found.verdict == "fail" and "summary.json says" in found.line
    data = json.loads((folder / "run.json").read_text())
    data["budget"]["artifact_bytes"] = 1000
    (folder / "run.json").write_text(json.dumps(data))
    assert Budget(artifact_bytes=1000) and "over the budget" in limits_of(folder).line


def test_the_command_says_so_and_ends_with_1(tmp_path):
    folder = edited(tmp_path, training=1e6)
    ended = recurgolf("audit", folder, cwd=tmp_path)
    assert ended.code == 1, (ended.out, ended.err)
    assert "failed: limits" in ended.out
    written = json.loads((folder / "audit.json").read_text())
    assert not written["passed"] and written["checks"]["limits"]["verdict"] == "fail"
