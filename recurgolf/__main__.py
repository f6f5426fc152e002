"""`python -m recurgolf` is the same as `recurgolf`."""

from recurgolf.cli import main

if __name__ == "__main__":
    main()
