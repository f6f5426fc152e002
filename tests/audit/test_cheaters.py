"""What a protocol or its model may not know, planted and caught by measuring from outside."""

import dataclasses

import numpy as np
import pytest
import torch

from recurgolf.audit.finished_run import sums_that_do_not_follow
from recurgolf.audit.prediction import prediction_checks
from recurgolf.audit.scorer import Hints, LocalScorer
from recurgolf.data import ByteCount
from recurgolf.eval import PlainEval, ScoreAccumulator, ScoredModel, SlidingEval, Text
from recurgolf.eval.ttt import SgdEval
from recurgolf.eval.ttt.descent import Descent, Learner, borrowed
from recurgolf.looping import CycleLooping
from recurgolf.model.transformer import Model, Transformer

VOCAB, LENGTH, TOKENS = 40, 16, 3600


def model() -> Transformer:
    torch.manual_seed(0)
    config = Model(vocab_size=VOCAB, dim=16, num_blocks=2)
    config.mixer.num_heads, config.mixer.num_kv_heads = 2, 1  # type: ignore[attr-defined]
    built = config.build(CycleLooping(passes=2).largest_plan(2))
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built


def real_text(count: int = TOKENS) -> Text:
    chance = np.random.default_rng(0)
    tokens = chance.integers(4, VOCAB, count).astype(np.uint16)
    tokens[[0, 60, 65, 200, 290, *range(400, count, 90)]] = 1
    table = ByteCount(torch.ones(VOCAB, dtype=torch.int16), *[torch.zeros(VOCAB, dtype=bool)] * 2)
    return Text(tokens, table, bos=1)


def checks_of(
    protocol,
    network=None,
    length: int = LENGTH,
    count: int = TOKENS,
    seed: int = 0,
    scorer=LocalScorer,
):
    """Checks 1 to 4 by name."""
    scored_model = ScoredModel(network or model(), CycleLooping(passes=2), length)
    text = real_text(count)
    scorer = scorer(protocol, scored_model, text)
    checks, _ = prediction_checks(scorer, text, np.random.default_rng(seed), positions=4)
    assert all("\n" not in check.line and check.line for check in checks)
    return {check.name: check for check in checks}


def audited(protocol, network=None, **options) -> dict[str, str]:
    """Check -> verdict of checks 1 to 4."""
    return {name: c.verdict for name, c in checks_of(protocol, network, **options).items()}


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


@pytest.mark.parametrize("share", [pytest.param(0.5, marks=pytest.mark.slow), 1e-3])
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
        pytest.param(lambda nats: nats - 0.01, marks=pytest.mark.slow),
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
    found = audited(AdaptsFirst(stride=8, chunk_tokens=32, sgd=Descent(lr=0.005)), count=300)
    assert found["score_before_update"] == found["causality"] == "fail"
    honest = SgdEval(stride=8, chunk_tokens=32, sgd=Descent(lr=0.005))
    assert audited(honest, count=300) == HONEST


def rows_of(how, scored_model, text):
    """All windows of a protocol, and their tokens as one batch."""
    windows = list(how.windows(text, scored_model.seq_len))
    return windows, torch.stack([text.ids(w.start, w.stop + 1) for w in windows])


@dataclasses.dataclass
class BestOfTwo(PlainEval):
    """Scores with one pass and with two, and keeps the better of both for every target."""

    secretly: bool = False

    def run(self, scored_model, text, accumulator, **options):
        windows, ids = rows_of(self, scored_model, text)
        both = [scored_model.nats(ids, 0, scored_model.plan(passes)) for passes in (1, 2)]
        for nats in [torch.minimum(*both)] if self.secretly else both:
            for window, row in zip(windows, nats, strict=True):
                accumulator.add(window.first, row)


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

    found = audited(Twice(chunk_tokens=32, sgd=Descent(lr=0.1)), count=300)
    assert found["causality"] == found["score_before_update"] == "fail"


def test_a_tail_that_is_scored_twice():
    found = audited(SlidingEval(stride=4, compat_rescore_tail=True))
    assert found["single_pass"] == "fail"


def test_scoring_from_right_to_left():
    class Backwards(PlainEval):
        def run(self, scored_model, text, accumulator, **options):
            windows, ids = rows_of(self, scored_model, text)
            nats = scored_model.nats(ids, 0, scored_model.plan())
            for window, row in reversed(list(zip(windows, nats, strict=True))):
                accumulator.add(window.first, row)

    assert audited(Backwards()) == {**HONEST, "single_pass": "fail"}


