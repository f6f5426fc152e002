"""The program `recurgolf`, and `python -m recurgolf`, which is the same."""

import sys


def main() -> None:
    """The command line; Ctrl-C while it is still being imported ends it quietly as well."""
    try:
        from recurgolf.cli import main as command_line
    except KeyboardInterrupt:
        sys.exit(130)
    command_line()


if __name__ == "__main__":
    if not sys.flags.safe_path:
        # Modules beside the place where this is typed must not stand in for those that we import.
        sys.path.append(sys.path.pop(0))
    main()
