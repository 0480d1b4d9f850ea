"""The recipe: what is read is what was meant, all that is wrong is told at once, and what is written repeats the run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from limbeck.errors import UsageError
from limbeck.losses import LOSSES
from limbeck.reading import (
    RecipeError,
    absolute,
    build_recipe,
    default_objective,
    differences,
    json_schema,
    load_recipe,
    read_yaml,
    recipe_from_yaml,
)
from limbeck.recipe import Recipe, Schedule

IMAGES: dict[str, Any] = {"teacher": "timm:resnet50", "student": "timm:resnet18", "data": "digits"}
TEXTS: dict[str, Any] = {"teacher": "bert-large", "student": "bert-base", "data": "csv:reviews.csv"}
FULL: dict[str, Any] = {
    "task": "text-classification",
    "seed": 3,
    "teacher": {"model": "hf:big", "weights": "w.safetensors", "options": {"max_length": 64}, "train": {"epochs": 2, "lr": 1e-5}},
    "student": {"model": "hf:big", "options": {"layers": [0, 5], "note": "1e-3", "other": "no"}},
    "data": {"source": "jsonl:a.jsonl", "test": "b.jsonl", "unlabelled": "c.jsonl", "text": "yes", "label": "1e-3", "max_length": 32},
    "objective": [
        {"loss": "kd", "weight": {"start": 1.0, "end": 0.0, "until": 0.5}, "temperature": {"start": 8.0, "end": 1.0, "shape": "cosine"}},
        {"loss": "cross_entropy", "weight": 0.3, "label_smoothing": 0.1},
    ],
    "train": {"optimizer": "sgd", "momentum": 0.8, "nesterov": False, "lr": 1e-5, "clip_norm": None, "workers": 2, "ema": 0.99},
    "teacher_cache": {"views": 4},
    "baseline": False,
    "export": ["onnx", "pt2"],
    "track": ["wandb"],
}


def problems(data: dict[str, Any], command: Any = "distill") -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        build_recipe(data, command=command, where="recipe.yaml")
    return {p.where: f"{p.message} {p.hint}".strip() for p in caught.value.problems}


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


class TestYaml:
    def test_values_are_what_a_person_means(self, tmp_path: Path) -> None:
        text = "a: 1e-3\nb: yes\nc: no\nd: on\ne: 1:30\nf: 2024-01-01\ng: 010\nh: .5\ni: true\nj: null\nk:\n"
        text += "l: -1.5E+2\nm: '7'\nn: 0x10\no: y\n"
        expected = {"a": 1e-3, "b": "yes", "c": "no", "d": "on", "e": "1:30", "f": "2024-01-01", "g": 10, "h": 0.5, "i": True}
        assert read_yaml(written(tmp_path, text)) == {**expected, "j": None, "k": None, "l": -150.0, "m": "7", "n": "0x10", "o": "y"}

    def test_anchors_and_merges_work(self, tmp_path: Path) -> None:
        data = read_yaml(written(tmp_path, "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"))
        assert data == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("a: 1\nb: 2\na: 3\n", ["line 3", "'a' is given twice", "line 1"]),
            ("t: {lr: 1, lr: 2}\n", ["line 1", "'lr' is given twice"]),
            ("a: !!python/object:os.system x\n", ["line 1", "tags"]),
            ("a: !thing {x: 1}\n", ["tags"]),
            ("a: [1, 2\nb: 3\n", ["line 2", "not YAML"]),
            ("a: b: c\n", ["line 1", "not YAML"]),
            ("- 1\n- 2\n", ["a list", "expected a mapping"]),
            ("just words\n", ["text", "expected a mapping"]),
            ("", ["is empty"]),
            ("a: 1\n---\nb: 2\n", ["not YAML"]),
            ("1: x\n", ["a key must be a word", "'1'"]),
            ("[1, 2]: x\n", ["a key must be a word"]),
            ("a: &a [*a]\n", ["inside what it names"]),
            ("a: " + "[" * 100 + "]" * 100, ["nested"]),
            ("\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30))]), ["aliases"]),
            ("a: *b\n", ["not YAML", "'b'"]),
            ("a: @x\n", ["not YAML"]),
            ("a: \x00\n", ["not YAML"]),
            ("a: " + "9" * 5000 + "\n", ["not YAML"]),
        ],
    )
    def test_what_is_refused_is_refused_in_a_sentence(self, tmp_path: Path, text: str, said: list[str]) -> None:
        with pytest.raises(UsageError) as caught:
            read_yaml(written(tmp_path, text))
        message = str(caught.value)
        assert message.startswith(str(tmp_path / "recipe.yaml")), message
        assert all(part in message for part in said), message

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        path = written(tmp_path, "a: 1")
        with pytest.raises(UsageError, match=r"no such file.*Did you mean 'recipe.yaml'"):
            read_yaml(tmp_path / "recipe.yml")
        with pytest.raises(UsageError, match="folder"):
            read_yaml(tmp_path)
        path.write_bytes(b"a: \xff\xfe")
        with pytest.raises(UsageError, match="UTF-8"):
            read_yaml(path)
        path.write_bytes(b"# x\n" * 500_000)
        with pytest.raises(UsageError, match="bytes"):
            read_yaml(path)


class TestDefaults:
    def test_the_documented_defaults(self) -> None:
        recipe = build_recipe(IMAGES, command="distill")
        assert recipe.task == "image-classification"
        assert [t.model_dump() for t in recipe.objective] == [
            {"loss": "kd", "weight": 0.7, "temperature": 4.0},
            {"loss": "cross_entropy", "weight": 0.3},
        ]
        assert recipe.baseline
        assert recipe.export == ["onnx"]
        assert (recipe.data.valid_fraction, recipe.data.test_fraction, recipe.train.optimizer) == (0.1, None, "adamw")

    def test_temp_and_alpha(self) -> None:
        assert default_objective(6.0, 0.7) == [{"loss": "kd", "weight": 0.7, "temperature": 6.0}, {"loss": "cross_entropy", "weight": 0.3}]
        assert default_objective(2.0, 1.0) == [{"loss": "kd", "weight": 1.0, "temperature": 2.0}]
        assert default_objective(2.0, 0.0) == [{"loss": "cross_entropy", "weight": 1.0}]

    @pytest.mark.parametrize("train", [{"epochs": 10**9}, {"stages": [{"epochs": 10**12}]}], ids=["of all", "of a stage"])
    def test_epochs_without_measure_are_a_slip_of_the_hand(self, train: dict[str, Any]) -> None:
        """A list of them would fill the memory before anything could be said."""
        [said] = problems({**IMAGES, "train": train}).values()
        assert "at least 1 and at most 1,000,000" in said

    def test_the_weight_of_the_authors(self) -> None:
        """By name, in every stage; a run's own recipe has the number."""
        term = {"loss": "similarity_preserving", "weight": "paper", "student": "layer4", "teacher": "layer4"}
        stages = [{"epochs": 1, "objective": [{"loss": "dist", "weight": "paper"}]}, {"epochs": 1}]
        recipe = build_recipe({**IMAGES, "objective": [term, "cross_entropy"], "train": {"stages": stages}}, command="distill")
        assert [t.weight for t in recipe.objective] == [3000.0, 1.0]
        assert recipe.train.stages is not None
        assert recipe.train.stages[0].objective is not None
        assert recipe.train.stages[0].objective[0].weight == LOSSES["dist"].weight
        assert problems({**IMAGES, "objective": [{"loss": "kdd", "weight": "paper"}]}).keys() == {"objective.0.loss"}
        assert "a number or 'paper'" in problems({**IMAGES, "objective": [{"loss": "kd", "weight": "papers"}]})["objective.0.weight"]

    def test_train_learns_from_labels_alone(self) -> None:
        recipe = build_recipe({"student": "resnet18", "data": "digits"}, command="train")
        assert [t.model_dump() for t in recipe.objective] == [{"loss": "cross_entropy", "weight": 1.0}]
        assert recipe.teacher is None
        assert not recipe.baseline

    @pytest.mark.parametrize(
        ("source", "task"),
        [
            ("digits", "image-classification"),
            ("npz:a.npz", "image-classification"),
            ("imagefolder:a", "image-classification"),
            ("csv:a.csv", "text-classification"),
            ("jsonl:a.jsonl", "text-classification"),
            ("parquet:a", "text-classification"),
            ("reviews.csv", "text-classification"),
            ("images.NPZ", "image-classification"),
        ],
    )
    def test_the_data_tell_the_task(self, source: str, task: str) -> None:
        assert build_recipe({**IMAGES, "data": source}, command="distill").task == task

    def test_a_task_that_nothing_tells(self) -> None:
        assert "cannot be told from the data 'hf:org/name'" in problems({**IMAGES, "data": "hf:org/name"})["task"]

    def test_sgd_without_momentum_is_plain(self) -> None:
        recipe = build_recipe({**IMAGES, "train": {"optimizer": "sgd", "momentum": 0}}, command="distill")
        assert not recipe.train.nesterov

    def test_what_was_given_is_not_changed(self) -> None:
        data = {"teacher": {"model": "a"}, "student": {"model": "b"}, "data": {"source": "reviews.csv"}}
        before = json.dumps(data)
        build_recipe(data, command="distill")
        assert json.dumps(data) == before


