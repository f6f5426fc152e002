"""Early exit by pass: each position stops looping when its distribution stops changing."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recurgolf.config import ConfigError, option
from recurgolf.eval.protocol import ALONE, ROWS_AT_ONCE, Progress, ScoredModel, Share, batches
from recurgolf.eval.text import ScoreAccumulator, Text
from recurgolf.eval.windows import Overlapping
from recurgolf.limits import at_least, one_of
from recurgolf.looping import Looping


@option("eval", "early_exit")
@dataclass
class EarlyExitEval(Overlapping):
    """Reads the head after every number of passes and stops, position by position, at the first
    pass whose distribution is close to that of the pass before.

    What is measured is bits per byte against the mean number of passes used (`mean_passes`); a pass
    counts as used when its distribution was looked at. It says nothing of time: all passes are
    computed for all positions, and a position that has stopped is still attended to as it is at the
    depth of the position that looks. The decision reads no target.

    Besides the headline at `threshold`, every one of `thresholds` and every fixed number of passes
    is entered as a variant of the same windows.
    """

    measure: Annotated[str, one_of("kl", "top")] = "kl"
    """kl: divergence of a pass's distribution from that of the pass before, in nats | top: change
    of the probability of the likeliest token."""
    threshold: Annotated[float, at_least(0)] = 0.01
    """Stop where the measure is below this; 0 never stops before the last pass."""
    thresholds: Annotated[list[float], at_least(0)] = field(
        default_factory=lambda: [0.001, 0.003, 0.03, 0.1]
    )
    """Further thresholds, each reported as early_exit/threshold=x."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.passes, list):
            raise ConfigError(
                f"eval.passes={self.passes}: eval=early_exit scores every number of passes up to "
                "one largest; give that number, or null"
            )

    def check_model(self, model: Any, looping: Looping) -> None:
        super().check_model(model, looping)
        depth = max_passes(looping, model.num_blocks, self.passes)
        if depth < 2:
            raise ConfigError(
                f"eval=early_exit chooses among numbers of passes, but this schedule scores with "
                f"{depth}: loop some blocks (looping.passes=2 or more), or give eval.passes"
            )

    def run(
        self,
        scored_model: ScoredModel,
        text: Text,
        accumulator: ScoreAccumulator,
        *,
        share: Share = ALONE,
        progress: Progress | None = None,
    ) -> None:
        length, base = self.seq_len or scored_model.seq_len, self.base(scored_model)
        depth = max_passes(scored_model.looping, scored_model.model.config.num_blocks, self.passes)
        plans = [scored_model.plan(passes) for passes in range(1, depth + 1)]
        total = sum(1 for _ in self.windows(text, length))
        part, done = share.of(total), 0
        mine = islice(self.windows(text, length), *part)
        for batch in batches(mine, max(1, self.batch_tokens // length)):
            first = batch[0].first - batch[0].start
            ids = torch.stack([text.ids(w.start, w.stop + 1) for w in batch]).to(
                scored_model.device
            )
            inputs, targets = ids[:, :-1], ids[:, first + 1 :].reshape(-1)
            states = [scored_model.hidden(inputs, plan, None, first, base) for plan in plans]
            nats, change = self.compared(scored_model.model, states, targets)
            spans = [(w.first, w.stop - w.first) for w in batch]
            self.enter(accumulator, spans, nats.cpu(), change.cpu())
            done += len(batch)
            if progress is not None:
                progress(done, part[1] - part[0])

    def compared(self, model: Any, states: list[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Nats [passes, n] of the targets after every pass, and how far each pass moved.

        Returns:
            Also the measure [passes - 1, n] between a pass and the one before.
        """
        rows = [state.flatten(0, 1) for state in states]
        nats = torch.empty(len(rows), len(targets), device=targets.device)
        change = torch.empty(len(rows) - 1, len(targets), device=targets.device)
        step = ROWS_AT_ONCE[targets.device.type]
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            before: Tensor | None = None
            for number, state in enumerate(rows):
                now = F.log_softmax(model.logits(state[part]).float(), dim=-1)
                nats[number, part] = -now.gather(1, targets[part, None])[:, 0]
                if before is not None:
                    change[number - 1, part] = _MEASURES[self.measure](now, before)
                before = now
        return nats, change

    def enter(
        self,
        accumulator: ScoreAccumulator,
        spans: list[tuple[int, int]],
        nats: Tensor,
        change: Tensor,
    ) -> None:
        """Put the headline and all variants into the accumulator.

        Args:
            spans: (first target, count) of every run of targets in nats and change.
        """
        choices = {"": self.threshold}
        choices |= {f"threshold={value:g}": value for value in self.thresholds}
        last = len(nats) - 1
        used = {
            name: torch.cat([change < value, torch.ones(1, nats.shape[1], dtype=torch.bool)])
            .int()
            .argmax(0)
            .add(1)
            .clamp(max=last)
            for name, value in choices.items()
        }
        used |= {f"passes={n + 1}": torch.full_like(used[""], n) for n in range(last + 1)}
        for name, index in used.items():
            own = accumulator.variant(name) if name else accumulator
            chosen = nats.gather(0, index[None])[0]
            place = 0
            for first, count in spans:
                own.add(first, chosen[place : place + count])
                place += count
            own.add_mean("mean_passes", index + 1)


def max_passes(looping: Looping, num_blocks: int, passes: int | None) -> int:
    """How often a looped block is visited when scoring."""
    return 1 + max(visit.nth for visit in looping.eval_plan(num_blocks, passes).visits)


def _kl(now: Tensor, before: Tensor) -> Tensor:
    """Divergence of `now` from `before`, log-probabilities [n, v] both, in nats."""
    return (now.exp() * (now - before)).sum(-1)


def _top(now: Tensor, before: Tensor) -> Tensor:
    """How much the probability of the token that is likeliest now has changed."""
    best, token = now.max(-1, keepdim=True)
    return (best.exp() - before.gather(1, token).exp()).abs()[:, 0]


_MEASURES = {"kl": _kl, "top": _top}
