"""train.deterministic, as far as a CPU can show it: `put_` is an operation that has no ordered form anywhere. The rest is in tests/gpu."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from limbeck._exact import exact
from limbeck.errors import UsageError

CUDA = torch.device("cuda")


def unordered() -> None:
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def state() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    on, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return on, warn, cudnn.deterministic, cudnn.benchmark, bool(torch.utils.deterministic.fill_uninitialized_memory)


@pytest.fixture(autouse=True)
def before(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[bool, ...]]:
    """What PyTorch was set to, which it is again at the end of each of these tests."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    found = state()
    yield found
    assert state() == found


def test_auto_names_an_operation_once_and_goes_on(before: tuple[bool, ...]) -> None:
    """Also where warnings are ignored, as these tests and many programs do with torch's."""
    said: list[str] = []
    warnings.simplefilter("ignore")
    with exact(CUDA, "auto", said.append):
        assert state() == (True, True, True, False, False)
        for _ in range(2):
            unordered()
            torch.zeros(3).put_(torch.tensor([1]), torch.tensor([1.0]))
    assert state() == before
    assert len(said) == 1
    assert said[0].startswith("put_ has no deterministic kernel on CUDA: two runs of this recipe can differ in the last bits")


def test_other_warnings_are_as_they_were() -> None:
    with pytest.warns(UserWarning, match="something else"), exact(CUDA, "auto"):
        warnings.warn("something else", stacklevel=1)


def test_true_refuses_it() -> None:
    def work() -> None:
        with exact(CUDA, True):
            assert state() == (True, False, True, False, False)
            unordered()

    with pytest.raises(UsageError, match=r"train.deterministic: is true, and PyTorch .* has no deterministic put_ on CUDA. Allowed: auto"):
        work()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("x")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), exact(CUDA, True):
        raise error


@pytest.mark.parametrize(("device", "wanted"), [("cpu", True), ("cpu", "auto"), ("cuda", False)])
def test_nothing_is_changed_where_it_is_not_wanted(device: str, wanted: bool, before: tuple[bool, ...]) -> None:
    with exact(torch.device(device), wanted):
        assert state() == before
        unordered()


def test_what_the_program_asked_for_itself_stays(before: tuple[bool, ...]) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with exact(CUDA, "auto"), pytest.raises(RuntimeError):
            unordered()
    finally:
        torch.use_deterministic_algorithms(False)
