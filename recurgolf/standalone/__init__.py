"""The program that `recurgolf export` packs: a run that trains and scores itself, alone."""
