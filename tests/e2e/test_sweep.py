"""limbeck sweep: every combination is the run that it says it is, on one pass of the teacher and one baseline a student and seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from limbeck import _choices, _sweep_share, spine
from limbeck import sweep as sweeping
from limbeck._begin import Job
from limbeck._vary import read_vary
from limbeck.engine import Engine
from running import limbeck, make_folder, read, recipe, run, weights

OBJECTIVE = [{"loss": "kd", "weight": 0.7, "temperature": 4.0}, {"loss": "cross_entropy", "weight": 0.3}]
VARY = ("--vary", "objective.0.temperature=2,8", "--vary", "student.model=python:nets.py:student,python:nets.py:plain")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_folder(tmp_path)


def sweep(*arguments: Any, out: Path) -> dict[str, Any]:
    assert limbeck("sweep", *arguments, "--out", out) == 0
    return dict(read(out / "sweep.json"))


def test_each_combination_is_the_run_alone_and_the_teacher_is_asked_once(here: Path) -> None:
    """Students, baselines and metrics of a sweep are those of `limbeck distill` with the same settings, to the byte."""
    run("train", recipe(here, "teacher.yaml", teacher=None, student={"model": "python:nets.py:teacher"}), out=here / "teacher")
    learned = {"teacher": {"model": "run:teacher"}, "objective": OBJECTIVE}
    found = sweep(recipe(here, **learned), *VARY, "--seeds", "2", out=here / "sweep")
    assert [row["values"]["objective.0.temperature"] for row in found["rows"]] == ["2", "2", "8", "8"]
    assert found["seeds"] == [0, 1]
    for row in found["rows"]:
        name, temperature = row["values"]["student.model"], float(row["values"]["objective.0.temperature"])
        own = {**learned, "student": {"model": name}, "objective": [{**OBJECTIVE[0], "temperature": temperature}, OBJECTIVE[1]]}
        alone = run("distill", recipe(here, "alone.yaml", **own), "--seeds", "2", out=here / f"alone-{row['name']}")
        for seed in (0, 1):
            for role in ("student", "baseline"):
                swept = here / "sweep" / row["folder"] / f"seed-{seed}" / role
                assert weights(swept) == weights(here / f"alone-{row['name']}" / f"seed-{seed}" / role), (row["name"], role)
        assert row["student"] == alone["models"]["student"]["metrics"]["accuracy"]
        assert row["baseline"] == alone["models"]["baseline"]["metrics"]["accuracy"]
        assert row["interval"] == alone["interval"]["student_minus_baseline"]
    # 48 training rows and 18 test rows once; then its speed is measured on a few; the other combinations do not load it
    assert 48 + 18 <= found["rows"][0]["cost"]["teacher_items"] < 48 + 18 + 64 * 60
    assert [row["cost"]["teacher_items"] for row in found["rows"][1:]] == [0, 0, 0]
    assert [row["cost"]["cache_hits"] for row in found["rows"]] == [2 * 2 * 48] * 4
    # baselines are trained with the first temperature alone
    assert [row["cost"]["baseline_seconds"] > 0 for row in found["rows"]] == [True, True, False, False]


def test_a_teacher_that_is_loaded_each_time_is_compared_with_its_answers_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the sweep that filled them not at all; by one that found them in its first combination; and for each directory anew."""
    path = recipe(here, objective=OBJECTIVE, baseline=False, teacher_cache={"path": str(here / "cache")})
    vary = ("--vary", "objective.0.temperature=2,8,4")
    sweep(path, *vary, out=here / "first")
    assert "were compared" not in capsys.readouterr().err
    sweep(path, *vary, out=here / "second")
    assert capsys.readouterr().err.count("teach answers in") == 1
    sweep(path, "--vary", "teacher_cache.codec=float16,float32", *vary, out=here / "third")
    said = capsys.readouterr().err
    assert said.count("teach answers in") == 1  # of float16; those of float32 were not there
    assert said.count("48 answers") == 1


