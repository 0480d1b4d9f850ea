"""Stages of one training: which rows each reads, what each changes, and that all of them are one run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from limbeck._parts import Parts
from limbeck._teaching import Answers
from limbeck.data import Data, Plan, Request, data_from_python, load_data, nested
from limbeck.engine import Engine
from limbeck.errors import Interrupted, UsageError
from limbeck.loop import learning_rate
from limbeck.models import wrap_module
from limbeck.objective import Objective, StagedObjective
from limbeck.placement import beside
from limbeck.reading import build_recipe
from limbeck.recipe import Recipe, Stage, Term
from limbeck.teacher import LiveTeacher
from limbeck.types import ImagePreprocessing, TensorPreprocessing, TextPreprocessing
from models_support import tokenizer_in
from support import FEATURES, KD_MIX, Big, Small, made, run_fit, settings, state_bytes, tensors, toy_data

HINT = {"loss": "hint", "weight": 1.0, "student": "body", "teacher": "norm"}
SHAPES: dict[str, Any] = {"shapes_student": {"body": (2, 5)}, "shapes_teacher": {"norm": (2, 16)}}


def recipe_of(stages: list[dict[str, Any]], **changes: Any) -> Recipe:
    plain = {"teacher": "timm:resnet50", "student": "timm:resnet18", "data": "digits", **changes}
    return build_recipe({**plain, "train": {"batch_size": 8, "stages": stages, **changes.get("train", {})}}, command="distill")


def parts_of(recipe: Recipe, data: Data, **arguments: Any) -> Parts:
    wanted = TensorPreprocessing((FEATURES,))
    return Parts(recipe, data, wanted, wanted, **arguments)


def names(data: Data, rows: np.ndarray[Any, Any]) -> set[tuple[int, int]]:
    return {tuple(row) for row in data.train.ids[rows].tolist()}


class TestSubsets:
    def test_a_smaller_fraction_is_a_part_of_a_larger_one(self) -> None:
        ids = toy_data(200).train.ids
        before: set[int] = set()
        for fraction in (0.001, 0.1, 0.25, 0.5, 0.51, 1.0):
            rows = nested(ids, fraction, 0)
            assert len(rows) == max(1, round(fraction * 200))
            assert before <= set(rows.tolist())
            assert np.all(np.diff(rows) > 0)
            before = set(rows.tolist())
        assert set(nested(ids, 0.5, 1).tolist()) != set(nested(ids, 0.5, 0).tolist())

    def test_the_order_of_rows_does_not_matter(self) -> None:
        ids = toy_data(100).train.ids
        mixed = np.random.default_rng(0).permutation(100)
        first, second = ids[nested(ids, 0.3, 0)], ids[mixed][nested(ids[mixed], 0.3, 0)]
        assert {tuple(r) for r in first.tolist()} == {tuple(r) for r in second.tolist()}

    def test_rows_with_one_id_go_together(self) -> None:
        ids = np.concatenate([toy_data(20).train.ids] * 2)
        rows = nested(ids, 0.5, 0)
        assert set((rows % 20).tolist()) == set(rows[rows < 20].tolist())
        assert len(rows) == 20


class TestPlan:
    def test_each_epoch_reads_its_stage_and_the_view_goes_on(self) -> None:
        data = toy_data(40)
        recipe = recipe_of([{"fraction": 0.25, "epochs": 3}, {"fraction": 0.5, "epochs": 2}, {"epochs": 2}], teacher_cache={"views": 4})
        parts = parts_of(recipe, data)
        parts.views = 4
        plan = parts.feed(recipe, with_teacher=True).plan
        assert [p.count for p in plan.plans] == [10, 20, 40]
        assert plan.starts == [0, 6, 12]
        assert list(plan.rounds) == [2, 4, 6, 9, 12, 17, 22]
        read: dict[int, list[int]] = {}
        for step in range(plan.total_steps):
            request = plan.request(step)
            assert request.step == step
            assert request.view == request.epoch % 4
            assert request.stage == (0 if request.epoch < 3 else 1 if request.epoch < 5 else 2)
            read.setdefault(request.epoch, []).extend(request.rows.tolist())
        sizes = [10] * 3 + [20] * 2 + [40] * 2
        for epoch, size in enumerate(sizes):
            expected = nested(data.train.ids, size / 40, 0).tolist()
            assert sorted(read[epoch]) == expected
        assert len({tuple(r) for r in read.values()}) == 7, "every epoch has an order of its own"
        assert plan.request(13).rows.tolist() == plan.request(13).rows.tolist()

    def test_one_stage_of_everything_is_the_plan_as_ever(self) -> None:
        data = toy_data(30)
        recipe = recipe_of([{"epochs": 3}], seed=3)
        ever = Plan(data.train, seed=3, data_seed=0, epochs=3, batch_size=8, views=1)
        plan = parts_of(recipe, data).feed(recipe, with_teacher=True).plan
        for step in range(12):
            assert plan.request(step).rows.tolist() == ever.request(step).rows.tolist()

    def test_the_baseline_goes_through_the_same_stages(self) -> None:
        """As many steps in each, of labelled rows among those that the student reads there."""
        data = toy_data(20, unlabelled=20)
        recipe = recipe_of([{"fraction": 0.5, "epochs": 2}, {"epochs": 1}])
        parts = parts_of(recipe, data)
        beside, feed = parts.feed(recipe, with_teacher=True), parts.baseline_feed(recipe)
        assert feed.plan.starts == beside.plan.starts
        assert feed.plan.total_steps == beside.plan.total_steps == 11
        assert list(feed.rounds) == list(beside.rounds)
        half = names(data, nested(data.train.ids, 0.5, 0))
        epochs = []
        for step in range(11):
            request = feed.plan.request(step)
            batch = feed.builder(request)
            epochs.append(request.epoch)
            assert (batch.labels >= 0).all()
            assert len(batch) == 8
            if step < 6:
                assert {tuple(r) for r in batch.ids.tolist()} <= half
        assert epochs == sorted(epochs)
        whole = {tuple(r) for step in range(6, 11) for r in feed.builder(feed.plan.request(step)).ids.tolist()}
        assert len(whole) == 20


@pytest.mark.parametrize("schedule", ["cosine", "linear", "one_cycle", "step", "constant"])
def test_a_stage_scales_the_schedule_of_the_whole_run(schedule: str) -> None:
    more = {"milestones": [0.4, 0.8]} if schedule == "step" else {}
    plain = settings(epochs=3, lr=0.2, schedule=schedule, warmup=0.3, **more)
    staged = settings(lr=0.2, schedule=schedule, warmup=0.3, **more, stages=[Stage(epochs=1), Stage(epochs=2, lr=0.05)])
    for step in range(60):
        whole = learning_rate(plain, step, 60)
        assert learning_rate(staged, step, 60, 0) == whole
        assert learning_rate(staged, step, 60, 1) == pytest.approx(0.05 / 0.2 * whole, rel=1e-12)


def staged_fit(folder: Path, data: Data, recipe: Recipe, **arguments: Any) -> tuple[Any, Any]:
    parts = parts_of(recipe, data)
    parts.shapes_student, parts.shapes_teacher = [SHAPES["shapes_student"]] * len(recipe.stages), SHAPES["shapes_teacher"]
    feed = parts.feed(recipe, with_teacher=True, ask=True)
    train = settings(**{k: v for k, v in recipe.train.model_dump().items() if k in ("stages", "epochs", "lr", "schedule", "warmup")})
    train = train.model_copy(update={"optimizer": "sgd", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "clip_norm": None})
    return run_fit(
        folder,
        data=data,
        train=train,
        plan=feed.plan,
        builder=feed.builder,
        objective=parts.objective(recipe.seed, None),
        seed=3,
        **arguments,
    )


def test_a_plain_loop_over_two_stages_gives_the_same_weights(tmp_path: Path) -> None:
    data = toy_data(80)
    kd = [t.model_dump() for t in KD_MIX]
    recipe = recipe_of(
        [{"fraction": 0.25, "epochs": 2, "objective": ["cross_entropy"], "lr": 0.02}, {"epochs": 1}],
        seed=3,
        objective=kd,
        train={"lr": 0.5, "schedule": "linear", "warmup": 0.0},
    )
    student, trained = staged_fit(tmp_path, data, recipe)
    x, y = tensors(80)
    plain, teacher = made(Small, "student"), made(Big, "teacher").eval()
    small = nested(data.train.ids, 0.25, 0)
    first = Plan(data.train, seed=3, data_seed=0, epochs=2, batch_size=8, rows=small)
    second = Plan(data.train, seed=3, data_seed=0, epochs=1, batch_size=8, first_epoch=2)
    steps = [(0, first.request(i).rows) for i in range(6)] + [(1, second.request(i).rows) for i in range(10)]
    for step, (stage, rows) in enumerate(steps):
        chosen = data.train.rows[rows]
        plain.zero_grad()
        logits = plain(x[chosen])
        loss = nn.functional.cross_entropy(logits, y[chosen])
        if stage:
            with torch.no_grad():
                soft = torch.softmax(teacher(x[chosen]) / 6, dim=1)
            loss = 0.3 * loss + 0.7 * 36 * nn.functional.kl_div(torch.log_softmax(logits / 6, dim=1), soft, reduction="batchmean")
        loss.backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= (0.5 if stage else 0.02) * (1 - step / 16) * parameter.grad
    assert trained.steps == 16
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(student.module.state_dict()[name], value, rtol=0, atol=1e-9)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines if "loss" in line] == [0] * 6 + [1] * 10
    assert [line["stage"] for line in lines if "valid" in line] == [0, 0, 1]
    assert [set(line["terms"]) for line in lines if "loss" in line] == [{"cross_entropy"}] * 6 + [{"kd", "cross_entropy"}] * 10


def test_the_teacher_is_asked_only_where_a_stage_needs_it(tmp_path: Path) -> None:
    data = toy_data(40)
    teacher = LiveTeacher(wrap_module(made(Big, "teacher"), role="teacher", data=data), Engine(torch.device("cpu"), "float64"))
    recipe = recipe_of([{"epochs": 2, "objective": ["cross_entropy"]}, {"fraction": 0.5, "epochs": 1}])
    found, _ = staged_fit(tmp_path / "beside", data, recipe, teacher=teacher)
    assert teacher.meter.items == 20
    ahead, _ = staged_fit(tmp_path / "ahead", data, recipe, teacher=beside(teacher, teacher.engine))
    assert teacher.meter.items == 40
    assert state_bytes(ahead.module) == state_bytes(found.module)


def test_a_teacher_that_draws_is_found_in_the_stage_that_asks_it(tmp_path: Path) -> None:
    """Before a step during which it could take the student's numbers."""
    data = toy_data(40)
    drawing = made(Big, "teacher")
    drawing.drop.register_forward_hook(lambda module, given, gave: gave + torch.rand(1, dtype=torch.float64))
    engine = Engine(torch.device("cpu"), "float64")
    teacher = LiveTeacher(wrap_module(drawing, role="teacher", data=data), engine)
    recipe = recipe_of([{"epochs": 2, "objective": ["cross_entropy"]}, {"fraction": 0.5, "epochs": 1}])
    with pytest.raises(UsageError, match="draws random numbers while it answers"):
        staged_fit(tmp_path, data, recipe, teacher=beside(teacher, engine))


