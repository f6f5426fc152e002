"""What a protocol is: it runs a ScoredModel over a Text and fills a ScoreAccumulator.

A protocol that only reads says which windows it reads and which targets each one scores
(`Eval.windows`); one that learns, or measures something else, has a `run` of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recurgolf.config import Checked, ConfigError, from_dict
from recurgolf.eval.text import Score, ScoreAccumulator, Text
from recurgolf.limits import at_least, one_of
from recurgolf.looping import Looping, LoopPlan
from recurgolf.model.rope import rope_base

ROWS_AT_ONCE = {"cpu": 128, "cuda": 8192}
"""Positions read out together: on a CPU their logits stay in a core's cache."""

LOOK_AHEAD = 16
"""Batches whose windows are sorted by shape, so that ragged ones need no padding."""

Progress = Callable[[int, int], None]
AllReduce = Callable[[Tensor], Tensor]
"""A tensor -> its sum over ranks."""


class Share:
    """Whose part of the work is done here: all of it, by one process.

    Attributes:
        all_reduce: None: nobody adds up, so that a score is that of this part alone.
    """

    all_reduce: Any = None

    def of(self, count: int) -> tuple[int, int]:
        """First of `count` things that is done here, and the first that is not any more."""
        return 0, count

    def complete(self, accumulator: ScoreAccumulator) -> None:
        """Add what the others have done; after that every rank has the whole."""


class RankShare(Share):
    """One rank's part."""

    def __init__(self, rank: int, world_size: int, all_reduce: AllReduce | None = None):
        self.rank, self.world_size, self.all_reduce = rank, world_size, all_reduce

    def of(self, count: int) -> tuple[int, int]:
        return count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size

    def complete(self, accumulator: ScoreAccumulator) -> None:
        if self.all_reduce is not None:
            accumulator.reduce(self.all_reduce)


ALONE = Share()


class Window(NamedTuple):
    """Inputs `start` to `stop - 1` (as positions of the token stream); scored are the targets
    `first` to `stop - 1`, which follow the inputs of the same numbers."""

    start: int
    first: int
    stop: int


@dataclass
class ScoredModel:
    """A model as protocols see it.

    Attributes:
        model: has `hidden(tokens, plan, documents, read_from=, rope_base=)`, `logits(hidden)`
            and `config`, as model.transformer.Transformer.
        looping: its schedule.
        seq_len: length it was trained at.
    """

    model: Any
    looping: Looping
    seq_len: int
    device: torch.device | str = "cpu"

    def plan(self, passes: int | None = None) -> LoopPlan:
        """The visits of a forward; None: as many passes as looping says for scoring."""
        return self.looping.eval_plan(self.model.config.num_blocks, passes)

    def nats(
        self,
        ids: Tensor,
        first: int,
        plan: LoopPlan,
        documents: Tensor | None = None,
        base: float | None = None,
    ) -> Tensor:
        """Negative log-likelihoods, float32 [b, t - first], of targets `first` to t - 1 of a row.

        Args:
            ids: tokens [b, t + 1]: t inputs, and the last target.
            documents: document number of every input [b, t] where nothing may cross documents.
            base: of the rotary positions; None: as the model has it for this length.
        """
        hidden = self.hidden(ids[:, :-1], plan, documents, first, base)
        rows, targets = hidden.flatten(0, 1), ids[:, first + 1 :].reshape(-1)
        found = rows.new_empty(len(rows), dtype=torch.float32)
        step = ROWS_AT_ONCE[rows.device.type]
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            logits = self.model.logits(rows[part]).float()
            found[part] = F.cross_entropy(logits, targets[part], reduction="none")
        return found.view(len(ids), -1)

    def hidden(
        self,
        tokens: Tensor,
        plan: LoopPlan,
        documents: Tensor | None = None,
        first: int = 0,
        base: float | None = None,
    ) -> Tensor:
        """States [b, t - first, d] that the head reads; arguments as in `nats`."""
        return self.model.hidden(tokens, plan, documents, read_from=first, rope_base=base)


