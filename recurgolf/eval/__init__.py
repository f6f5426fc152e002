"""Scoring protocols, and what they share.

    result = score(SlidingEval(stride=64), ScoredModel(model, looping, seq_len), text)

`ScoredModel` is a model as protocols see it, `Text` what is scored, `ScoreAccumulator` where the
scores go, `Score` what comes out. A protocol is one class with `@option("eval", kind)` in a module
of this package.
"""

from recurgolf.config import import_modules
from recurgolf.eval.protocol import (
    AllReduce,
    Eval,
    Progress,
    RankShare,
    ScoredModel,
    Share,
    Window,
    batches,
    documents_of,
    score,
)
from recurgolf.eval.text import ByteTable, Score, ScoreAccumulator, Text
from recurgolf.eval.windows import PlainEval, SlidingEval

MODULES = import_modules(__name__)

__all__ = [
    "AllReduce",
    "ByteTable",
    "Eval",
    "PlainEval",
    "Progress",
    "RankShare",
    "Score",
    "ScoreAccumulator",
    "ScoredModel",
    "Share",
    "SlidingEval",
    "Text",
    "Window",
    "batches",
    "documents_of",
    "score",
]