class NextBigram(torch.nn.Module):
    """A model with a table over pairs of tokens; the pair is (this, next) where (last, this) is
    allowed."""

    def __init__(self):
        super().__init__()
        self.inner = model()
        self.config = self.inner.config
        self.table = torch.nn.Embedding(97, 16)

    def hidden(self, tokens, plan, documents=None, read_from=0, rope_base=None):
        pairs = tokens * 31 + torch.cat([tokens[:, 1:], tokens[:, -1:]], dim=1)
        states = self.inner.hidden(tokens, plan, documents) + self.table(pairs % 97)
        return states[:, read_from:]

    def logits(self, hidden):
        return self.inner.logits(hidden)


def test_a_bigram_over_the_next_token():
    found = audited(PlainEval(), NextBigram())
    assert found["normalised"] == "fail"


class Smeared(SeesAhead):
    """Takes from the next state, from one row of a window on."""

    def __init__(self, first: int, distance: int = 1):
        super().__init__(distance, 0.5)
        self.first = first

    def hidden(self, tokens, plan, documents=None, read_from=0, rope_base=None):
        honest = self.inner.hidden(tokens, plan, documents)
        cheated = super().hidden(tokens, plan, documents)
        late = torch.arange(tokens.shape[1])[:, None] >= self.first
        return torch.where(late, cheated, honest)[:, read_from:]