class TestCompleteRecipes:
    @pytest.mark.parametrize(
        ("data", "command"),
        [
            (IMAGES, "distill"),
            (TEXTS, "distill"),
            (FULL, "distill"),
            ({"student": "a", "data": "digits"}, "train"),
            ({"student": "a", "data": "x.csv", "train": {"optimizer": "sgd", "momentum": 0.0}}, "train"),
            ({**IMAGES, "data": {"source": "npz:a", "augment": {"crop": 4, "randaugment": [2, 9.5]}, "test_fraction": 0.3}}, "distill"),
            ({**TEXTS, "data": {"source": "csv:a", "valid": "b", "text_pair": "0.5", "label": "null", "text": "~"}}, "distill"),
            ({**IMAGES, "student": {"model": "m", "options": {"a": [1, 2.0, None, True, "on", {"b": "2"}]}}}, "distill"),
        ],
    )
    def test_reading_what_was_written_gives_an_equal_recipe(self, tmp_path: Path, data: dict[str, Any], command: Any) -> None:
        recipe = build_recipe(data, command=command)
        text = recipe.to_yaml()
        again = recipe_from_yaml(written(tmp_path, text))
        assert again == recipe
        assert differences(again, recipe) == []
        assert again.to_yaml() == text
        assert recipe.command == command

    def test_every_key_is_written(self) -> None:
        text = yaml.safe_load(build_recipe(FULL, command="distill").to_yaml())
        assert set(text) == set(Recipe.model_fields)
        for section in ("teacher", "student", "data", "train", "teacher_cache"):
            field = getattr(build_recipe(FULL, command="distill"), section)
            assert set(text[section]) == set(type(field).model_fields), section

    def test_keys_without_effect_are_written_as_null(self) -> None:
        adam, sgd = (yaml.safe_load(build_recipe(d, command="distill").to_yaml())["train"] for d in (IMAGES, FULL))
        assert (adam["momentum"], adam["nesterov"], adam["betas"]) == (None, None, [0.9, 0.999])
        assert (sgd["momentum"], sgd["nesterov"], sgd["betas"]) == (0.8, False, None)

    def test_null_is_refused_where_the_key_has_an_effect(self) -> None:
        assert set(problems({**IMAGES, "train": {"optimizer": "sgd", "momentum": None}})) == {"train.momentum"}

    def test_differences_name_keys_and_values(self) -> None:
        a = build_recipe(IMAGES, command="distill")
        b = build_recipe({**IMAGES, "train": {"lr": 0.01}, "student": {"model": "timm:resnet18", "options": {"x": 1}}}, command="distill")
        assert differences(a, b) == ["student.options.x: nothing (null) -> 1", "train.lr: 0.001 -> 0.01"]
        assert differences(a, a) == []


