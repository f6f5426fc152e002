"""Data: text or shards in, a checked `Dataset` out, and the order in which ranks read it.

An option of the group `data` says where the text is from; `prepare` makes tokenizer and shards
once, keeps them in the cache folder (RECURGOLF_CACHE, else ~/.cache/recurgolf) and finds them there
again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any

from recurgolf.config import Checked, ConfigError, import_modules, option
from recurgolf.data.byte_count import ByteCount
from recurgolf.data.corpus import Corpus, embedded_corpus, text_corpus
from recurgolf.data.dataset import Dataset, open_dataset
from recurgolf.data.export import ExportSettings, Step, cached_export
from recurgolf.data.loader import Loader, LoaderConfig, ShuffledConfig
from recurgolf.data.shards import DataError
from recurgolf.data.tokenizer import MAX_VOCAB, Tokenizer
from recurgolf.limits import above, at_least, not_empty

Progress = Callable[[str], None]
"""Called with a line of text when a part of the preparation is done."""


def silent(line: str) -> None:
    """A `Progress` that says nothing."""


@dataclass
class Data(Checked):
    """What to train and score on."""

    vocab_size: Annotated[int, at_least(2, at_most=MAX_VOCAB)] = 1024
    """Pieces of the tokenizer; must be its real number where the tokenizer is given. Tokens are
    uint16."""
    tokenizer: str | None = None
    """A .model (SentencePiece) or .json (pure bytes) file; null: the data's own."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Order of the training tokens; shuffled, where nothing is said."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # The schema's own default must be the common class, else no other kind composes over it.
        if type(self.loader) is LoaderConfig:
            self.loader = ShuffledConfig()

    def check(self) -> None:
        """Refuse what cannot be, without reading any data."""

    def prepare(self, progress: Progress = silent) -> Dataset:
        """Make or find tokenizer and shards, check them, and hand them over.

        Safe in several processes at once; a second call with the same settings is quick.

        Raises:
            DataError: missing or contradictory data; the text says what would be right.
        """
        raise NotImplementedError

    def _tokenizer_path(self) -> Path | None:
        return Path(expanduser(self.tokenizer)) if self.tokenizer else None


@dataclass
class FromText(Data):
    """Tokenizer and shards are made from documents."""

    tokenizer_sees_validation: bool = False
    """Train the tokenizer on all documents, as the challenge's exporter does."""
    shard_tokens: Annotated[int, at_least(1)] = 100_000_000
    """Tokens per shard file."""

    def corpus(self) -> Corpus:
        """The documents."""
        raise NotImplementedError

    def export_settings(self) -> ExportSettings:
        """How they become a data folder."""
        return ExportSettings(
            self.vocab_size,
            self._tokenizer_path(),
            self.tokenizer_sees_validation,
            self.shard_tokens,
        )

    def prepare(self, progress: Progress = silent) -> Dataset:
        self.check()
        corpus, settings = self.corpus(), self.export_settings()
        root = cached_export(corpus, settings, lines(progress))
        try:
            return self._opened(root)
        except DataError as damage:
            progress(f"data: {damage}; it is made again")
            return self._opened(cached_export(corpus, settings, lines(progress), anew=True))

    def _opened(self, root: Path) -> Dataset:
        return open_dataset(next((root / "datasets").iterdir()), None, self.vocab_size)


@option("data", "embedded")
@dataclass
class Embedded(FromText):
    """wiki_vital: 4.9 MB of Wikipedia lead sections from the extra `demo`; 1,000 for validation."""

    def corpus(self) -> Corpus:
        return embedded_corpus()


@option("data", "text")
@dataclass
class Text(FromText):
    """The user's own files.

    `.jsonl` and `.ndjson` hold one document a line, `.json` is that or a list of documents, any
    other file is plain text; `.gz`, `.xz`, `.bz2` and `.zst` are unpacked. All documents are
    held in memory at once. Which are for validation depends on their text alone.
    """

    files: Any = ""
    """A file, a folder (all files in it, at any depth), a glob pattern (`**` for folders at any
    depth), or a list of such; `~` is the home folder."""
    text_field: str = "text"
    """Key of a JSONL object that holds the text."""
    separator: Annotated[str | None, not_empty] = None
    r"""What stands between documents of a plain text, \n for a line end; null: a file is one."""
    encoding: str = "utf-8"
    """Of plain text files, as Python names it: utf-8, latin-1, cp1252, utf-16, …"""
    val_documents: Annotated[int | None, at_least(1)] = None
    """Validation documents; null: by `val_fraction`."""
    val_fraction: Annotated[float, above(0, below=1)] = 0.05
    """Share of the documents that is for validation, at least one document."""

    def check(self) -> None:
        if not self.files:
            raise ConfigError("data=text needs data.files='PATTERN', such as 'corpus/**/*.txt'")
        listed = self.files if isinstance(self.files, list) else [self.files]
        if not all(isinstance(name, str) and name for name in listed):
            raise ConfigError(f"data.files={self.files!r}: a file, folder or pattern, or a list")
        try:
            "".encode(self.encoding)
        except (LookupError, ValueError):
            raise ConfigError(
                f"data.encoding={self.encoding!r}: Python has no such encoding of text; utf-8, "
                "latin-1, cp1252 and utf-16 are usual ones"
            ) from None

    def corpus(self) -> Corpus:
        return text_corpus(
            [expanduser(name) for name in self.files]
            if isinstance(self.files, list)
            else expanduser(self.files),
            text_field=self.text_field,
            # A command line has no line ends in its values, only a backslash and an n.
            separator=self.separator and self.separator.replace("\\n", "\n"),
            val_documents=self.val_documents,
            val_fraction=self.val_fraction,
            encoding=self.encoding,
        )


@option("data", "shards")
@dataclass
class Shards(Data):
    """Shards as the challenge ships them; the tokenizer is found by their manifest or given."""

    path: str = ""
    """Folder with fineweb_train_*.bin and fineweb_val_*.bin."""

    def check(self) -> None:
        if not self.path:
            raise ConfigError("data=shards needs data.path=FOLDER (with fineweb_val_*.bin in it)")

    def prepare(self, progress: Progress = silent) -> Dataset:
        self.check()
        return open_dataset(Path(expanduser(self.path)), self._tokenizer_path(), self.vocab_size)


def lines(progress: Progress) -> Step:
    """Report a line for every part that is finished."""

    def step(what: str, done: int, total: int) -> None:
        if done == total:
            progress(f"data: {what}: done" if total == 1 else f"data: {what}: {total:,}")

    return step


MODULES = import_modules(__name__)

__all__ = [
    "ByteCount",
    "Data",
    "DataError",
    "Dataset",
    "Embedded",
    "FromText",
    "Loader",
    "LoaderConfig",
    "Shards",
    "Text",
    "Tokenizer",
    "lines",
]