def test_a_stop_at_every_step_of_every_stage_ends_in_the_same_bytes(tmp_path: Path) -> None:
    data = toy_data(40)
    stages = [
        {"fraction": 0.4, "epochs": 1, "objective": ["cross_entropy"], "lr": 0.1},
        {"fraction": 0.6, "epochs": 1, "objective": [HINT, "kd"]},
        {"epochs": 1, "objective": [{**HINT, "weight": 0.5}, "cross_entropy"], "lr": 0.02},
    ]
    recipe = recipe_of(stages, train={"schedule": "cosine"})

    class Stop:
        def __init__(self, count: int) -> None:
            self.left = count

        def __call__(self) -> bool:
            self.left -= 1
            return self.left < 0

    student, whole = staged_fit(tmp_path / "whole", data, recipe)
    assert whole.steps == 10
    for step in range(1, 11):
        folder = tmp_path / f"stopped-{step}"
        with pytest.raises(Interrupted):
            staged_fit(folder, data, recipe, stop=Stop(step - 1))
        found, trained = staged_fit(folder, data, recipe)
        assert trained.resumed_from == [step]
        assert state_bytes(found.module) == state_bytes(student.module), f"stopped after step {step}"


class TestObjective:
    def build(self, *lists: list[dict[str, Any]]) -> StagedObjective:
        about: dict[str, Any] = {"classes": list("abcd"), "label_counts": [1] * 4, **SHAPES}
        return StagedObjective([Objective.build([Term(**t) for t in terms], **about) for terms in lists])

    def test_a_projection_goes_on_in_the_next_stage(self) -> None:
        found = self.build([HINT], [{**HINT, "weight": 0.1}, {"loss": "kd"}], CE_PLAIN)
        first, second = (found.at(i).terms[0].loss for i in (0, 1))
        assert first is second
        assert sum(p.numel() for p in found.parameters()) == 5 * 16 + 16
        assert found.student_needs.features == ("body",)
        assert found.teacher_needs.logits
        assert not found.at(2).needs_teacher

    def test_the_order_of_stages_does_not_change_what_is_drawn(self) -> None:
        one, other = self.build([HINT], CE_PLAIN), self.build(CE_PLAIN, [HINT])
        alone = self.build([HINT])
        expected = state_bytes(alone.at(0))
        assert state_bytes(one.at(0)) == state_bytes(other.at(1)) == expected
        assert len(expected) == 2

    def test_another_layer_is_another_projection(self) -> None:
        about: dict[str, Any] = {"classes": list("abcd"), "label_counts": [1] * 4, "shapes_student": {"body": (2, 5), "head": (2, 5)}}
        about["shapes_teacher"] = SHAPES["shapes_teacher"]
        built = [Objective.build([Term(**{**HINT, "student": layer})], **about) for layer in ("body", "head")]
        found = StagedObjective(built)
        assert found.at(0).terms[0].loss is not found.at(1).terms[0].loss


