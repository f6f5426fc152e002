"""Scoring protocols, and what they share.

    result = score(SlidingEval(stride=64), ScoredModel(model, looping, seq_len), text)

`ScoredModel` is a model as protocols see it, `Text` what is scored, `ScoreAccumulator` where the
scores go, `Score` what comes out. A protocol is one class with `@option("eval", kind)` in a module
below.
"""

from importlib import import_module
from pkgutil import iter_modules

from recurgolf.eval.protocol import (
    AllReduce,
    Eval,
    Progress,
    ScoredModel,
    Window,
    batches,
    documents_of,
    score,
)
from recurgolf.eval.text import ByteTable, Score, ScoreAccumulator, Text

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

from recurgolf.eval.windows import PlainEval, SlidingEval  # noqa: E402

__all__ = [
    "AllReduce",
    "ByteTable",
    "Eval",
    "PlainEval",
    "Progress",
    "Score",
    "ScoreAccumulator",
    "ScoredModel",
    "SlidingEval",
    "Text",
    "Window",
    "batches",
    "documents_of",
    "score",
]