@pytest.mark.parametrize("distance", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_leak_that_begins_at_row_56_of_a_window(distance):
    """Of the next token, or (a mask that is off by one more) of the one behind it."""
    found = audited(PlainEval(), Smeared(56, distance), length=64, count=14_000)
    assert found["normalised" if distance == 1 else "causality"] == "fail"


@dataclasses.dataclass
class LeavesOut(PlainEval):
    """Scores no target that costs more than four nats."""

    def run(self, scored_model, text, accumulator, **options):
        for window in self.windows(text, scored_model.seq_len):
            ids = text.ids(window.start, window.stop + 1)[None]
            nats = scored_model.nats(ids, 0, scored_model.plan())[0]
            for offset in torch.nonzero(nats < 4).flatten().tolist():
                accumulator.add(window.first + offset, nats[offset : offset + 1])


def test_targets_that_are_left_out():
    found = checks_of(LeavesOut(), count=300)["single_pass"]
    assert found.verdict == "fail" and "in between, where none may" in found.line


def cheats_when(tell):
    """A protocol that gives every target half a nat when `tell` says that it is not watched."""

    @dataclasses.dataclass
    class Selective(SlidingEval):
        calls = 0

        def run(self, scored_model, text, accumulator, **options):
            type(self).calls += 1
            wrapped = Wrapped(scored_model.model, scored_model.looping, scored_model.seq_len)
            unwatched = tell(self, scored_model, text, accumulator)
            wrapped.change = (lambda nats: nats - 0.5) if unwatched else (lambda nats: nats)
            super().run(wrapped, text, accumulator, **options)

    return Selective(stride=4)


REAL = real_text().tokens


TELLS = {
    "text length": lambda how, model, text, accumulator: text.num_targets == TOKENS - 1,
    "window": lambda how, model, text, accumulator: model.seq_len == LENGTH,
    "repeats": lambda how, model, text, accumulator: not accumulator.repeats,
    "first": lambda how, model, text, accumulator: how.calls == 1,
    "parity": lambda how, model, text, accumulator: how.calls % 2 == 1,
    "text": lambda how, model, text, accumulator: np.array_equal(text.tokens, REAL),
    "last words": lambda how, model, text, accumulator: np.array_equal(text.tokens[-9:], REAL[-9:]),
}


@pytest.mark.parametrize(
    "tell",
    [
        pytest.param(tell, id=name, marks=[] if name in ("first", "text") else pytest.mark.slow)
        for name, tell in TELLS.items()
    ],
)
def test_a_protocol_that_cheats_where_it_thinks_it_is_not_watched(tell):
    assert "fail" in audited(cheats_when(tell)).values()


class AcrossRows(SeesAhead):
    """Takes from the next row of a batch, which goes on where this one ends."""

    def __init__(self):
        super().__init__(1, 0.5)

    def hidden(self, tokens, plan, documents=None, read_from=0, rope_base=None):
        states = self.inner.hidden(tokens, plan, documents)
        return (0.5 * states + 0.5 * states.roll(-1, dims=0))[:, read_from:]


def test_a_model_that_looks_at_the_next_row_of_its_batch():
    assert audited(PlainEval(), AcrossRows())["causality"] == "fail"


def test_a_protocol_that_knows_how_the_text_begins():
    """A few bytes of code are enough to tell the real text's first third, and behind it every
    target is given half a nat. No score depends on what comes later, and wherever the beginning is
    changed the score is honest."""
    known = TOKENS // 3
    tell = lambda how, model, text, _: np.array_equal(text.tokens[:known], REAL[:known])  # noqa: E731

    @dataclasses.dataclass
    class Knows(type(cheats_when(tell))):
        def run(self, scored_model, text, accumulator, **options):
            own = ScoreAccumulator(text)

            class Behind:
                def add(self, first, nats):
                    gain = (torch.arange(first, first + len(nats)) >= known) & told
                    accumulator.add(first, nats - 0.5 * gain)

            told = bool(tell(self, scored_model, text, own))
            SlidingEval(stride=4).run(scored_model, text, Behind(), **options)

    assert audited(Knows(stride=4)) == {**HONEST, "normalised": "fail"}


def test_half_a_nat_for_rare_tokens_alone():
    rare = torch.tensor([4, 5, 6])

    @dataclasses.dataclass
    class Rare(PlainEval):
        def run(self, scored_model, text, accumulator, **options):
            class Given:
                def add(self, first, nats):
                    ids = text.ids(first + 1, first + 1 + len(nats))
                    accumulator.add(first, nats - 0.5 * torch.isin(ids, rare))

            super().run(scored_model, text, Given(), **options)

    assert audited(Rare()) == {**HONEST, "normalised": "fail"}


class Liar(LocalScorer):
    """A plugin that has replaced what the process says of itself: its guesses are chosen so that no
    bet is won, and its window is said to be longer than the text that it leaves out."""

    def guess(self, tokens, starts, offsets):
        shares = np.zeros((*offsets.shape, self.hints.vocab_size), dtype=np.float32)
        shares[..., 4] = 1
        return shares

    @property
    def hints(self):
        return Hints(10**6, 10**6, False, VOCAB, [])


def test_a_process_that_lies_about_itself():
    found = audited(changing(lambda nats: nats - 0.5), scorer=Liar)
    assert found["normalised"] == "fail"

    class LastPart(PlainEval):
        def windows(self, text, seq_len):
            yield from (w for w in super().windows(text, seq_len) if w.first > text.num_targets / 2)

    assert audited(LastPart(), scorer=Liar)["single_pass"] == "fail"


def test_probabilities_too_large_in_a_protocol_that_learns():
    """Copies of a stretch are no trial of it: the bets alone find it."""

    @dataclasses.dataclass
    class Discounted(SgdEval):
        def run(self, scored_model, text, accumulator, **options):
            class Given:
                def __getattr__(self, name):
                    return getattr(accumulator, name)

                def add(self, first, nats):
                    accumulator.add(first, nats - 0.7)

            super().run(scored_model, text, Given(), **options)

    learns = {"stride": 8, "chunk_tokens": 32, "sgd": Descent(lr=0.02)}
    assert audited(Discounted(**learns), count=900) == {**HONEST, "normalised": "fail"}
    assert audited(SgdEval(**learns), count=900) == HONEST


@pytest.mark.parametrize(
    ("sums", "factor"),
    [("nats", 0.5), ("bytes", 2), ("tokens", 2)],
    ids=["nats", "bytes", "tokens"],
)
def test_sums_that_are_changed_behind_honest_targets(sums, factor):
    """What was entered is honest target by target, and what becomes of it is not."""

    @dataclasses.dataclass
    class Reaches(PlainEval):
        def run(self, scored_model, text, accumulator, **options):
            super().run(scored_model, text, accumulator, **options)
            own = getattr(accumulator, sums)
            own[:] = own * factor

    text, seen = real_text(), ScoredModel(model(), CycleLooping(passes=2), LENGTH)
    assert audited(Reaches()) == HONEST
    found = {"it": LocalScorer(Reaches(), seen, text).score(text.tokens)}
    assert f"{sums if sums != 'nats' else 'val_loss'} is" in sums_that_do_not_follow(text, found)[0]
    honest = {"it": LocalScorer(PlainEval(), seen, text).score(text.tokens)}
    assert not sums_that_do_not_follow(text, honest)