class TestProblems:
    def test_all_at_once_with_key_value_allowed_and_nearest(self) -> None:
        found = problems(
            {
                "studnt": "x",
                "teacher": {"model": "a", "train": {"epochs": 0}},
                "data": {"source": "npz:a", "lable": "x", "augment": {"crp": 2}},
                "objective": [{"loss": "kd", "temprature": 4}, {"loss": "kdd"}, {"weight": 1}, 3, {"loss": "kd", "weight": {"start": 1}}],
                "train": {"lr": "fast", "epoch": 1, "workers": -1, "betas": [0.5], "epochs": True, "schedule": "cosin", "momentum": 0.5},
                "export": ["onx"],
                "seed": -1,
            }
        )
        assert found["studnt"] == "no such key. Did you mean 'student'?"
        assert found["train.lr"] == "got 'fast', expected a number greater than 0."
        assert found["train.epoch"] == "no such key. Did you mean 'epochs'?"
        assert found["train.epochs"] == "got true, expected a whole number of at least 1 and at most 1,000,000."
        assert found["train.workers"] == "got -1, expected a whole number of at least 0 or 'auto'."
        assert found["train.schedule"] == "got 'cosin', expected one of cosine, linear, one_cycle, step, constant. Did you mean 'cosine'?"
        assert found["data.lable"] == "no such key. Did you mean 'label'?"
        assert found["data.augment.crp"] == "no such key. Did you mean 'crop'?"
        assert found["teacher.train.epochs"] == "got 0, expected a whole number of at least 1 and at most 1,000,000."
        assert found["export.0"] == "got 'onx', expected one of onnx, torchscript, pt2. Did you mean 'onnx'?"
        assert found["objective.4.weight.end"] == "is missing, expected a number."
        assert "sgd" in found["train.momentum"]
        assert "temperature" in found["objective.0.temprature"]
        assert "Did you mean 'kd'?" in found["objective.1.loss"]
        rest = {"student", "seed", "train.betas", "objective.2.loss", "objective.3"}
        assert rest <= set(found)
        assert len(found) == 19

    def test_the_message_is_a_headline_and_a_line_each(self) -> None:
        with pytest.raises(RecipeError) as caught:
            build_recipe({**IMAGES, "train": {"lr": 0, "epochs": "x"}}, command="distill", where="my.yaml")
        head, *lines = str(caught.value).splitlines()
        assert head == "my.yaml: 2 problems"
        assert sorted(lines) == [
            "  train.epochs: got 'x', expected a whole number of at least 1 and at most 1,000,000.",
            "  train.lr: got 0, expected a number greater than 0.",
        ]
        assert caught.value.exit_code == 2

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "x", [1], None])
    def test_a_number_is_a_finite_number(self, value: Any) -> None:
        assert set(problems({**IMAGES, "train": {"lr": value}})) == {"train.lr"}

    def test_a_broken_type_does_not_break_the_other_checks(self) -> None:
        for junk in (None, 3, "x", [], [1], {"a": 1}, [[{}]], True, 1.5, {"model": {}}, {"source": []}):
            for key in Recipe.model_fields:
                if key in ("teacher", "student", "data") and junk == "x":
                    continue
                with contextlib.suppress(UsageError):
                    build_recipe({**FULL, key: junk}, command="distill")