CE_PLAIN: list[dict[str, Any]] = [{"loss": "cross_entropy"}]


class TestBaseline:
    def test_its_objective_is_the_cross_entropy_of_each_stage(self) -> None:
        data = toy_data(20)
        smooth = [{"loss": "kd"}, {"loss": "cross_entropy", "weight": 0.1, "label_smoothing": 0.2}]
        recipe = recipe_of([{"epochs": 1}, {"epochs": 1, "objective": smooth}, {"epochs": 1, "objective": ["kd"]}])
        found = parts_of(recipe, data).baseline_objective()
        terms = [found.at(i).terms[0].term.model_dump() for i in range(3)]
        assert all(t["loss"] == "cross_entropy" and t["weight"] == 1.0 for t in terms)
        assert [t.get("label_smoothing", 0.0) for t in terms] == [0.0, 0.2, 0.0]
        assert not any(found.at(i).needs_teacher for i in range(3))


class TestCache:
    def test_only_the_rows_and_views_that_a_stage_needs_are_asked(self, tmp_path: Path) -> None:
        data = toy_data(40)
        recipe = recipe_of(
            [{"epochs": 3, "objective": ["cross_entropy"]}, {"fraction": 0.25, "epochs": 3}, {"fraction": 0.5, "epochs": 1}],
            teacher_cache={"path": str(tmp_path), "views": 4},
        )
        parts = parts_of(recipe, data)
        parts.views = 4
        found = Answers(recipe, parts)
        # epochs 3, 4, 5 read a quarter under the views 3, 0, 1; epoch 6 a half under view 2
        assert {r.view: len(r.keys) for r in found.requests["teach"]} == {0: 10, 1: 10, 2: 20, 3: 10}
        for request in found.requests["teach"]:
            rows = nested(data.train.ids, 0.5 if request.view == 2 else 0.25, 0)
            assert request.keys.tolist() == data.train.ids[rows].tolist()
            assert request.places(np.arange(3)).tolist() == rows[:3].tolist()
        assert [view for view, _ in parts.asking_epochs] == [3, 4, 5, 6]

    def test_without_stages_everything_is_asked(self, tmp_path: Path) -> None:
        data = toy_data(40)
        recipe = build_recipe({"teacher": "timm:a", "student": "timm:b", "data": "digits", "train": {"epochs": 3}}, command="distill")
        parts = parts_of(recipe, data)
        parts.views = 2
        requests = Answers(recipe, parts).requests["teach"]
        assert [(r.view, len(r.keys), r.rows) for r in requests] == [(0, 40, None), (1, 40, None)]


