"""`python -m recurgolf` is the same as `recurgolf`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # Modules beside the place where this is typed must not stand in for those that we import.
        sys.path.append(sys.path.pop(0))
    from recurgolf.cli import main

    main()
