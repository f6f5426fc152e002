"""Adapters as files that people exchange: low-rank corrections of a frozen base.

An adapter is a folder that the `peft` library reads (files.py has the layout). `load` checks it
against a Run and puts it on a model, `merge` writes it into the weights, `blend` makes one of
several; `recurgolf adapters` does the same with run folders.
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
