"""LoRA adapters as files to share: low-rank corrections of a frozen base model.

An adapter is a folder in `peft`'s layout (see files.py). `load` checks it against a Run and
attaches it to a model, `merge` adds it to the weights, `blend` combines several into one;
`recurgolf adapters` does the same for run folders.
"""

from recurgolf.adapters.adapter import Adapter, Base, Factors, Place, base_of, fingerprint
from recurgolf.adapters.attach import adapter_of, attach, load
from recurgolf.adapters.blend import blend
from recurgolf.adapters.files import read, write
from recurgolf.adapters.merge import merge, untie

__all__ = [
    "Adapter",
    "Base",
    "Factors",
    "Place",
    "adapter_of",
    "attach",
    "base_of",
    "blend",
    "fingerprint",
    "load",
    "merge",
    "read",
    "untie",
    "write",
]
