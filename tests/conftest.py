"""One thread for the whole suite: tiny tensors gain nothing from two, and lose much on a busy machine."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)

import signal  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs, in processes of their own, are `make test-long`."""
    for item in items:
        if {"e2e", "faults"} & set(item.path.relative_to(item.config.rootpath).parts):
            item.add_marker("long")


@pytest.fixture
def handlers() -> Iterator[None]:
    """A command that was interrupted ignores further signals, for its process ends then; this one goes on."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _own_teacher_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads what a teacher said in another one, or in the user's own runs."""
    folder = tmp_path_factory.mktemp("teachers")
    monkeypatch.setenv("LIMBECK_CACHE", str(folder))
    return folder