IGNORED = [
    (IMAGES, {"train": {"momentum": 0.9}}, "train.momentum"),
    (IMAGES, {"train": {"nesterov": False}}, "train.nesterov"),
    (IMAGES, {"train": {"optimizer": "adam", "momentum": 0.9}}, "train.momentum"),
    (IMAGES, {"train": {"optimizer": "sgd", "betas": [0.9, 0.999]}}, "train.betas"),
    (IMAGES, {"train": {"optimizer": "sgd", "momentum": 0, "nesterov": True}}, "train.nesterov"),
    (IMAGES, {"data": {"source": "digits", "text": "body"}}, "data.text"),
    (IMAGES, {"data": {"source": "digits", "max_length": 64}}, "data.max_length"),
    (IMAGES, {"data": {"source": "npz:a", "label": "y"}}, "data.label"),
    (IMAGES, {"data": {"source": "npz:a", "text_pair": "y"}}, "data.text_pair"),
    (IMAGES, {"data": {"source": "npz:a", "corrupt": "skip"}}, "data.corrupt"),
    (IMAGES, {"data": {"source": "digits", "test": "a.npz"}}, "data.test"),
    (IMAGES, {"data": {"source": "npz:a", "test": "b", "test_fraction": 0.2}}, "data.test_fraction"),
    (IMAGES, {"data": {"source": "npz:a", "valid": "b", "valid_fraction": 0.1}}, "data.valid_fraction"),
    (TEXTS, {"data": {"source": "csv:a", "augment": "standard"}}, "data.augment"),
    (TEXTS, {"data": {"source": "csv:a", "augment": {"mixup": 0.2}}}, "data.augment"),
    (TEXTS, {"train": {"layout": "channels_last"}}, "train.layout"),
    (IMAGES, {"objective": [{"loss": "cross_entropy"}]}, "objective"),
    (IMAGES, {"train": {"precision": "fp16", "device": "cpu"}}, "train.precision"),
]


@pytest.mark.parametrize(("base", "change", "where"), IGNORED)
def test_a_setting_that_would_be_ignored_is_an_error(base: dict[str, Any], change: dict[str, Any], where: str) -> None:
    build_recipe(base, command="distill")
    assert set(problems({**base, **change})) == {where}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"teacher": "bert-base"}, "teacher"),
        ({"teacher_cache": {"views": 4}}, "teacher_cache"),
        ({"objective": ["kd"]}, "objective.0.loss"),
        ({"data": {"source": "csv:a", "unlabelled": "b"}}, "data.unlabelled"),
        ({"baseline": True}, "baseline"),
    ],
)
def test_what_needs_a_teacher_is_an_error_in_train(change: dict[str, Any], where: str) -> None:
    base = {"student": "bert-base", "data": "csv:a.csv"}
    build_recipe({**base, "baseline": False}, command="train")
    assert set(problems({**base, **change}, "train")) == {where}


