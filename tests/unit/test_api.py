"""The Python call: what is given comes back as it was, and nothing that is given is ignored."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import limbeck
from limbeck import api
from limbeck.errors import UsageError
from limbeck.models import state_hash
from models_support import text_config, tokenizer_in
from running import pictures
from support import Big, Small, made, tensors

TRAIN, VALID, TEST = (tensors(n, seed, torch.float32) for n, seed in ((40, 0), (12, 2), (20, 1)))
WORDS = (["a w0", "w1 w2", "w3 w4 w5"] * 8, [0, 1, 2] * 8)


def big() -> nn.Module:
    return made(Big, "teacher", dtype=torch.float32)


def small() -> nn.Module:
    return made(Small, "student", dtype=torch.float32)


def distil(out: Path, **changes: Any) -> api.Result:
    given: dict[str, Any] = {"teacher": big(), "student": small(), "train": TRAIN, "valid": VALID, "test": TEST, **changes}
    plain = {"epochs": 1, "batch_size": 8, "precision": "float32", "export": [], "progress": "none"}
    given = {k: v for k, v in given.items() if v is not None or k == "teacher"}
    call = limbeck.distill
    if given["teacher"] is None:
        del given["teacher"]
        call = limbeck.train
    return call(out=out, **{**plain, **given})


def problems(out: Path, **changes: Any) -> dict[str, str]:
    """What is wrong, by where; nothing is written."""
    with pytest.raises(UsageError) as caught:
        distil(out, **changes)
    assert not out.exists()
    return {p.where: str(p) for p in caught.value.problems}


# --- what a person gave stays theirs ---


def test_the_modules_that_were_given_come_back_as_they_were(tmp_path: Path) -> None:
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).double().train()
    teacher[1].eval()
    student = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)).train()
    strides = [p.stride() for p in teacher.parameters()]
    before = state_hash(teacher), state_hash(student)
    x, y = pictures(30, 0)
    distil(tmp_path / "run", teacher=teacher, student=student, train=(x, y), valid=None, test=pictures(9, 1), layout="channels_last")
    assert (state_hash(teacher), state_hash(student)) == before
    assert {p.dtype for p in teacher.parameters()} == {torch.float64}
    assert [p.stride() for p in teacher.parameters()] == strides
    assert [m.training for m in teacher] == [True, False, True, True]
    assert student.training


def test_a_teacher_from_a_callable_may_be_the_persons_own(tmp_path: Path) -> None:
    teacher = big().double().train()
    before = state_hash(teacher)
    distil(tmp_path / "run", teacher=lambda: teacher)
    assert state_hash(teacher) == before
    assert teacher.training


def test_the_configuration_of_a_text_module_stays(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    tokenizer_in(tmp_path / "tokenizer")
    modules = [BertForSequenceClassification(text_config("bert", n, num_labels=3)) for n in (2, 1)]
    for module in modules:
        module.config.pad_token_id = None
    before = [copy.deepcopy(m.config.to_dict()) for m in modules]
    result = distil(
        tmp_path / "run",
        teacher=modules[0],
        student=modules[1],
        train=WORDS,
        valid=None,
        test=(["a w0 w1", "w1 w2 w2", "w3 w5"], [0, 1, 2]),
        tokenizer=str(tmp_path / "tokenizer"),
    )
    assert [m.config.to_dict() for m in modules] == before
    assert result.student.config.pad_token_id == 0


class Locked(Small):
    def __init__(self, **more: Any) -> None:
        import threading

        super().__init__(**more)
        self.lock = threading.Lock()


def test_a_module_that_cannot_be_copied_is_given_as_a_callable(tmp_path: Path) -> None:
    teacher = made(Locked, "teacher", dtype=torch.float32)
    assert "callable" in problems(tmp_path / "no", teacher=teacher)["teacher"]
    distil(tmp_path / "run", teacher=lambda: teacher)


def test_computed_weights_are_copied(tmp_path: Path) -> None:
    """torch's older weight_norm leaves a tensor with a graph in the module."""
    student = small()
    nn.utils.weight_norm(student.head)
    before = state_hash(student)
    result = distil(tmp_path / "run", student=student)
    assert state_hash(student) == before
    assert state_hash(result.student) != before


