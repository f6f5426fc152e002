"""A low-rank adapter for every document, trained on the document's own chunks, score first.

Each document begins with the model as it is in the file, is read in chunks, and its adapter takes a
step on every chunk that has been scored; nothing crosses documents. Many documents are read side by
side: their adapters are rows of one batched tensor, and each sees its own document alone.

With `warm`, A starts where the documents before have left it (the mean over the batch just read)
and B at zero. Batches are runs of neighbouring documents, so that all of A comes from earlier text;
documents side by side start with the same A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurgolf.config import Checked, ConfigError
from recurgolf.eval.protocol import ScoredModel
from recurgolf.eval.text import ScoreAccumulator, Text
from recurgolf.limits import at_least, not_empty
from recurgolf.looping import LoopPlan, Visit

BETAS = (0.9, 0.999)
EPS = 1e-6
"""Above the rounding noise of a gradient that is zero: with less, Adam would turn noise into whole
steps, and scores would depend on how many documents or ranks happen to work side by side."""

Site = tuple[int, str]
"""Block and projection that an adapter sits on; all visits of the block share it."""


@dataclass
class DocumentLora(Checked):
    """The adapters of documents and how they learn (AdamW)."""

    rank: Annotated[int, at_least(1)] = 8
    """Rank of the two factors of every correction."""
    alpha: float | None = None
    """Scale is alpha / rank; null: 1."""
    targets: Annotated[list[str], not_empty] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Projections of the blocks, named as in lora.targets; each block takes those that it has."""
    lr: Annotated[float, at_least(0)] = 0.001
    """AdamW's rate."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """AdamW's decoupled decay."""
    steps: Annotated[int, at_least(1)] = 1
    """Gradient steps per chunk."""
    chunk_tokens: Annotated[int, at_least(1)] = 64
    """Targets between two steps."""
    warm: bool = False
    """Keep A from document to document."""
    seed: int = 0
    """Of A's first values, U(+-1/sqrt(in))."""

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def sites(self, model: Any) -> dict[Site, tuple[int, int]]:
        """Where adapters sit in a model (its configuration), with (in_dim, out_dim).

        Raises:
            ConfigError: a target that no block has, or a rank above its smaller side.
        """
        found: dict[Site, tuple[int, int]] = {}
        for target in self.targets:
            having = [b for b in range(model.num_blocks) if target in model.projections(b)]
            if not having:
                known = {name for b in range(model.num_blocks) for name in model.projections(b)}
                raise ConfigError(
                    f"eval.adapter.targets: no block has a projection {target!r}; there are "
                    f"{', '.join(sorted(known))}"
                )
            found.update({(block, target): model.projections(block)[target] for block in having})
        limit = min(min(shape) for shape in found.values())
        if self.rank > limit:
            raise ConfigError(
                f"eval.adapter.rank={self.rank} exceeds the smaller side {limit} of a projection"
            )
        return found

    def first_a(self, sites: Mapping[Site, tuple[int, int]]) -> dict[Site, Tensor]:
        """A as the first document finds it: [rank, in] per site, the same on every machine."""
        chance = torch.Generator().manual_seed(self.seed)
        return {
            site: (torch.rand(self.rank, in_dim, generator=chance) * 2 - 1) / math.sqrt(in_dim)
            for site, (in_dim, _) in sites.items()
        }


class RowLowRank:
    """The delta of one projection, another one for every row of the batch."""

    __slots__ = ("a", "b", "own", "scale")

    def __init__(self, a: Tensor, b: Tensor, scale: float, own: Callable[[Tensor], Tensor] | None):
        self.a, self.b, self.scale, self.own = a, b, scale, own

    def __call__(self, x: Tensor) -> Tensor:
        low = torch.bmm(x, self.a.to(x.dtype).transpose(1, 2))
        delta = torch.bmm(low, self.b.to(x.dtype).transpose(1, 2)) * self.scale
        return delta if self.own is None else delta + self.own(x)


class RowAdapters(nn.Module):
    """Stands in for a model's adapters: its own, and those of the documents in the batch.

    Attributes:
        a, b: per site [rows, rank, in] and [rows, out, rank].
    """

    def __init__(self, own: Any, scale: float):
        super().__init__()
        self.own, self.scale = own, scale
        self.a: dict[Site, Tensor] = {}
        self.b: dict[Site, Tensor] = {}

    def of_visit(self, visit: Visit) -> Mapping[str, Callable[[Tensor], Tensor]]:
        own: dict[str, Callable[[Tensor], Tensor]] = {}
        if self.own is not None:
            own.update(self.own.of_visit(visit))
        for block, target in self.a:
            if block == visit.block:
                a, b = self.a[block, target], self.b[block, target]
                own[target] = RowLowRank(a, b, self.scale, own.get(target))
        return own


@contextmanager
def row_adapters(model: Any, scale: float) -> Iterator[RowAdapters]:
    """A model with adapters per row inside; afterwards with its own again."""
    before = model.adapters
    model.adapters = RowAdapters(before, scale)
    try:
        yield model.adapters
    finally:
        model.adapters = before


