"""What every test shares: one thread, and no writing outside the test's own folder."""

import os

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory, monkeypatch):
    """W&B and matplotlib keep their files inside the test session's temporary folder."""
    base = tmp_path_factory.getbasetemp() / "home"
    for name in (
        "WANDB_DIR",
        "WANDB_DATA_DIR",
        "WANDB_CACHE_DIR",
        "WANDB_CONFIG_DIR",
        "MPLCONFIGDIR",
    ):
        folder = base / name.lower()
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory):
    """One data cache for the whole session, empty at its start."""
    before = os.environ.get("RECURGOLF_CACHE")
    os.environ["RECURGOLF_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["RECURGOLF_CACHE"]
    else:
        os.environ["RECURGOLF_CACHE"] = before
