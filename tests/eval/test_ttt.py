"""What every kind of test-time training promises: order, restoration, ranks, and documents."""

import copy
import dataclasses
import threading

import numpy as np
import pytest
import torch
from per_target import PerTarget

import recurgolf
from recurgolf.config import REGISTRY, ConfigError, kind_of
from recurgolf.data import ByteCount
from recurgolf.eval import Eval, RankShare, Score, ScoredModel, Text, score
from recurgolf.eval.ttt import DocumentLoraEval, PhasedEval, ReconstructEval, SgdEval
from recurgolf.eval.ttt.descent import Descent
from recurgolf.eval.ttt.row_adapters import DocumentLora
from recurgolf.looping import CycleLooping
from recurgolf.lora import LoRA
from recurgolf.model.transformer import Model

LENGTH, VOCAB = 16, 40
DESCENT = Descent(lr=0.5, batch_sequences=3, epochs=2)
ADAPTER = DocumentLora(rank=2, lr=0.05, chunk_tokens=5, targets=["q_proj", "up_proj"])

PROTOCOLS: list[Eval] = [
    SgdEval(stride=5, chunk_tokens=32, sgd=DESCENT),
    DocumentLoraEval(batch_documents=3, adapter=ADAPTER),
    DocumentLoraEval(batch_documents=3, adapter=dataclasses.replace(ADAPTER, warm=True, alpha=3.0)),
    PhasedEval(batch_documents=3, adapter=ADAPTER, phases=3, sgd=DESCENT),
    ReconstructEval(stride=5, chunk_tokens=4, lr=0.5),
]
IDS = ["sgd", "document_lora", "warm", "phased", "reconstruct"]
each = pytest.mark.parametrize("protocol", PROTOCOLS, ids=IDS)


def scored_model(mtp_heads: int = 0) -> ScoredModel:
    torch.manual_seed(0)
    config = Model(vocab_size=VOCAB, dim=16, num_blocks=2, mtp_heads=mtp_heads, skips="none")
    config.mixer.num_heads, config.mixer.num_kv_heads = 2, 1  # type: ignore[attr-defined]
    looping = CycleLooping(passes=2)
    plan = looping.largest_plan(2)
    model = config.build(plan)
    model.adapters = LoRA(rank=1).build(config.projections, plan)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return ScoredModel(model, looping, LENGTH)


def text(seed: int = 0, num_tokens: int = 150) -> Text:
    """Documents of very different lengths; token 1 begins them."""
    chance = np.random.default_rng(seed)
    tokens = chance.integers(4, VOCAB, num_tokens).astype(np.uint16)
    tokens[[0, 3, 4, 45, 60, 120, 131]] = 1
    return Text(tokens, table(), bos=1)


def table() -> ByteCount:
    no = torch.zeros(VOCAB, dtype=torch.bool)
    return ByteCount(torch.ones(VOCAB, dtype=torch.int16), no, no)


def run(protocol: Eval, whom: ScoredModel, what: Text, **options) -> Score:
    return score(protocol, whom, what, accumulate=PerTarget, **options)


def nats(result: Score) -> np.ndarray:
    assert result.accumulator is not None
    return result.accumulator.target_nats


def test_every_registered_kind_is_tested_here():
    kinds = {kind for kind in REGISTRY["eval"] if kind.startswith("ttt_")}
    assert kinds == {kind_of(protocol) for protocol in PROTOCOLS}


@each
def test_every_target_is_scored_once_and_learning_changes_scores(protocol):
    whom, what = scored_model(), text()
    result = run(protocol, whom, what)
    assert result.accumulator is not None
    assert (result.accumulator.scored == 1).all()
    if isinstance(protocol, SgdEval):
        still = dataclasses.replace(protocol, sgd=dataclasses.replace(DESCENT, lr=0.0))
    elif isinstance(protocol, ReconstructEval):
        still = dataclasses.replace(protocol, lr=0.0)
    else:
        still = dataclasses.replace(protocol, adapter=dataclasses.replace(ADAPTER, lr=0.0))
    moved = np.abs(nats(run(still, whom, what)) - nats(result))
    assert moved.max() > 0.01
    assert moved[:3].max() < 1e-5, "the first targets cannot have been learned from"


@each
@pytest.mark.parametrize(
    "cut",
    [2, 16, 32, 60, 64, 147, *(pytest.param(n, marks=pytest.mark.slow) for n in (15, 31, 59, 100))],
)
def test_no_score_depends_on_a_later_token(protocol, cut):
    whom, what = scored_model(), text()
    changed = what.tokens.copy()
    ordinary = np.flatnonzero(changed[cut + 2 :] != 1) + cut + 2
    changed[ordinary] = (changed[ordinary] - 4 + 7) % (VOCAB - 4) + 4
    before, after = (
        run(protocol, whom, what),
        run(protocol, whom, dataclasses.replace(what, tokens=changed)),
    )
    np.testing.assert_array_equal(nats(before)[: cut + 1], nats(after)[: cut + 1])
    if cut + 2 < len(changed):
        assert np.abs(nats(before) - nats(after)).max() > 0.01


