"""The code that counts against the budget: what a Run needs of this package, as one program."""
