"""Test-time training: protocols that learn from text they have already scored.

All of them score first: a target's nats are in the accumulator before any weight sees that
target. None trains the extra heads, and afterwards the model is bit for bit what it was.
"""

from recurgolf.config import import_modules
from recurgolf.eval.ttt.document_lora import DocumentLoraEval
from recurgolf.eval.ttt.phased import PhasedEval
from recurgolf.eval.ttt.reconstruct import ReconstructEval
from recurgolf.eval.ttt.sgd import SgdEval

MODULES = import_modules(__name__)

__all__ = ["DocumentLoraEval", "PhasedEval", "ReconstructEval", "SgdEval"]
