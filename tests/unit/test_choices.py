"""How a teacher runs where its recipe does not say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from limbeck._asking import engine_of_teacher
from limbeck.reading import build_recipe


@pytest.mark.parametrize(
    ("teacher", "train", "expected"),
    [
        ({}, {"precision": "float32"}, ("float32", "channels_first")),
        ({}, {"precision": "bf16", "layout": "channels_last"}, ("bf16", "channels_last")),
        ({"precision": "float32"}, {"precision": "bf16", "layout": "channels_last"}, ("float32", "channels_first")),
        ({"layout": "channels_first"}, {"precision": "bf16", "layout": "channels_last"}, ("bf16", "channels_first")),
        ({"precision": "bf16", "layout": "channels_last"}, {"precision": "auto"}, ("bf16", "channels_last")),
    ],
)
def test_a_teacher_runs_as_the_student_where_nothing_is_said(
    teacher: dict[str, Any], train: dict[str, Any], expected: tuple[str, str]
) -> None:
    given = {"teacher": {"model": "run:t", **teacher}, "student": "resnet18", "data": "digits", "train": train}
    recipe = build_recipe(given, command="distill")
    engine, why = engine_of_teacher(recipe, None, None, torch.device("cpu"))  # type: ignore[arg-type]  # nothing is measured
    assert (engine.precision, engine.layout) == expected
    assert why["measured"] == []