@each
def test_the_model_is_bit_for_bit_what_it_was(protocol):
    whom = scored_model()
    whom.model.train()
    state = {name: value.clone() for name, value in whom.model.state_dict().items()}
    adapters, modules = whom.model.adapters, [id(m) for m in whom.model.modules()]
    first, again = run(protocol, whom, text()), run(protocol, whom, text())
    after = whom.model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert whom.model.adapters is adapters and whom.model.training
    assert [id(m) for m in whom.model.modules()] == modules
    assert all(p.requires_grad and p.grad is None for p in whom.model.parameters())
    np.testing.assert_array_equal(nats(first), nats(again))


@each
def test_the_model_is_restored_when_scoring_fails(protocol):
    whom, what = scored_model(), text()
    state = {name: value.clone() for name, value in whom.model.state_dict().items()}
    broken = dataclasses.replace(what, byte_count=_Broken())
    with pytest.raises(RuntimeError, match="on purpose"):
        run(protocol, whom, broken)
    after = whom.model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)


class _Broken:
    """A table that gives up in the middle of the text."""

    def __init__(self) -> None:
        self.calls = 0

    def count(self, targets: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 4:
            raise RuntimeError("on purpose")
        return torch.ones_like(targets)


@each
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_ranks_score_as_one(protocol, ranks):
    alone = run(protocol, scored_model(), text())
    shares = in_threads(protocol, ranks)
    for share in shares:
        assert share.tokens == alone.tokens == text().num_targets
        assert share.nats == pytest.approx(alone.nats, rel=1e-6)
        assert share.nats == shares[0].nats
        np.testing.assert_allclose(nats(share), nats(alone), atol=2e-5)


def in_threads(protocol: Eval, ranks: int) -> list[Score]:
    """The protocol on several ranks of this process, which add up through a barrier."""
    barrier, held, results = threading.Barrier(ranks, timeout=60), {}, {}

    def one(rank: int) -> None:
        def all_reduce(value: torch.Tensor) -> torch.Tensor:
            held[rank] = value.clone()
            barrier.wait()
            total = torch.stack([held[r] for r in range(ranks)]).sum(dim=0)
            barrier.wait()
            return total

        share = RankShare(rank, ranks, all_reduce)
        results[rank] = run(protocol, subjects[rank], text(), share=share)

    first = scored_model()
    subjects = [dataclasses.replace(first, model=copy.deepcopy(first.model)) for _ in range(ranks)]
    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(ranks)]


@each
def test_extra_heads_change_nothing(protocol):
    """The recorded system trains them at test time, which costs it 0.2 ln V in the loss."""
    plain, extended = scored_model(), scored_model(mtp_heads=2)
    shared = {n: v for n, v in extended.model.state_dict().items() if not n.startswith("mtp.")}
    plain.model.load_state_dict(shared)
    np.testing.assert_array_equal(
        nats(run(protocol, plain, text())), nats(run(protocol, extended, text()))
    )


@pytest.mark.parametrize("at", range(4))
def test_a_document_by_itself_costs_what_it_costs_in_company(at):
    """Padding, the batch and neighbours are not felt."""
    protocol, whom, what = PROTOCOLS[1], scored_model(), text()
    together = nats(run(protocol, whom, what))
    starts = [*what.starts.tolist(), what.num_targets]
    first, stop = starts[at + 1], starts[at + 2]
    alone = dataclasses.replace(what, tokens=what.tokens[first : stop + 1])
    np.testing.assert_allclose(nats(run(protocol, whom, alone)), together[first:stop], atol=2e-5)


def test_document_lora_takes_the_steps_of_a_plain_loop():
    """Against torch's AdamW on one document, with the deltas added to the weights themselves."""
    whom = scored_model()
    whom.model.adapters = None
    how = dataclasses.replace(ADAPTER, weight_decay=0.1, alpha=4.0, targets=["v_proj"])
    tokens = text().tokens[60:100]
    what = Text(tokens, table(), bos=1)
    found = nats(run(DocumentLoraEval(adapter=how), whom, what))
    sites = how.sites(whom.model.config)
    a = {s: v.clone().requires_grad_() for s, v in how.first_a(sites).items()}
    b = {s: torch.zeros(out, 2, requires_grad=True) for s, (_, out) in sites.items()}
    optimizer = torch.optim.AdamW([*a.values(), *b.values()], lr=how.lr, weight_decay=0.1, eps=1e-6)
    ids, wanted = torch.from_numpy(tokens.astype(np.int64)), []
    names = {(block, "v_proj"): f"blocks.{block}.mixer.v_proj.weight" for block in range(2)}
    fixed = {name: p.detach() for name, p in whom.model.named_parameters()}
    for begin in range(0, 39, 5):
        end = min(begin + 5, 39)
        left = max(0, begin + 5 - LENGTH)
        changed = {names[s]: fixed[names[s]] + how.scale * b[s] @ a[s] for s in sites}
        logits = torch.func.functional_call(
            whom.model, {**fixed, **changed}, (ids[left:end][None], whom.plan())
        )[0, begin - left :]
        losses = torch.nn.functional.cross_entropy(
            logits, ids[begin + 1 : end + 1], reduction="none"
        )
        wanted += losses.tolist()
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_warm_adapters_begin_where_earlier_documents_ended():
    whom, what = scored_model(), text()
    reset, warm = (nats(run(protocol, whom, what)) for protocol in PROTOCOLS[1:3])
    scale = dataclasses.replace(PROTOCOLS[1], adapter=dataclasses.replace(ADAPTER, alpha=3.0))
    reset = nats(run(scale, whom, what))
    first_batch = what.starts[3]
    np.testing.assert_allclose(warm[:first_batch], reset[:first_batch], atol=1e-6)
    assert np.abs(warm[first_batch:] - reset[first_batch:]).max() > 1e-3