class TestChecks:
    def student(self, data: Data) -> Any:
        return wrap_module(made(Small, "student"), role="student", data=data)

    def test_a_fraction_without_labels_is_refused_for_the_baseline(self) -> None:
        data = toy_data(16, unlabelled=84)
        seen = set()
        for seed in range(8):
            recipe = recipe_of([{"fraction": 0.01, "epochs": 1}], data={"source": "digits", "seed": seed})
            [row] = nested(data.train.ids, 0.01, seed)
            seen.add(labelled := bool(data.train.labels[row] >= 0))
            parts = parts_of(recipe, data)
            if labelled:
                parts.check_stages(self.student(data))
            else:
                with pytest.raises(UsageError, match=r"train\.stages\.0\.fraction: .* has none with a label, and the baseline"):
                    parts.check_stages(self.student(data))
        assert seen == {True, False}

    def test_one_row_is_too_few_for_batch_statistics(self) -> None:
        data = toy_data(30)
        recipe = recipe_of([{"fraction": 0.01, "epochs": 1}])
        with pytest.raises(UsageError, match="batch statistics"):
            parts_of(recipe, data, batch_statistics=True).check_stages(self.student(data))
        parts_of(recipe, data).check_stages(self.student(data))

    def test_a_resolution_of_float_arrays_has_no_effect(self) -> None:
        data = toy_data(30)
        with pytest.raises(UsageError, match=r"train\.stages\.1\.resolution: has no effect on float arrays"):
            parts_of(recipe_of([{"epochs": 1}, {"epochs": 1, "resolution": 8}]), data).check_stages(self.student(data))


