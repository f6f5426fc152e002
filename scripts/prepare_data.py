"""Make tokenizer and shards ahead of time, as `recurgolf` would at its first start.

    python scripts/prepare_data.py --vocab-size 512
    python scripts/prepare_data.py --corpus text --files 'my/**/*.txt'
    python scripts/prepare_data.py --out my_data

The first two fill the cache (RECURGOLF_CACHE), where data=embedded and data=text with the same
settings find it; the third writes the challenge's folder layout, which is trained on with
data=shards data.path=my_data/datasets/NAME.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from recurgolf.config import ConfigError
from recurgolf.data import Dataset, Embedded, FromText, Text, lines
from recurgolf.data.dataset import open_dataset
from recurgolf.data.export import Step, cached_export, export


def main() -> int:
    arguments = _parser().parse_args()
    try:
        data = _option(arguments)
        data.check()
        with _reported() as step:
            dataset = _prepared(data, arguments.out, step)
    except ConfigError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    print(_summary(dataset))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", choices=("embedded", "text"), default="embedded", help="where the text is from")
    add("--vocab-size", type=int, default=1024, help="pieces of the tokenizer (default: 1024)")
    add("--tokenizer", help="a .model or .json to use instead of training one")
    add("--tokenizer-sees-validation", action="store_true", help="train it on all documents")
    add("--shard-tokens", type=int, default=100_000_000, help="tokens per shard")
    add("--out", type=Path, help="write to this new folder instead of the cache")
    text = parser.add_argument_group("--corpus text")
    text.add_argument(
        "--files", default="", help="glob pattern of plain text or .jsonl[.gz|.xz|.bz2|.zst]"
    )
    text.add_argument("--text-field", default="text", help="key of the text in JSONL")
    text.add_argument("--separator", help=r"between documents of a plain text, e.g. '\n\n'")
    text.add_argument("--val-documents", type=int, help="number of validation documents")
    text.add_argument("--val-fraction", type=float, default=0.05, help="or their share (0.05)")
    return parser


def _option(arguments: argparse.Namespace) -> FromText:
    """The data option that `recurgolf data=...` would compose from the same words."""
    common = {
        "vocab_size": arguments.vocab_size,
        "tokenizer": arguments.tokenizer,
        "tokenizer_sees_validation": arguments.tokenizer_sees_validation,
        "shard_tokens": arguments.shard_tokens,
    }
    if arguments.corpus == "embedded":
        if arguments.files:
            raise ConfigError("--files belongs to --corpus text")
        return Embedded(**common)
    return Text(
        files=arguments.files,
        text_field=arguments.text_field,
        separator=arguments.separator,
        val_documents=arguments.val_documents,
        val_fraction=arguments.val_fraction,
        **common,
    )


def _prepared(data: FromText, out: Path | None, step: Step) -> Dataset:
    if out is None:
        cached_export(data.corpus(), data.export_settings(), step)
        return data.prepare()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: it is there already and not an empty folder")
    folder = export(data.corpus(), data.export_settings(), out, step)
    return open_dataset(folder, None, data.vocab_size)


@contextmanager
def _reported() -> Iterator[Step]:
    """A progress bar on a terminal, a line per finished part elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lines(lambda line: print(line, file=sys.stderr, flush=True))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as bars:
        tasks = {}

        def step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield step


def _summary(dataset: Dataset) -> str:
    raw = "unknown" if dataset.val_raw_bytes is None else f"{dataset.val_raw_bytes:,}"
    tokenizer = dataset.tokenizer
    return (
        f"{dataset.folder}\n"
        f"  training    {dataset.train_tokens:>14,} tokens in {len(dataset.train_shards)} shards\n"
        f"  validation  {len(dataset.validation_tokens()):>14,} tokens, {dataset.val_documents:,} "
        f"documents, {dataset.val_bytes:,} bytes ({raw} before normalisation)\n"
        f"  tokenizer   {tokenizer.vocab_size:>14,} pieces ({tokenizer.path.name})\n"
        f"  licence     {dataset.licence or 'not stated'}"
    )


if __name__ == "__main__":
    sys.exit(main())