def test_phases_without_global_descent_are_documents_alone():
    whom, what = scored_model(), text()
    still = dataclasses.replace(PROTOCOLS[3], sgd=dataclasses.replace(DESCENT, lr=0.0))
    np.testing.assert_allclose(
        nats(run(still, whom, what)), nats(run(PROTOCOLS[1], whom, what)), atol=2e-5
    )


def test_only_chosen_parameters_learn():
    whom, what = scored_model(), text()
    gains = dataclasses.replace(DESCENT, train=["blocks.*_scale"], freeze=["blocks.1.*"])
    only = SgdEval(stride=5, chunk_tokens=32, sgd=gains)
    names = [name for name, _ in whom.model.named_parameters()]
    assert gains.chosen(names) == ["blocks.0.mixer_scale", "blocks.0.mlp_scale"]
    plain = SgdEval(stride=5, chunk_tokens=32, sgd=dataclasses.replace(gains, lr=0.0))
    assert np.abs(nats(run(only, whom, what)) - nats(run(plain, whom, what))).max() > 1e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval=ttt_sgd eval.sgd.train=[blocks.*.attention]", "no parameter is called"),
        ("eval=ttt_sgd eval.sgd.freeze=[*]", "leaves no parameter"),
        ("eval=ttt_sgd eval.sgd.epochs=0", "eval.sgd.epochs=0: at least 1"),
        ("eval=ttt_document_lora eval.adapter.targets=[query]", "no block has a projection"),
        ("eval=ttt_document_lora eval.adapter.rank=999", "exceeds the smaller side"),
        ("eval=ttt_reconstruct eval.blocks=[9]", "eval.blocks=\\[9\\]"),
        ("eval=ttt_phased eval.phases=0", "eval.phases=0"),
    ],
)
def test_what_cannot_be_is_refused_while_composing(override, message):
    with pytest.raises(ConfigError, match=message):
        recurgolf.compose(["experiment=smoke", *override.split()])


@pytest.mark.parametrize(("length", "stride"), [(8, 3), (8, 5), (8, 7), (8, 8), (16, 5), (16, 9)])
@pytest.mark.parametrize("targets", [16, 32, 48, 149])
def test_universal_rank1_learns_between_windows_of_at_least_a_stride(length, stride, targets):
    """Its rule, window by window: too short a window is dropped, with targets that it had alone."""
    whole = targets - targets % length
    scored, chunk_of, chunk = [0] * targets, {}, 2 * length
    for start in range(0, whole, stride):
        end = min(start + length, whole)
        if start > 0 and end - start < stride:
            continue
        first = start if start == 0 else start + max(end - start - stride, 0)
        chunk_of[start] = first // chunk
        for target in range(first, end):
            scored[target] += 1
    protocol = SgdEval(
        seq_len=length,
        stride=stride,
        whole_windows=True,
        compat_rescore_tail=True,
        chunk_tokens=chunk,
        sgd=DESCENT,
    )
    what = text(num_tokens=targets + 1) if targets > 131 else cut(text(), targets + 1)
    result = run(protocol, scored_model(), what)
    assert result.accumulator is not None
    assert result.accumulator.scored.tolist() == scored
    if (length, stride, targets) == (8, 3, 16):
        assert sum(scored) == 20
    found = {w.start: number for number, ws in protocol.chunks(what, length) for w in ws}
    assert found == chunk_of


def cut(what: Text, num_tokens: int) -> Text:
    return dataclasses.replace(what, tokens=what.tokens[:num_tokens])


def test_chunks_shorter_than_a_window_are_refused():
    with pytest.raises(ConfigError, match=r"eval.chunk_tokens=8 holds no training row"):
        run(SgdEval(chunk_tokens=8), scored_model(), text())


def test_a_rate_that_diverges_is_named():
    with pytest.raises(ConfigError, match=r"lower eval\.sgd\.lr"):
        wild = Descent(lr=1e30, clip=0.0, epochs=5)
        run(
            SgdEval(chunk_tokens=16, sgd=dataclasses.replace(wild, clip=1e30)),
            scored_model(),
            text(),
        )
