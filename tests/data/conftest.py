"""The recorded data files, and small text of our own."""

from pathlib import Path

import pytest

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "golden"


@pytest.fixture(scope="session")
def recorded() -> Path:
    """Tokenizer, shards, batches and tables recorded from the reference loaders."""
    return FIXTURES / "data"


@pytest.fixture(scope="session")
def recorded_export() -> Path:
    """Output of the challenge's exporter on wiki_vital; of most shards only the hashes."""
    return FIXTURES / "export"


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache for this test alone."""
    monkeypatch.setenv("RECURGOLF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stories(tmp_path) -> Path:
    """A folder with 40 short plain texts."""
    folder = tmp_path / "stories"
    folder.mkdir()
    for n in range(40):
        text = (
            f"Story {n}.\r\nThe fox number {n} jumped over {n * 7} lazy dogs, café naïve 😀.\n" * 3
        )
        (folder / f"{n:02d}.txt").write_bytes(text.encode())
    return folder
