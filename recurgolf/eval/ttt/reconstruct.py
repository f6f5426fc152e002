"""In-place reconstruction by the MLPs: test-time training without labels, parallel_recurrent's.

A window is read in chunks. Behind each chunk every chosen block's down projection W takes one step
towards giving back the chunk's final states h (normed, n of them) from its own hidden layer z:

    z = activation(up(h)),   W <- W - lr (z W^T - h)^T z / n

No target enters, and h belongs to inputs that precede all later targets. The weights are the
file's again at the start of every window.

What a plain implementation spends most on is spared: windows are read side by side, each with its
own W; a chunk's forward ends where the chunk ends; the last visit and the head compute only the
positions that are read; nothing is computed behind the last scored chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurgolf.config import ConfigError, option
from recurgolf.eval.protocol import ALONE, Progress, ScoredModel, Share, Window, batches
from recurgolf.eval.text import ScoreAccumulator, Text
from recurgolf.eval.ttt.descent import borrowed
from recurgolf.eval.windows import SlidingEval
from recurgolf.limits import at_least
from recurgolf.looping import Looping, LoopPlan
from recurgolf.model.norm import rms_norm


@option("eval", "ttt_reconstruct")
@dataclass
class ReconstructEval(SlidingEval):
    """Sliding windows; inside of each the MLPs learn, chunk by chunk, to reproduce the states."""

    chunk_tokens: Annotated[int, at_least(1)] = 64
    """Inputs between two steps."""
    lr: Annotated[float, at_least(0)] = 0.01
    """Rate of plain gradient descent."""
    blocks: list[int] | None = None
    """Blocks whose MLP learns; null: all."""

    def check_model(self, model: Any, looping: Looping) -> None:
        super().check_model(model, looping)
        wrong = [b for b in self.blocks or [] if not 0 <= b < model.num_blocks]
        if wrong:
            raise ConfigError(f"eval.blocks={wrong}: the model's are 0 to {model.num_blocks - 1}")

    def run(
        self,
        scored_model: ScoredModel,
        text: Text,
        accumulator: ScoreAccumulator,
        *,
        share: Share = ALONE,
        progress: Progress | None = None,
    ) -> None:
        length = self.seq_len or scored_model.seq_len
        plan, base = scored_model.plan(self.passes), self.base(scored_model)
        total = sum(1 for _ in self.windows(text, length))
        part, done = share.of(total), 0
        mine = islice(self.windows(text, length), *part)
        for batch in batches(mine, max(1, self.batch_tokens // length)):
            ids = torch.stack([text.ids(w.start, w.stop + 1) for w in batch]).to(
                scored_model.device
            )
            for offset, nats in self.scores(scored_model, ids, batch[0], plan, base):
                for window, row in zip(batch, nats.cpu(), strict=True):
                    accumulator.add(window.start + offset, row)
            done += len(batch)
            if progress is not None:
                progress(done, part[1] - part[0])

    @torch.no_grad()
    def scores(
        self,
        scored_model: ScoredModel,
        ids: Tensor,
        window: Window,
        plan: LoopPlan,
        base: float | None,
    ) -> Iterator[tuple[int, Tensor]]:
        """(offset in the window, nats [b, k]) of every chunk that scores, in order.

        Args:
            ids: tokens [b, t + 1] of windows shaped like `window`.
        """
        model, length = scored_model.model, window.stop - window.start
        learning = range(len(model.blocks)) if self.blocks is None else self.blocks
        with own_down_projections(model, learning) as rows:
            for start in range(0, length, self.chunk_tokens):
                stop = min(start + self.chunk_tokens, length)
                hidden = scored_model.hidden(ids[:, :stop], plan, first=start, base=base)
                first = max(start, window.first - window.start)
                if first < stop:
                    logits = model.logits(hidden[:, first - start :]).float()
                    targets = ids[:, first + 1 : stop + 1]
                    yield first, F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
                if stop < length:
                    wanted = rms_norm(hidden, model.config.norm_eps)
                    for block, own in rows.items():
                        own.learn_(model.blocks[block].mlp, wanted, self.lr)


class RowProjection(nn.Module):
    """A linear layer with a weight for every row of the batch, from the first step on.

    Args:
        weight: shared by all rows until then [out, in]; never changed.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.shared = weight.detach()
        self.own: Tensor | None = None
        self.read: Tensor | None = None

    def forward(self, x: Tensor, adapter: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        self.read = x
        if self.own is None:
            y = F.linear(x, self.shared.to(x.dtype))
        else:
            y = torch.bmm(x, self.own.to(x.dtype).transpose(1, 2))
        return y if adapter is None else y + adapter(x).to(y.dtype)

    def learn_(self, mlp: nn.Module, states: Tensor, lr: float) -> None:
        """One step towards `states` [b, n, d] from the hidden layer that `mlp` makes of them."""
        error = mlp(states, {}) - states
        hidden = self.read
        assert hidden is not None
        if self.own is None:
            self.own = self.shared.expand(len(states), -1, -1).clone()
        self.own.baddbmm_(
            error.to(self.own.dtype).transpose(1, 2),
            hidden.to(self.own.dtype),
            alpha=-lr / states.shape[1],
        )


@contextlib.contextmanager
def own_down_projections(model: Any, blocks: Any) -> Iterator[dict[int, RowProjection]]:
    """Some blocks' MLPs with a RowProjection in place of their last layer, inside."""
    before = {block: model.blocks[block].mlp.down_proj for block in blocks}
    rows = {block: RowProjection(layer.weight) for block, layer in before.items()}
    try:
        with borrowed(model):
            for block, own in rows.items():
                model.blocks[block].mlp.down_proj = own
            yield rows
    finally:
        for block, layer in before.items():
            model.blocks[block].mlp.down_proj = layer
