"""The network: one transformer whose parts (block, mixer, MLP, skips, embedding) are options."""

from recurgolf.config import import_modules

MODULES = import_modules(__name__)
