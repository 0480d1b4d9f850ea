"""train.deterministic, as far as a CPU can show it: `put_` is an operation that has no ordered form anywhere. The rest is in tests/gpu."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck._exact import exact
from limbeck._folder import matches
from limbeck.errors import Stopped, UsageError
from limbeck.reading import build_recipe
from limbeck.recipe import Recipe

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
    with exact([CUDA], "auto", said.append):
        assert state() == (True, True, True, False, False)
        for _ in range(2):
            unordered()
            torch.zeros(3).put_(torch.tensor([1]), torch.tensor([1.0]))
    assert state() == before
    assert len(said) == 1
    assert said[0].startswith("put_ has no deterministic kernel here: two runs of this recipe can differ in the last bits")


def test_other_warnings_are_as_they_were() -> None:
    with pytest.warns(UserWarning, match="something else"), exact([CUDA], "auto"):
        warnings.warn("something else", stacklevel=1)


def test_true_refuses_it() -> None:
    def work() -> None:
        with exact([CUDA], True):
            assert state() == (True, False, True, False, False)
            unordered()

    with pytest.raises(Stopped, match=r"put_ has no deterministic kernel here.* go on with --resume and train.deterministic=auto"):
        work()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("x")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), exact([CUDA], True):
        raise error


@pytest.mark.parametrize(("device", "wanted"), [("cpu", True), ("cpu", "auto"), ("cuda", False)])
def test_nothing_is_changed_where_it_is_not_wanted(device: str, wanted: bool, before: tuple[bool, ...]) -> None:
    with exact([torch.device(device)], wanted):
        assert state() == before
        unordered()


SAID = {
    "median CUDA with indices output does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'.": (
        "median CUDA with indices output has no deterministic kernel here"
    ),
    "Memory Efficient attention defaults to a non-deterministic algorithm. To explicitly enable determinism call ...": "Memory Efficient attention",
    "Flash Attention defaults to a non-deterministic algorithm. To explicitly enable determinism call ...": "Flash attention adds up in any order",
    "cuDNN Attention defaults to a non-deterministic algorithm. To explicitly enable determinism call ...": "cuDNN attention adds up in any order",
    "Deterministic behavior was enabled with either ..., but this operation is not deterministic because it uses CuBLAS and ...": "cuBLAS was asked",
}


@pytest.mark.parametrize("message", SAID)
def test_what_pytorch_says_of_unordered_operations_is_known(message: str) -> None:
    """As PyTorch 2.6 to 2.14 word it; the words on attention come from C++, once in a process where nothing else is asked for."""
    said: list[str] = []
    warnings.simplefilter("ignore")
    with exact([CUDA], "auto", said.append):
        assert torch.is_warn_always_enabled()
        for _ in range(2):
            warnings.warn(message, stacklevel=1)
    assert [text.startswith(SAID[message]) for text in said] == [True]
    assert not torch.is_warn_always_enabled()

    def work() -> None:
        with exact([CUDA], True):
            raise RuntimeError(message)

    with pytest.raises(Stopped, match=SAID[message]):
        work()


def test_a_teacher_on_cuda_is_enough() -> None:
    with exact([torch.device("cpu"), CUDA], "auto"):
        assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("own", "wanted", "lenient"), [(False, "auto", False), (False, True, False), (True, "auto", True), (True, True, False)]
)
def test_what_the_program_asked_for_itself(own: bool, wanted: Any, lenient: bool) -> None:
    """Without exception: it stays so. With warnings: the recipe may ask for more. It is as it was behind it. own: warnings alone."""
    torch.use_deterministic_algorithms(True, warn_only=own)
    try:
        with exact([CUDA], wanted):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled() is lenient
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() is own
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_run_may_go_on_with_another_order_of_kernels_and_with_nothing_else_changed(tmp_path: Path) -> None:
    """Which is what a run that `true` has ended is told to do."""

    def asked(**train: Any) -> Recipe:
        student = {"model": "torchvision:resnet18"}
        return build_recipe({"student": student, "data": "digits", "train": {"device": "cpu", "workers": 0, **train}}, command="train")

    (tmp_path / "recipe.yaml").write_text(asked(deterministic=True).to_yaml(), encoding="utf-8")
    found = matches(tmp_path, asked(deterministic="auto"), {})
    assert found is not None
    assert found[0].train.deterministic == "auto"
    with pytest.raises(UsageError, match=r"train.lr"):
        matches(tmp_path, asked(deterministic="auto", lr=0.5), {})