@dataclass
class Eval(Checked):
    """A protocol for scoring validation text."""

    seq_len: Annotated[int | None, at_least(1)] = None
    """Tokens per window; null: the training length."""
    batch_tokens: Annotated[int, at_least(1)] = 2048
    """Tokens forwarded at once, at least one window; changes speed and memory, not the score. A CPU
    is fastest where the states stay in its cache, a GPU wants 65536 or more."""
    passes: Any = None
    """Passes of the looped band when scoring; null: as looping says. A list such as [1,2,3] keeps
    that and scores with each of these numbers besides."""
    rope_scale: Annotated[str, one_of("none", "ntk")] = "none"
    """none | ntk: widen the rotary base for windows longer than training, of a model that does not
    do so itself (model.rope.train_len)."""
    also: list[Any] = field(default_factory=list)
    """Further protocols to score the same file by: names, or {kind: sliding, stride: 64}. The
    headline stays that of this one."""
    audit: bool = False
    """Audit the run at its end (audit.json), as `recurgolf audit FOLDER` does."""

    repeats: ClassVar[bool] = False
    """Whether targets are scored more than once."""
    within_documents: ClassVar[bool] = False
    """Whether nothing crosses the start of a document."""

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = self.passes if isinstance(self.passes, list) else [self.passes or 1]
        if not asked or not all(type(n) is int and n > 0 for n in asked) or self.passes == 0:
            raise ConfigError(f"eval.passes={self.passes}: at least 1, or a list of such numbers")
        if self.also:
            self.also = [_protocol(item) for item in self.also]

    @property
    def alone(self) -> Eval:
        """This protocol as it gives the headline."""
        fixed = None if isinstance(self.passes, list) else self.passes
        return replace(self, passes=fixed, also=[], audit=False)

    def check(self, num_targets: int, seq_len: int) -> None:
        """Refuse a text shorter than one window."""
        if num_targets < seq_len:
            raise ConfigError(
                f"validation has {num_targets + 1:,} tokens, less than one window of "
                f"eval.seq_len={seq_len} + 1"
            )

    def check_model(self, model: Any, looping: Looping) -> None:
        """Refuse what a model (its configuration) cannot do, before it exists."""
        asked = self.passes if isinstance(self.passes, list) else [self.passes]
        looping.check_passes(model.num_blocks, [passes for passes in asked if passes])
        if self.rope_scale != "none":
            if not model.head_dims:
                raise ConfigError(f"eval.rope_scale={self.rope_scale}: no block of it attends")
            if model.rope.train_len is not None:
                raise ConfigError(
                    f"eval.rope_scale={self.rope_scale}, but this model widens its base itself "
                    f"beyond model.rope.train_len={model.rope.train_len}: set one of them"
                )
        for other in self.also:
            other.check_model(model, looping)

    def windows(self, text: Text, seq_len: int) -> Iterator[Window]:
        """The windows over a text, in order."""
        raise NotImplementedError

    def base(self, scored_model: ScoredModel) -> float | None:
        """The rotary base for this protocol's windows, the shorter ones among them included."""
        config = scored_model.model.config
        length = self.seq_len or scored_model.seq_len
        if not getattr(config, "head_dims", None):
            return None
        rope, dims = config.rope, config.rope.dims or config.head_dims[-1]
        trained = scored_model.seq_len if self.rope_scale == "ntk" else rope.train_len
        return rope_base(rope.base, dims, length, trained)

    def run(
        self,
        scored_model: ScoredModel,
        text: Text,
        accumulator: ScoreAccumulator,
        *,
        share: Share = ALONE,
        progress: Progress | None = None,
    ) -> None:
        """Score this rank's share of the targets into the accumulator.

        Args:
            progress: called with (units done, units of this rank).
        """
        length = self.seq_len or scored_model.seq_len
        plan, base = scored_model.plan(self.passes), self.base(scored_model)
        # Counted, not kept: a long text has millions of windows.
        total = sum(1 for _ in self.windows(text, length))
        part = share.of(total)
        done, size = 0, max(1, self.batch_tokens // length)
        mine = islice(self.windows(text, length), *part)
        while ahead := list(islice(mine, LOOK_AHEAD * size)):
            found: list[tuple[Window, Tensor]] = []
            for batch in batches(sorted(ahead, key=_shape), size):
                first = batch[0].first - batch[0].start
                ids = torch.stack([text.ids(w.start, w.stop + 1) for w in batch])
                documents = documents_of(text, batch) if self.within_documents else None
                if documents is not None:
                    documents = documents.to(scored_model.device)
                nats = scored_model.nats(ids.to(scored_model.device), first, plan, documents, base)
                found += zip(batch, nats.cpu(), strict=True)
                done += len(batch)
                if progress is not None:
                    progress(done, part[1] - part[0])
            for window, row in sorted(found, key=lambda entry: entry[0].first):
                accumulator.add(window.first, row)


@torch.no_grad()
def score(
    protocol: Eval,
    scored_model: ScoredModel,
    text: Text,
    *,
    share: Share = ALONE,
    progress: Progress | None = None,
    accumulate: type[ScoreAccumulator] = ScoreAccumulator,
) -> Score:
    """Run a protocol; the model is put in evaluation mode meanwhile.

    Args:
        progress: called with (units done, units of this rank).
        accumulate: what the protocol fills; one of another class may keep more than sums.

    Raises:
        ConfigError: a text shorter than a window, a model that the protocol does not fit.
    """
    began = time.perf_counter()
    protocol.check(text.num_targets, protocol.seq_len or scored_model.seq_len)
    accumulator = accumulate(text, repeats=protocol.repeats)
    was_training = scored_model.model.training
    scored_model.model.eval()
    try:
        protocol.run(scored_model, text, accumulator, share=share, progress=progress)
    finally:
        scored_model.model.train(was_training)
    share.complete(accumulator)
    return Score.of(accumulator, time.perf_counter() - began)


def batches(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """Runs of up to `size` windows of one shape."""
    batch: list[Window] = []
    for window in windows:
        if batch and (len(batch) == size or _shape(window) != _shape(batch[0])):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def documents_of(text: Text, batch: list[Window]) -> Tensor | None:
    """Document number of every input [b, t]; None where every window lies in one document."""
    ends = text.document_of([[w.start, w.stop - 1] for w in batch])
    if (ends[:, 0] == ends[:, 1]).all():
        return None
    places = torch.arange(batch[0].stop - batch[0].start) + torch.tensor([[w.start] for w in batch])
    return torch.from_numpy(text.document_of(places.numpy()))


def _shape(window: Window) -> tuple[int, int]:
    return window.stop - window.start, window.first - window.start


def _protocol(item: Any) -> Eval:
    """One of `also`."""
    if isinstance(item, str):
        item = {"kind": item}
    if isinstance(item, dict):
        if "kind" not in item:
            raise ConfigError(
                f"eval.also: {item} says no kind, as in {{kind: sliding, stride: 64}}"
            )
        item = from_dict(Eval, item)
    if not isinstance(item, Eval) or item.also:
        raise ConfigError(f"eval.also: {item!r} is neither a protocol's name nor its options")
    return item
