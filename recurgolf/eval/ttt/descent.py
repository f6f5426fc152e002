"""Gradient descent on text that has been scored: SGD with momentum, the same on every rank."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from recurgolf.config import Checked, ConfigError
from recurgolf.eval.protocol import ALONE, ScoredModel, Share
from recurgolf.eval.text import Text
from recurgolf.limits import at_least
from recurgolf.looping import Looping, LoopPlan

EXTRA_HEADS = "mtp."
"""Parameters of training's extra heads: never in the loss, never changed, not in the artifact."""


@dataclass
class Descent(Checked):
    """How weights learn from text that has been scored. Momentum is kept from chunk to chunk."""

    lr: Annotated[float, at_least(0)] = 0.005
    """Rate of SGD, at the first chunk where `cosine`."""
    momentum: Annotated[float, at_least(0, below=1)] = 0.9
    """SGD's momentum; 0: none."""
    epochs: Annotated[int, at_least(1)] = 1
    """How often each chunk is gone through."""
    clip: Annotated[float, at_least(0)] = 1.0
    """Largest norm of the gradient over all trained parameters; 0: any."""
    batch_sequences: Annotated[int, at_least(1)] = 32
    """Rows per step, over all ranks."""
    cosine: bool = True
    """Let the rate fall from chunk to chunk, to zero at the last; false: keep it."""
    train: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of parameter names that learn, as in `blocks.*.mlp.*`."""
    freeze: list[str] = field(default_factory=list)
    """Patterns of those among them that do not."""

    def check_model(self, model: Any, looping: Looping) -> None:
        """Refuse patterns that no parameter has, before the model exists."""
        with torch.device("meta"):
            built = model.build(looping.largest_plan(model.num_blocks))
        names = [name for name, _ in built.named_parameters()]
        # The adapters are not the model's own; theirs are looked at when they exist.
        names += ["adapters.banks"]
        self.chosen(names, lenient="adapters")

    def chosen(self, names: Iterable[str], lenient: str | None = None) -> list[str]:
        """The names that learn.

        Args:
            lenient: patterns that begin so may match nothing.

        Raises:
            ConfigError: a pattern that matches nothing, or nothing left to learn.
        """
        names = [name for name in names if not name.startswith(EXTRA_HEADS)]
        for key, patterns in (("train", self.train), ("freeze", self.freeze)):
            for pattern in patterns:
                if lenient and pattern.startswith(lenient):
                    continue
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ConfigError(
                        f"eval.sgd.{key}: no parameter is called {pattern!r}; there are "
                        f"{', '.join(names[:3])}, ..., {names[-1]}"
                    )
        found = [name for name in names if _any(name, self.train) and not _any(name, self.freeze)]
        if not found:
            raise ConfigError(
                f"eval.sgd.train={self.train} without eval.sgd.freeze={self.freeze} leaves no "
                "parameter that learns"
            )
        return found

    def rate(self, chunk: int, num_chunks: int) -> float:
        """The learning rate behind chunk number `chunk`."""
        if not self.cosine:
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * chunk / max(num_chunks - 1, 1)))


@contextlib.contextmanager
def borrowed(model: nn.Module, names: Sequence[str] = ()) -> Iterator[list[nn.Parameter]]:
    """The named parameters to be changed inside; afterwards the model is as it was, bit for bit.

    Gradients are switched on for them alone, whatever surrounds the block.
    """
    own = dict(model.named_parameters())
    chosen = [own[name] for name in names]
    before = [parameter.detach().clone() for parameter in chosen]
    wanted = [parameter.requires_grad for parameter in own.values()]
    gradients = [parameter.grad for parameter in own.values()]
    for parameter in own.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield chosen
    finally:
        with torch.no_grad():
            for parameter, value in zip(chosen, before, strict=True):
                parameter.copy_(value)
        for parameter, flag, grad in zip(own.values(), wanted, gradients, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = grad


class Learner:
    """The descent itself.

    Args:
        parameters: those that learn, from `borrowed`.
        base: of the rotary positions, see ScoredModel.
    """

    def __init__(
        self,
        how: Descent,
        scored_model: ScoredModel,
        plan: LoopPlan,
        parameters: Sequence[nn.Parameter],
        *,
        base: float | None = None,
        rows_at_once: int = 32,
        share: Share = ALONE,
    ):
        self.how, self.scored_model, self.plan, self.base = how, scored_model, plan, base
        self.parameters = list(parameters)
        self.rows_at_once = max(1, rows_at_once)
        self.share = share
        self.optimizer = torch.optim.SGD(self.parameters, lr=how.lr, momentum=how.momentum)

    def learn(self, text: Text, first: int, stop: int, length: int, rate: float) -> None:
        """Go through the targets `first` to `stop - 1` in rows of `length`, the rest left out."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        count = (stop - first) // length
        ids = text.ids(first, first + count * length + 1)
        inputs, targets = ids[:-1].view(count, length), ids[1:].view(count, length)
        for _ in range(self.how.epochs):
            for start in range(0, count, self.how.batch_sequences):
                rows = slice(start, start + self.how.batch_sequences)
                self.step(inputs[rows], targets[rows])

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One step on the mean loss of rows [b, t], of which every rank takes its share."""
        count = len(inputs)
        first, stop = self.share.of(count)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            for start in range(first, stop, self.rows_at_once):
                rows = slice(start, min(start + self.rows_at_once, stop))
                tokens = inputs[rows].to(self.scored_model.device)
                hidden = self.scored_model.hidden(tokens, self.plan, base=self.base)
                loss = self.scored_model.model.main_loss(hidden, targets[rows].to(hidden.device))
                (loss * (len(tokens) / count)).backward()
        self._add_up_gradients()
        if self.how.clip > 0:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.how.clip)
            if not torch.isfinite(norm):
                raise ConfigError(
                    f"test-time training diverged (gradient of norm {norm}): lower "
                    f"eval.sgd.lr={self.how.lr}"
                )
        self.optimizer.step()

    def _add_up_gradients(self) -> None:
        """The sum over ranks; every rank makes the same call, whether or not it had rows."""
        if self.share.all_reduce is None:
            return
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        whole = self.share.all_reduce(torch.cat([part.reshape(-1) for part in parts]))
        for parameter, part in zip(
            self.parameters, whole.split([p.numel() for p in self.parameters]), strict=True
        ):
            parameter.grad = part.view_as(parameter).to(parameter.dtype).clone()


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