# --- law 9: a setting that is ignored is an error ---


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"data": "digits", "train": None, "test": TEST}, {"test", "valid"}),
        ({"data": "digits", "train": None, "valid": None, "test": None, "classes": list("abcd"), "unlabelled": TEST[0]}, {"classes", "unlabelled"}),
        ({"data": "digits"}, {"data"}),
        ({"train": None, "test": None, "valid": None}, {"data"}),
        ({"teacher": None, "temperature": 4.0, "alpha": 0.5}, {"temperature", "alpha"}),
        ({"teacher": None, "alpha": 0.0}, {"alpha"}),
        ({"teacher": None, "baseline": True}, {"baseline"}),
        ({"teacher": None, "unlabelled": TEST[0]}, {"unlabelled"}),
        ({"teacher": None, "teacher_cache": {"mode": "off"}}, {"teacher_cache"}),
        ({"objective": [{"loss": "kd"}], "temperature": 2.0}, {"objective"}),
        ({"tokenizer": "bert", "teacher": "timm:resnet18", "student": "timm:resnet18"}, {"tokenizer"}),
        ({"tokenizer": "bert"}, {"tokenizer"}),
        ({"data_options": {"source": "digits", "test": "x.npz"}}, {"data_options.source", "data_options.test"}),
        ({"data_options": {"valid_fraction": 0.3}}, {"data_options.valid_fraction"}),
        ({"data_options": {"test_fraction": 0.3}}, {"data_options.test_fraction"}),
        ({"data": {"source": "digits", "seed": 1}, "data_options": {"seed": 2}, "train": None, "test": None, "valid": None}, {"data_options.seed"}),
        ({"data_options": ["seed"]}, {"data_options"}),
        ({"seeds": 0}, {"seeds"}),
        ({"seeds": True}, {"seeds"}),
    ],
)  # fmt: skip
def test_what_would_be_ignored_is_refused(tmp_path: Path, given: dict[str, Any], named: set[str]) -> None:
    assert set(problems(tmp_path / "run", **given)) == named


def test_all_problems_of_a_call_are_told_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path / "run", teacher=None, alpha=0.5, unlabelled=TEST[0], epochs=0, lerning_rate=1.0)
    assert set(found) == {"alpha", "unlabelled", "train.epochs", "train.lerning_rate"}


def test_what_has_its_default_beside_no_teacher_is_taken(tmp_path: Path) -> None:
    result = distil(tmp_path / "run", teacher=None, baseline=False)
    assert set(result.metrics["models"]) == {"student"}


@pytest.mark.parametrize("teacher", [True, False])
def test_a_student_without_anything_to_train_is_refused(tmp_path: Path, teacher: bool) -> None:
    frozen = small().requires_grad_(False)
    said = problems(tmp_path / "run", student=frozen, **({} if teacher else {"teacher": None}))["student"]
    assert "requires_grad" in said


def test_a_student_that_is_frozen_in_part_trains_the_rest(tmp_path: Path) -> None:
    student = small()
    student.body.requires_grad_(False)
    result = distil(tmp_path / "run", student=student)
    assert torch.equal(result.student.body.weight.cpu(), student.body.weight)
    assert not torch.equal(result.student.head.weight.cpu(), student.head.weight)


# --- the task is told from the data ---


class Pairs(torch.utils.data.Dataset[Any]):
    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], int(self.y[index])