def test_what_an_earlier_combination_only_read_is_compared_when_the_teacher_is_loaded(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache that has all that the first combination wants; the second one adds to it."""
    run("train", recipe(here, "teacher.yaml", teacher=None, student={"model": "python:nets.py:teacher"}), out=here / "teacher")
    changes = {"teacher": {"model": "run:teacher"}, "data": {"augment": {"crop": 1}}, "baseline": False, "objective": OBJECTIVE}
    path = recipe(here, **changes, teacher_cache={"path": str(here / "cache"), "views": 3})
    run("distill", path, "--set", "train.epochs=1", out=here / "one")
    capsys.readouterr()
    sweep(path, "--vary", "train.epochs=1,3", out=here / "swept")
    first, _, second = capsys.readouterr().err.partition("[2/2]")
    assert "teach answers in" not in first  # the teacher is not loaded
    assert "teach answers in" in second


def test_the_best_on_validation_stands_on_top_with_its_recipe(here: Path) -> None:
    changes = {"objective": OBJECTIVE, "export": ["torchscript"], "train": {"epochs": 3}}
    found = sweep(recipe(here, **changes), "--vary", "train.lr=1e-4,0.05,0.02", out=here / "sweep")
    reached = {row["name"]: (row["validation"]["accuracy"], -row["validation"]["nll"]) for row in found["rows"]}
    assert found["best"] == max(reached, key=lambda name: reached[name])
    assert len(set(reached.values())) == 3
    best = next(row for row in found["rows"] if row["name"] == found["best"])
    assert weights(here / "sweep/student") == weights(here / "sweep" / best["folder"] / "student")
    metrics = read(here / "sweep/metrics.json")
    assert metrics["models"]["student"]["metrics"]["accuracy"] == best["student"]
    assert (here / "sweep" / metrics["export"]["torchscript"]["file"]).is_file()
    written = yaml.safe_load((here / "sweep/recipe.yaml").read_text())
    assert written["train"]["lr"] == float(best["values"]["train.lr"])
    assert written["export"] == ["torchscript"]
    again = run("distill", here / "sweep/recipe.yaml", out=here / "again")
    assert again["models"]["student"]["metrics"] == metrics["models"]["student"]["metrics"]
    assert weights(here / "again/student") == weights(here / "sweep/student")
    assert limbeck("evaluate", here / "sweep") == 0
    page = (here / "sweep/report.html").read_text(encoding="utf-8")
    for row in found["rows"]:
        assert f"{row['folder']}/report.html" in page


def test_a_sweep_that_was_stopped_goes_on_and_a_finished_one_does_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (recipe(here, objective=OBJECTIVE), "--vary", "temperature=2", "--vary", "objective.0.weight=0.2,0.9")
    given = (given[0], "--vary", "objective.0.temperature=2,3", "--vary", "objective.0.weight=0.2,0.9")
    whole = sweep(*given, out=here / "whole")
    real, calls = sweeping.execute, []

    def third_fails(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "execute", third_fails)
        assert limbeck("sweep", *given, "--out", here / "cut") == 130
        assert not (here / "cut/sweep.json").exists()
        assert limbeck("sweep", *given, "--out", here / "cut") == 2, "an existing folder without --resume"
        before = {p: p.stat().st_mtime_ns for p in (here / "cut/runs").rglob("model.safetensors")}
        assert limbeck("sweep", *given, "--out", here / "cut", "--resume") == 0
        assert len(calls) == 3 + 2
    assert {p: p.stat().st_mtime_ns for p in before} == before
    cut = read(here / "cut/sweep.json")
    for row in (*whole["rows"], *cut["rows"]):
        row.pop("cost"), row.pop("latency_ms")
    assert cut["rows"] == whole["rows"]
    assert cut["best"] == whole["best"]
    assert limbeck("sweep", *given, "--out", here / "cut", "--resume") == 0
    other = (given[0], "--vary", "objective.0.temperature=2,5", "--vary", "objective.0.weight=0.2,0.9")
    assert limbeck("sweep", *other, "--out", here / "cut", "--resume") == 2


def test_temp_and_alpha_are_varied_as_the_command_line_says_them(here: Path) -> None:
    found = sweep(recipe(here), "--vary", "temp=2,6", "--vary", "alpha=0.5", "--no-baseline", out=here / "sweep")
    assert [row["baseline"] for row in found["rows"]] == [None, None]
    made = yaml.safe_load((here / "sweep" / found["rows"][1]["folder"] / "recipe.yaml").read_text())["objective"]
    assert [(t["loss"], t["weight"]) for t in made] == [("kd", 0.5), ("cross_entropy", 0.5)]
    assert made[0]["temperature"] == 6.0


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a.b=1,2"], {"a.b": ["1", "2"]}),
        (["a=[1, 2]"], {"a": ["1", "2"]}),
        (["a={crop: 1, flip: true},none"], {"a": ["{crop: 1, flip: true}", "none"]}),
        (["a=[[1, 2], [3]]", "b='x, y',z"], {"a": ["[1, 2]", "[3]"], "b": ["'x, y'", "z"]}),
    ],
)
def test_values_are_cut_at_commas_outside_brackets_and_quotes(texts: list[str], expected: dict[str, list[str]]) -> None:
    assert read_vary(texts) == (expected, [])


@pytest.mark.parametrize(
    ("vary", "told"),
    [
        ((), "--vary: is missing"),
        (("objective.0.temperature",), "expected KEY=VALUE,VALUE"),
        (("train.lr=0.1,0.1",), "0.1 more than once"),
        (("train.lr=0.1,",), "empty value"),
        (("train.lr=0.1", "train.lr=0.2"), "given twice"),
        (("seed=1,2",), "Take several seeds with --seeds N."),
        (("train.lrr=1,2",), "lrr"),
        (("train.epochs=2,0", "train.lr=1e-3,-1"), "2 problems"),
        (("objective.0.temperature=2,-4",), "--vary objective.0.temperature"),
    ],
)
def test_mistakes_are_told_at_once_and_nothing_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], vary: tuple[str, ...], told: str
) -> None:
    arguments = [x for v in vary for x in ("--vary", v)]
    assert limbeck("sweep", recipe(here, objective=OBJECTIVE), *arguments, "--out", here / "sweep") == 2
    said = capsys.readouterr().err
    assert told in said, said
    assert "Traceback" not in said
    assert not (here / "sweep").exists()


def test_json_is_one_document(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert limbeck("sweep", recipe(here), "--vary", "train.lr=0.1,0.01", "--out", here / "sweep", "--json") == 0
    assert json.loads(capsys.readouterr().out)["best"] == read(here / "sweep/sweep.json")["best"]


def test_temp_and_alpha_are_about_the_classic_terms_of_a_recipe(here: Path) -> None:
    file = recipe(here, objective=[{"loss": "cross_entropy", "weight": 0.3, "label_smoothing": 0.1}, {"loss": "kd", "weight": 0.7}])
    found = sweep(file, "--vary", "temp=3", "--vary", "alpha=0.9", "--no-baseline", out=here / "sweep")
    made = yaml.safe_load((here / "sweep" / found["rows"][0]["folder"] / "recipe.yaml").read_text())["objective"]
    assert made == [
        {"loss": "cross_entropy", "weight": 0.1, "label_smoothing": 0.1},
        {"loss": "kd", "weight": 0.9, "temperature": 3.0},
    ]


def test_a_teacher_that_has_to_be_trained_is_trained_once(here: Path) -> None:
    learned = {"teacher": {"model": "python:nets.py:teacher", "train": {"epochs": 2}}, "objective": OBJECTIVE}
    found = sweep(recipe(here, **learned), "--vary", "objective.0.temperature=2,5,8", out=here / "sweep")
    folders = [here / "sweep" / row["folder"] for row in found["rows"]]
    assert [(folder / "teacher").is_dir() for folder in folders] == [True, False, False]
    told = [read(folder / "environment.json")["facts"]["teacher"] for folder in folders]
    assert [read(folders[0] / "teacher/model.json")["weights_sha256"]] * 2 == told[1:]
    assert found["rows"][0]["teacher"] == found["rows"][1]["teacher"]
    # the second finds the answers of an object among those of a run, and this very sweep has asked for them; the third knows them by the run's files
    assert [row["cost"]["teacher_items"] for row in found["rows"][1:]] == [0, 0]
    assert limbeck("sweep", recipe(here, **learned), "--vary", "objective.0.temperature=2,5,8", "--out", here / "sweep", "--resume") == 0


def test_what_is_varied_is_what_runs_where_the_rest_is_measured(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout that is varied is no other combination's choice, and has a baseline of its own; what is measured is measured once for what is alike,
    and the teacher's own choice is not the student's."""
    measured: list[str] = []

    def measure(candidates: list[Engine], prepare: Any) -> tuple[Engine, dict[str, Any]]:
        role = prepare.__qualname__.partition("_")[0]
        measured.append(role)
        best = {"teacher": "float32", "student": "bf16"}[role]
        return next(c for c in candidates if c.precision == best), {"measured": [], "reason": "measured"}

    monkeypatch.setattr(_choices, "measure", measure)
    file = recipe(here, objective=OBJECTIVE, train={"precision": "auto"}, teacher_cache={"mode": "off"})
    vary = ("--vary", "train.layout=channels_first,channels_last", "--vary", "objective.0.temperature=2,6")
    found = sweep(file, *vary, out=here / "sweep")
    made = [read(here / "sweep" / row["folder"] / "environment.json") for row in found["rows"]]
    assert [m["layout"] for m in made] == [row["values"]["train.layout"] for row in found["rows"]]
    assert [m["precision"] for m in made] == ["bf16"] * 4
    assert [m["teacher_precision"] for m in made] == ["float32"] * 4
    assert measured.count("student") == 2, "once for each layout"
    reasons = [m["choices"]["student"]["reason"] for m in made]
    assert reasons == [why for i in (0, 2) for why in ("measured", f"as measured in {found['rows'][i]['name']}")]
    assert [row["cost"]["baseline_seconds"] > 0 for row in found["rows"]] == [True, False, True, False]
    folders = [here / "sweep" / row["folder"] for row in found["rows"]]
    speeds = [read(folder / "metrics.json")["models"][role] for folder in folders for role in ("student", "baseline")]
    named = [None, None, str(folders[0]), str(folders[0]), None, None, str(folders[2]), str(folders[2])]
    assert [speed["latency_ms"].get("from") for speed in speeds] == named
    assert [speed["throughput"].get("from") for speed in speeds] == named


TRAINED = {"teacher": {"model": "python:nets.py:teacher", "train": {"epochs": 1, "lr": 0.01}}}


@pytest.mark.parametrize(
    ("vary", "trainings"),
    [
        ("train.lr=0.05,0.02", 1),  # the teacher's own is given
        ("train.ema=0.5,0.9", 1),  # the student's alone
        ("teacher.precision=float32,bf16", 1),  # how it is asked, later
        ("train.batch_size=16,12", 2),
        ("teacher.train.epochs=1,2", 2),
        ("objective.1.label_smoothing=0.0,0.2", 2),  # its own cross entropy is the recipe's
        ("data.labelled_limit=30,40", 2),
    ],
)
def test_a_teacher_is_trained_again_where_its_own_training_is_varied(here: Path, vary: str, trainings: int) -> None:
    """Once where it is not; and each is the teacher of that combination alone."""
    file = recipe(here, **TRAINED, objective=OBJECTIVE, teacher_cache={"mode": "off"})
    found = sweep(file, "--vary", vary, "--no-baseline", out=here / "sweep")
    folders = [here / "sweep" / row["folder"] for row in found["rows"]]
    assert [(folder / "teacher").is_dir() for folder in folders] == [True, trainings == 2]
    key, _, values = vary.partition("=")
    alone = run("distill", file, "--set", f"{key}={values.split(',')[1]}", "--no-baseline", out=here / "alone")
    own = read(here / "alone/teacher/model.json")["weights_sha256"]
    assert read(folders[trainings - 1] / "teacher/model.json")["weights_sha256"] == own
    assert found["rows"][1]["student"] == alone["models"]["student"]["metrics"]["accuracy"]


def test_everything_that_is_wrong_is_told_before_the_first_step(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of later combinations too, all at once, each with the values that have it: models, layers, data, the cache."""
    (here / "nets.py").write_text((here / "nets.py").read_text() + "\n\ndef four():\n    return Net(4, 4)\n", encoding="utf-8")
    np.savez(here / "broken.npz", train_x=np.zeros((4, 8, 8), np.uint8))
    hint = {"loss": "hint", "weight": 1.0, "teacher": "body", "student": "body"}
    monkeypatch.setattr(sweeping, "execute", lambda *_, **__: pytest.fail("a combination was begun"))
    file = recipe(here, objective=[*OBJECTIVE, hint])
    arguments = (
        *("--vary", "objective.2.student=body,bodi", "--vary", "data.source=npz:pictures.npz,npz:broken.npz"),
        *("--vary", "student.model=python:nets.py:student,python:nets.py:four"),
    )
    assert limbeck("sweep", file, *arguments, "--set", "teacher.model=python:nets.py:four", "--out", here / "sweep") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "--vary data.source=npz:broken.npz: " in said, said
    assert said.count("'bodi' is not a layer of Net. Did you mean 'body'?") == 1, said
    assert "four" in said, said
    assert not (here / "sweep").exists()


def test_a_later_value_that_cannot_be_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--vary", "objective.0.temperature=2,4", "--vary", "student.model=python:nets.py:student,python:nets.py:studnet")
    assert limbeck("sweep", recipe(here, objective=OBJECTIVE), *arguments, "--out", here / "sweep") == 2
    said = capsys.readouterr().err
    assert "--vary student.model=python:nets.py:studnet" in said, said
    assert "1 problem" not in said
    assert not (here / "sweep").exists()


def test_models_are_built_once_for_what_differs_in_numbers(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Job] = []
    real = spine.begin

    def begin(job: Job, **more: Any) -> Any:
        begun.append(job)
        return real(job, **more)

    monkeypatch.setattr(_sweep_share, "begin", begin)
    monkeypatch.setattr(spine, "begin", begin)
    file = recipe(here, objective=OBJECTIVE, teacher_cache={"path": "cache"})
    given = (file, "--vary", "objective.0.temperature=2,4", "--vary", "train.lr=0.05,0.01", "--no-baseline")
    sweep(*given, out=here / "sweep")
    # once for all to be judged, which the first goes on with; then each of the others as its turn comes
    assert len(begun) == 4
    begun.clear()
    before = (here / "sweep/report.html").stat().st_mtime_ns
    sweep(*given, "--resume", out=here / "sweep")
    assert begun == []
    assert (here / "sweep/report.html").stat().st_mtime_ns == before


def test_the_plan_of_a_sweep(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many trainings as will be run; one pass of the teacher; the total is the sum of its parts."""
    file = recipe(here, **TRAINED, objective=OBJECTIVE)
    given = (file, *VARY, "--seeds", "2", "--out", here / "sweep")
    assert limbeck("sweep", *given, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert not (here / "sweep").exists()
    assert plan["combinations"] == 4
    assert plan["trainings"] == {"teachers": 1, "students": 8, "baselines": 4}
    assert plan["teacher_passes"] == 1
    assert [one["for"] for one in plan["plans"]] == [[plan["rows"][i]["name"] for i in pair] for pair in ((0, 2), (1, 3))]
    time, plans = plan["time"], plan["plans"]
    assert time["students_seconds"] == pytest.approx(sum(row["student_seconds"] for row in plan["rows"]))
    assert time["baselines_seconds"] == pytest.approx(sum(one["time"]["baseline_seconds"] for one in plans))
    assert time["fill_seconds"] == pytest.approx(max(one["time"]["fill_seconds"] for one in plans))
    assert time["teacher_training_seconds"] == pytest.approx(plans[0]["time"]["teacher_training_seconds"])
    parts = ("teacher_training_seconds", "fill_seconds", "students_seconds", "baselines_seconds")
    assert time["total_seconds"] == pytest.approx(sum(time[part] for part in parts))
    one = plans[1]["time"]
    alone = one["total_seconds"] - one["fill_seconds"] - one["baseline_seconds"] - one["teacher_training_seconds"]
    assert plan["rows"][3]["student_seconds"] == pytest.approx(alone)