class Readers:
    """Documents that are read side by side, each with its adapter and its optimizer state."""

    def __init__(
        self,
        how: DocumentLora,
        scored_model: ScoredModel,
        plan: LoopPlan,
        base: float | None,
        adapters: RowAdapters,
        start_a: Mapping[Site, Tensor],
        sites: Mapping[Site, tuple[int, int]],
    ):
        self.how, self.scored_model, self.plan, self.base = how, scored_model, plan, base
        self.adapters, self.start_a, self.sites = adapters, start_a, sites

    def read(
        self, text: Text, accumulator: ScoreAccumulator, spans: list[tuple[int, int]], length: int
    ) -> dict[Site, Tensor]:
        """Score documents, given as ranges of targets; the sum over them of the A they end with."""
        how, device = self.how, self.scored_model.device
        ended = {site: torch.zeros_like(a, dtype=torch.float64) for site, a in self.start_a.items()}
        if not spans:
            return ended
        weights = self._fresh(len(spans))
        moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
        taken = 0
        for chunk in range(max(-(-(stop - first) // how.chunk_tokens) for first, stop in spans)):
            begin, end = chunk * how.chunk_tokens, (chunk + 1) * how.chunk_tokens
            left = max(0, end - length)
            # Rows whose document has ended are dropped; shorter ones are padded behind their end.
            goes_on = torch.tensor([stop - first > end for first, stop in spans], device=device)
            ids, real = _rows(text, spans, left, begin, end)
            ids, real = ids.to(device), real.to(device)
            learns = bool(goes_on.any())
            for step in range(how.steps if learns else 1):
                self._place(weights)
                with torch.set_grad_enabled(learns):
                    nats = self._nats(ids, begin - left)
                    means = (nats * real).sum(dim=1) / real.sum(dim=1)
                    loss = (means * goes_on).sum()
                if step == 0:
                    for (first, stop), row in zip(spans, nats.detach().cpu(), strict=True):
                        accumulator.add(first + begin, row[: min(stop - first, end) - begin])
                    # A document that has ended keeps its A; momentum would carry it on.
                    for site, a in zip(self.sites, weights[: len(self.sites)], strict=True):
                        ended[site] += a.detach()[~goes_on].double().sum(dim=0)
                if learns:
                    taken += 1
                    _adamw_(weights, torch.autograd.grad(loss, weights), moments, taken, how)
            if not goes_on.all():
                spans = [span for span, stays in zip(spans, goes_on.tolist(), strict=True) if stays]
                weights = [w.detach()[goes_on].requires_grad_(True) for w in weights]
                moments = [(m[goes_on], v[goes_on]) for m, v in moments]
        return ended

    def _fresh(self, rows: int) -> list[Tensor]:
        """A of every site, then B of every site, with a row per document."""
        device = self.scored_model.device
        a = [self.start_a[site].to(device).expand(rows, -1, -1).clone() for site in self.sites]
        b = [torch.zeros(rows, out, self.how.rank, device=device) for _, out in self.sites.values()]
        return [weight.requires_grad_(True) for weight in (*a, *b)]

    def _place(self, weights: list[Tensor]) -> None:
        half = len(self.sites)
        self.adapters.a = dict(zip(self.sites, weights[:half], strict=True))
        self.adapters.b = dict(zip(self.sites, weights[half:], strict=True))

    def _nats(self, ids: Tensor, first: int) -> Tensor:
        hidden = self.scored_model.hidden(ids[:, :-1], self.plan, first=first, base=self.base)
        logits = self.scored_model.model.logits(hidden).float()
        targets = ids[:, first + 1 :]
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def _rows(
    text: Text, spans: list[tuple[int, int]], left: int, begin: int, end: int
) -> tuple[Tensor, Tensor]:
    """Tokens `left` to `end` of every document [b, end - left + 1], zeros behind its last one, and
    which of its targets `begin` to `end` - 1 are real, as 0 or 1 [b, end - begin]."""
    ids = torch.zeros(len(spans), end - left + 1, dtype=torch.int64)
    real = torch.zeros(len(spans), end - begin)
    for row, (first, stop) in enumerate(spans):
        own = text.ids(first + left, min(stop, first + end) + 1)
        ids[row, : len(own)] = own
        real[row, : min(stop - first, end) - begin] = 1
    return ids, real


@torch.no_grad()
def _adamw_(
    weights: list[Tensor],
    gradients: tuple[Tensor, ...],
    moments: list[tuple[Tensor, Tensor]],
    step: int,
    how: DocumentLora,
) -> None:
    """AdamW (1711.05101) in place; every row for itself, all having taken equally many steps."""
    for weight, gradient, (mean, square) in zip(weights, gradients, moments, strict=True):
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        slope = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
        weight.mul_(1 - how.lr * how.weight_decay)
        weight.addcdiv_(mean, slope, value=-how.lr / (1 - BETAS[0] ** step))