class TestSizes:
    def test_images_have_the_size_of_the_stage_for_the_student_alone(self) -> None:
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, 255, (20, 8, 8), dtype=np.uint8), np.arange(20) % 2
        data = data_from_python(task="image-classification", train=(x, y), test=(x[:4], y[:4]), valid=(x[4:8], y[4:8]))
        own = ImagePreprocessing(1, (0.5,), (0.25,), 8, 8)
        recipe = recipe_of([{"epochs": 1, "resolution": [4, 6]}, {"epochs": 1}])
        parts = Parts(recipe, data, own, own)
        feed = parts.feed(recipe, with_teacher=True, ask=True)
        builder = pickle.loads(pickle.dumps(feed.builder))
        seen = []
        for step in range(feed.plan.total_steps):
            batch = builder(feed.plan.request(step))
            seen.append(tuple(batch.student["image"].shape[2:]))
            assert batch.teacher is not None
            whole = (x[feed.plan.request(step).rows].astype(np.float64) / 255 - 0.5) / 0.25
            np.testing.assert_allclose(batch.teacher["image"][:, 0].numpy(), whole, atol=1e-6)
        assert seen == [(4, 6)] * 3 + [(8, 8)] * 3
        assert parts.builder(data.test)(Request(0, 0, 0, np.arange(2))).student["image"].shape[2:] == (8, 8)
        assert tuple(parts.first_batch(recipe, with_teacher=True).student["image"].shape[2:]) == (8, 8), "what needs most is measured"

    def test_texts_have_the_length_of_the_stage_for_the_student_alone(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        tokenizer_in(tmp_path)
        texts = [" ".join(f"w{(i + j) % 9}" for j in range(3 + i % 14)) for i in range(20)]
        labels = [i % 2 for i in range(20)]
        data = data_from_python(
            task="text-classification", train=(texts, labels), test=(texts[:4], labels[:4]), valid=(texts[4:8], labels[4:8])
        )
        own = TextPreprocessing(str(tmp_path), 12, ("input_ids", "attention_mask"), "t")
        recipe = recipe_of([{"epochs": 1, "max_length": 5}, {"epochs": 1}], data="csv:x.csv", task="text-classification")
        parts = Parts(recipe, data, own, own)
        feed = parts.feed(recipe, with_teacher=True, ask=True)
        widths: dict[int, set[tuple[int, int]]] = {0: set(), 1: set()}
        for step in range(feed.plan.total_steps):
            request = feed.plan.request(step)
            batch = feed.builder(request)
            assert batch.teacher is not None
            widths[request.stage].add((batch.student["input_ids"].shape[1], batch.teacher["input_ids"].shape[1]))
        assert {student for student, _ in widths[0]} == {5}
        assert max(teacher for _, teacher in widths[0]) == 12
        assert all(student == teacher for student, teacher in widths[1])
        long = recipe_of([{"epochs": 1, "max_length": 13}], data="csv:x.csv", task="text-classification")
        student: Any = SimpleNamespace(preprocessing=own)
        with pytest.raises(UsageError, match=r"train\.stages\.0\.max_length: is 13, and the student's texts are cut at 12 tokens"):
            Parts(long, data, own, own).check_stages(student)


class TestRecipe:
    def test_epochs_are_the_sum_and_what_is_written_is_read_again(self) -> None:
        recipe = recipe_of(
            [{"fraction": 0.1, "epochs": 2, "objective": ["kd"], "lr": 0.01}, {"epochs": 8, "resolution": [6, 8]}], train={"lr": 0.1}
        )
        assert recipe.train.epochs == 10
        import yaml

        again = build_recipe(yaml.safe_load(recipe.to_yaml()), command="distill")
        assert again == recipe
        assert again.stages[1].resolution == (6, 8)

    @pytest.mark.parametrize("task", ["image-classification", "text-classification"])
    def test_what_every_stage_has_of_its_own_is_null_and_read_again(self, task: str) -> None:
        import yaml

        stages = [{"epochs": 1, "lr": 0.1, "objective": ["kd"]}, {"epochs": 1, "lr": 0.2, "objective": ["cross_entropy"]}]
        data = "digits" if task.startswith("image") else "csv:reviews.csv"
        recipe = recipe_of(stages, data=data, task=task, train={"optimizer": "sgd"})
        plain = yaml.safe_load(recipe.to_yaml())
        assert plain["objective"] is None
        assert plain["train"]["lr"] is None
        assert build_recipe(plain, command="distill") == recipe

    def test_no_stages_is_one_stage(self) -> None:
        recipe = build_recipe({"teacher": "timm:a", "student": "timm:b", "data": "digits", "train": {"epochs": 3}}, command="distill")
        assert recipe.train.stages is None
        assert recipe.stages == [Stage(epochs=3)]
        assert recipe.terms == recipe.objective


@pytest.mark.parametrize(("teacher", "views"), [(None, 20), ("timm:resnet50", 16)])
def test_views_are_repeated_only_where_a_teacher_is_asked_for_each(teacher: str | None, views: int) -> None:
    """Without one there is nothing to pay, and a new view in every epoch."""
    plain: dict[str, Any] = {"student": "timm:resnet18", "data": {"source": "digits", "augment": {"crop": 1}}, "train": {"epochs": 20}}
    recipe = build_recipe({**plain, **({"teacher": teacher} if teacher else {})}, command="distill" if teacher else "train")
    data = load_data(recipe.data, recipe.task, Path())
    wanted = ImagePreprocessing(1, (0.5,), (0.5,))
    plan = Parts(recipe, data, wanted, wanted).feed(recipe, with_teacher=teacher is not None).plan
    assert {plan.request(step).view for step in range(plan.total_steps)} == set(range(views))