def test_only_what_a_person_wrote_counts_as_given() -> None:
    build_recipe({**IMAGES, "train": {"momentum": None}, "data": {"source": "digits", "text": None, "augment": "none"}}, command="distill")


class TestLoading:
    def recipe(self, folder: Path, text: str = "") -> Path:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.csv").write_text("text,label\n")
        (folder / "b.csv").write_text("text,label\n")
        return written(
            folder / "sub", text or "teacher: bert-large\nstudent: {model: bert-base}\ndata: {source: csv:a.csv}\ntrain: {lr: 0.5}\n"
        )

    def test_options_and_sets_win_over_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        sets = ["train.optimizer=sgd", "student.options.layers=[0, 2]", "objective.0.temperature=2", "data.text=no"]
        options = {"lr": "1e-3", "student": "123", "epochs": "3", "baseline": False, "seed": None}
        recipe, base = load_recipe(self.recipe(tmp_path), options, sets, "distill")
        assert base == tmp_path / "sub"
        assert (recipe.train.lr, recipe.train.epochs, recipe.train.optimizer, recipe.baseline) == (1e-3, 3, "sgd", False)
        assert (recipe.student.model, recipe.student.options, recipe.data.text) == ("123", {"layers": [0, 2]}, "no")
        assert recipe.objective[0].model_dump()["temperature"] == 2
        assert recipe.seed == 0

    def test_paths_of_both_kinds_work_together(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        path = self.recipe(tmp_path)
        recipe, base = load_recipe(path, {}, [], "distill")
        assert (base / recipe.data.source.removeprefix("csv:")).is_file()
        recipe, base = load_recipe(path, {"data": "b.csv"}, ["data.test=sub/a.csv"], "distill")
        assert recipe.data.source == f"csv:{tmp_path / 'b.csv'}"
        assert recipe.data.test == str(tmp_path / "sub" / "a.csv")

    def test_absolute_recipes_mean_the_same_everywhere(self, tmp_path: Path) -> None:
        (tmp_path / "local").mkdir()
        data = {
            "teacher": {"model": "run:runs/t", "weights": "w.safetensors"},
            "student": "python:my/models.py:build",
            "data": {"source": "npz:a.npz", "test": "b.npz"},
        }
        recipe = absolute(build_recipe(data, command="distill"), tmp_path)
        assert recipe.teacher is not None
        assert recipe.teacher.model == f"run:{tmp_path / 'runs' / 't'}"
        assert recipe.teacher.weights == str(tmp_path / "w.safetensors")
        assert recipe.student.model == f"python:{tmp_path / 'my' / 'models.py'}:build"
        assert (recipe.data.source, recipe.data.test) == (f"npz:{tmp_path / 'a.npz'}", str(tmp_path / "b.npz"))
        assert absolute(recipe, Path("/elsewhere")) == recipe
        others = build_recipe({"teacher": "local", "student": "timm:resnet18", "data": "digits"}, command="distill")
        moved = absolute(others, tmp_path)
        assert moved.teacher is not None
        assert (moved.teacher.model, moved.student.model, moved.data.source) == (str(tmp_path / "local"), "timm:resnet18", "digits")

    def test_temp_and_alpha_are_the_formula(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        options = {"teacher": "a", "student": "b", "data": "digits", "temp": "6.0", "alpha": "0.7"}
        terms = [t.model_dump() for t in load_recipe(None, options, [], "distill")[0].objective]
        assert terms == [{"loss": "kd", "weight": 0.7, "temperature": 6.0}, {"loss": "cross_entropy", "weight": 0.3}]
        terms = [t.model_dump() for t in load_recipe(None, {**options, "alpha": "1"}, [], "distill")[0].objective]
        assert terms == [{"loss": "kd", "weight": 1, "temperature": 6.0}]

    def test_fit_teacher_leaves_a_given_training_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        options = {"teacher": "a", "student": "b", "data": "digits", "fit_teacher": True}
        recipe, _ = load_recipe(None, options, [], "distill")
        assert recipe.teacher is not None
        assert recipe.teacher.train is not None
        assert (recipe.teacher.train.epochs, recipe.teacher.train.if_needed) == (3, True)
        recipe, _ = load_recipe(written(tmp_path, "teacher: {model: a, train: {epochs: 5}}\n"), {**options, "teacher": None}, [], "distill")
        assert recipe.teacher is not None
        assert recipe.teacher.train is not None
        assert (recipe.teacher.train.epochs, recipe.teacher.train.if_needed) == (5, False)

    def test_problems_are_told_where_they_were_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        path = self.recipe(tmp_path, "teacher: a\nstudent: b\ndata: {source: csv:none.csv}\ntrain: {epochs: -1}\n")
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, {"lr": "x", "temp": "0"}, ["train.batch_size=0"], "distill")
        assert {p.where for p in caught.value.problems} == {"data.source", "train.epochs", "--lr", "--temp", "--set train.batch_size"}

    def test_a_folder_of_images_is_recognised(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "photos" / "train").mkdir(parents=True)
        recipe, _ = load_recipe(None, {"student": "b", "data": "photos"}, [], "train")
        assert (recipe.data.source, recipe.task) == ("imagefolder:photos", "image-classification")


def test_an_automatic_batch_is_the_customary_one_in_as_few_cuts_as_fit() -> None:
    def read(task: str, **train: Any) -> tuple[Any, Any, float]:
        data = "csv:a.csv" if task == "text-classification" else "digits"
        recipe = build_recipe({"student": "a", "data": data, "task": task, "train": train}, command="train")
        again = build_recipe(yaml.safe_load(recipe.to_yaml()), command="train")
        assert again == recipe
        return recipe.train.batch_size, recipe.train.accumulate, recipe.train.lr

    assert read("image-classification", batch_size="auto") == (128, "auto", 1e-3)
    assert read("text-classification", batch_size="auto") == (32, "auto", 5e-5)
    assert read("text-classification", batch_size="auto", accumulate="auto", lr=1.0) == (32, "auto", 1.0)
    assert read("image-classification", batch_size=64, accumulate="auto") == (64, "auto", 1e-3)
    assert read("image-classification") == (128, 1, 1e-3)


class TestSchema:
    def test_editors_accept_what_is_accepted_and_no_more(self) -> None:
        validator = pytest.importorskip("jsonschema").Draft202012Validator
        schema = json_schema()
        validator.check_schema(schema)
        check = validator(schema)
        for data, command in ((IMAGES, "distill"), (FULL, "distill"), ({"student": "a", "data": "digits"}, "train")):
            assert [e.message for e in check.iter_errors(data)] == []
            complete = yaml.safe_load(build_recipe(data, command=command).to_yaml())
            assert [f"{list(e.absolute_path)}: {e.message}" for e in check.iter_errors(complete)] == []
        for right in ({"batch_size": "auto"}, {"accumulate": "auto"}, {"gradient_checkpointing": ["blocks.*"]}):
            assert [e.message for e in check.iter_errors({**IMAGES, "train": right})] == []
        for wrong in (
            {"train": {"batch_size": "all"}},
            {"train": {"lr": 0}},
            {"train": {"epoch": 1}},
            {"objective": [{"loss": "kdd"}]},
            {"objective": [{"loss": "kd", "weight": "papers"}]},
            {"seed": -1},
            {"x": 1},
        ):
            assert list(check.iter_errors({**IMAGES, **wrong})), wrong

    def test_a_schedule_is_read_as_one(self) -> None:
        recipe = build_recipe(FULL, command="distill")
        assert isinstance(recipe.objective[0].weight, Schedule)


READY = sorted((Path(__file__).parents[2] / "src" / "limbeck" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", READY, ids=lambda p: p.stem)
def test_the_ready_recipes_are_right(path: Path) -> None:
    data = read_yaml(path)
    build_recipe(data, command="distill" if "teacher" in data else "train")
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("changes", "lr", "batch_size"),
    [
        ({"data": "digits"}, 1e-3, 128),
        ({"data": "csv:x.csv"}, 5e-5, 32),
        ({"data": "csv:x.csv", "train": {"lr": 1e-4, "batch_size": 8}}, 1e-4, 8),
        ({"data": "digits", "train": {"optimizer": "sgd"}}, 0.05, 128),
    ],
)
def test_the_learning_rate_that_is_not_given_fits_what_is_trained(changes: dict[str, Any], lr: float, batch_size: int) -> None:
    found = build_recipe({"student": "x", "teacher": "y", **changes}, command="distill").train
    assert (found.lr, found.batch_size) == (lr, batch_size)
