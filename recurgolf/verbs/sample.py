"""recurgolf sample: let a model go on with a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recurgolf.loaded import load
from recurgolf.verbs import add_trust, parser_of


def main(arguments: Sequence[str]) -> int:
    """Let the model of a run, exported or imported folder go on with a text."""
    parser = parser_of("sample", main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of the run")
    parser.add_argument(
        "prompt", nargs="?", default="", help="how the text begins (default: a new document)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token"
    )
    parser.add_argument("--top-k", type=int, help="of so many likeliest tokens (default: all)")
    parser.add_argument("--tokens", type=int, default=100, help="how many at most")
    parser.add_argument("--passes", type=int, help="of the looped blocks (default: as in scoring)")
    parser.add_argument("--seed", type=int, default=0, help="the same one gives the same text")
    parser.add_argument("--label", action="store_true", help="say first what this is")
    add_trust(parser)
    asked = parser.parse_intermixed_args(arguments)
    loaded = load(asked.folder, asked.trust)
    text = loaded.sample(
        asked.prompt,
        temperature=asked.temperature,
        top_k=asked.top_k,
        tokens=asked.tokens,
        passes=asked.passes,
        seed=asked.seed,
    )
    if asked.label:
        print(
            f"\na sample of {loaded.source}, begun with {asked.prompt!r} "
            f"(temperature {asked.temperature:g}, seed {asked.seed}):\n"
        )
    print(text)
    return 0