def test_the_task_of_what_is_given() -> None:
    import datasets
    import pandas as pd

    texts, labels = WORDS
    table = {"text": texts, "label": labels}
    encoded = [{"bytes": b"\x89PNG", "path": None}] * 3
    for train in (
        (texts, labels),
        (np.array(texts), labels),
        (pd.Series(texts), labels),
        ([("a", "b")] * 24, labels),
        Pairs(texts, labels),
        Pairs([("a", "b")] * 24, labels),
        pd.DataFrame(table),
        pd.DataFrame({"label": labels, "sentence": texts}),
        datasets.Dataset.from_dict(table),
    ):
        assert api._task_of(train, {}) == "text-classification", type(train)
    images, numbers = pictures(3, 0)
    for train in (
        (images, numbers),
        TRAIN,
        Pairs(images, numbers),
        torch.utils.data.TensorDataset(*TRAIN),
        pd.DataFrame({"image": encoded, "label": [0, 1, 2]}),
        pd.DataFrame({"image": [b"\x89PNG"] * 3, "label": [0, 1, 2]}),
        datasets.Dataset.from_dict({"image": encoded, "label": [0, 1, 2]}),
        datasets.Dataset.from_dict({"image": encoded, "label": [0, 1, 2]}).cast_column("image", datasets.Image()),
        torch.utils.data.DataLoader(Pairs(images, numbers)),
        5,
        [],
        ([], []),
    ):
        assert api._task_of(train, {}) == "image-classification", type(train)
    frame = pd.DataFrame({"text": [b"\x89PNG"] * 3, "label": [0, 1, 2]})
    assert api._task_of(frame, {}) == "image-classification"
    assert api._task_of(pd.DataFrame({"image": encoded, "title": ["a"] * 3}), {"text": "title"}) == "text-classification"


def test_tables_are_read_without_naming_the_task(tmp_path: Path) -> None:
    import pandas as pd
    from transformers import BertForSequenceClassification

    tokenizer_in(tmp_path / "tokenizer")
    texts, labels = WORDS
    frame = pd.DataFrame({"text": [f"{t} w{i % 9}" for i, t in enumerate(texts)], "label": labels})
    student = BertForSequenceClassification(text_config("bert", 1, num_labels=3))
    result = distil(
        tmp_path / "run", teacher=None, student=student, train=frame, valid=None, test=None, tokenizer=str(tmp_path / "tokenizer")
    )
    assert result.metrics["task"] == "text-classification"


def test_what_is_no_data_gets_the_sentence_of_the_data(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*TRAIN))
    assert "Give its dataset" in problems(tmp_path / "run", train=loader)["train"]
    assert "(x, y) is expected" in problems(tmp_path / "run", train=[{"text": "a", "label": 0}] * 4)["train"]


# --- several seeds ---


def test_seeds_from_one_module_share_its_weights_and_say_so(tmp_path: Path) -> None:
    def said(result: api.Result) -> bool:
        return any("initial weights" in note for note in result.metrics["notes"])

    assert said(distil(tmp_path / "module", seeds=2))
    assert not said(distil(tmp_path / "callable", seeds=2, student=lambda: Small(dtype=torch.float32)))
    assert not said(distil(tmp_path / "one"))


@pytest.mark.parametrize("callable_", [True, False])
def test_the_best_seed_comes_back_and_the_others_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, callable_: bool) -> None:
    held: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []
    build = api._model

    def counted(*given: Any, **more: Any) -> Any:
        model = build(*given, **more)
        if given[3] == "student":
            held.append(weakref.ref(model.module))
            gc.collect()
            alive.append(sum(ref() is not None for ref in held))
        return model

    monkeypatch.setattr(api, "_model", counted)
    student: Any = (lambda: Small(dtype=torch.float32)) if callable_ else small()
    result = distil(tmp_path / "run", seeds=4, student=student, lr=0.05)
    assert len(held) >= 5
    assert max(alive) <= 3  # the spine's first, the last one and the one that is being made
    saved = limbeck_state(tmp_path / "run" / "student")
    assert all(torch.equal(value, saved[name]) for name, value in result.student.state_dict().items())
    again = distil(tmp_path / "run", seeds=4, student=student, lr=0.05, resume=True)
    assert state_hash(again.student) == state_hash(result.student)


def limbeck_state(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_weights_that_were_changed_on_disk_do_not_come_back(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    distil(tmp_path / "run")
    path = tmp_path / "run" / "student" / "model.safetensors"
    save_file({k: v + 1 for k, v in limbeck_state(path.parent).items()}, path)
    with pytest.raises(UsageError, match="SHA-256"):
        distil(tmp_path / "run", resume=True)


# --- modules with more than tensors ---


class Counting(Small):
    """State that is no tensor, as quantisation libraries keep it."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return super().forward(x)

    def get_extra_state(self) -> Any:
        return {"calls": self.calls, "where": object()}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


def test_state_that_is_no_tensor_takes_no_part_in_the_hash() -> None:
    module = made(Counting, "student")
    before = state_hash(module)
    module.calls = 7
    assert state_hash(module) == before
