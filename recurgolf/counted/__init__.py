"""The code that counts: what of this package a Run needs, packed into one program."""
