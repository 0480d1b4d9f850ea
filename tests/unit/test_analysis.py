"""The analysis of answers, judged by sklearn and torchmetrics, and the pages that are made of runs' files."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score
from torchmetrics.functional.classification import multiclass_calibration_error

from limbeck.analysis import analyse
from limbeck.errors import UsageError
from limbeck.evaluate import metrics
from limbeck.report import render, write_report


def _load_fake_runs() -> Any:
    if "fake_runs" not in sys.modules:
        spec = importlib.util.spec_from_file_location("fake_runs", Path(__file__).parents[1] / "fake_runs.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["fake_runs"] = module
        spec.loader.exec_module(module)
    return sys.modules["fake_runs"]


fake = _load_fake_runs()
CLASSES = ("a", "b", "c", "d")


def answers(seed: int = 0, n: int = 400) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    logits = {role: rng.normal(size=(n, 4)) * 2 for role in ("teacher", "baseline", "student")}
    for role, skill in (("teacher", 4.0), ("baseline", 1.0), ("student", 2.0)):
        logits[role][np.arange(n), labels] += skill
    return labels, logits


def analysed(labels: Any, logits: Any, limit: int = 24) -> dict[str, Any]:
    found = analyse(labels=labels, logits=logits, classes=CLASSES, sample=lambda i: {"text": f"item {i}"}, limit=limit)
    json.dumps(found, allow_nan=False)  # ready for JSON
    return found


# -- analysis -------------------------------------------------------------------------------------------------------------------


def test_accuracy_classes_and_confusions_are_those_of_sklearn() -> None:
    labels, logits = answers()
    found = analysed(labels, logits)
    assert found["items"] == 400
    assert found["support"] == np.bincount(labels).tolist()
    for role, values in logits.items():
        model, predicted = found["models"][role], values.argmax(1)
        assert model["accuracy"] == pytest.approx((predicted == labels).mean(), abs=1e-6)
        np.testing.assert_allclose(model["class_accuracy"], recall_score(labels, predicted, average=None), atol=1e-6)
        matrix = confusion_matrix(labels, predicted)
        np.fill_diagonal(matrix, 0)
        counted = {(c["label"], c["predicted"]): c["count"] for c in model["confusions"]}
        assert counted == {(i, j): n for (i, j), n in np.ndenumerate(matrix) if n}
        assert [c["count"] for c in model["confusions"]] == sorted(counted.values(), reverse=True)


def test_reliability_bins_hold_every_item_and_give_the_published_calibration_error() -> None:
    labels, logits = answers(1)
    for role, model in analysed(labels, logits)["models"].items():
        probabilities = torch.from_numpy(logits[role]).softmax(-1)
        expected = multiclass_calibration_error(probabilities, torch.from_numpy(labels), num_classes=4, n_bins=15, norm="l1")
        assert model["ece"] == pytest.approx(float(expected), abs=2e-6)
        assert sum(b["count"] for b in model["bins"]) == 400
        assert sum(b["correct"] for b in model["bins"]) == round(400 * model["accuracy"])
        for b in model["bins"]:
            assert b["confidence"] is None or b["low"] <= b["confidence"] <= b["high"]


@pytest.mark.parametrize("case", ["as they come", "classes that nobody answers", "one class", "certain", "undecided"])
def test_metrics_are_those_of_sklearn_and_torchmetrics(case: str) -> None:
    labels, given = answers(3)
    logits = given["student"].astype(np.float64)
    if case == "classes that nobody answers":
        labels, logits = labels % 2, np.concatenate([logits[:, :2] + 20, logits], axis=1)
    elif case == "one class":
        labels = np.zeros_like(labels)
    elif case == "certain":
        logits = logits * 1000
    elif case == "undecided":
        logits = np.zeros_like(logits)
    found = metrics(logits, labels)
    probabilities, predicted = torch.from_numpy(logits).softmax(-1), logits.argmax(1)
    classes = logits.shape[1]
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"), abs=1e-12)
    expected = multiclass_calibration_error(probabilities, torch.from_numpy(labels), num_classes=classes, n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(float(expected), abs=2e-6)
    nll = -(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[np.arange(len(labels)), labels].mean()
    assert found["nll"] == pytest.approx(nll, abs=1e-12)


def test_the_groups_are_those_where_the_answers_differ_and_hold_the_most_confident_items() -> None:
    labels, logits = answers(2)
    samples = analysed(labels, logits, limit=9)["samples"]
    teacher, student = logits["teacher"].argmax(1), logits["student"].argmax(1)
    members = {
        "student_wrong": (teacher == labels) & (student != labels),
        "teacher_wrong": (student == labels) & (teacher != labels),
        "both_wrong": (student != labels) & (teacher != labels) & (student != teacher),
    }
    assert samples["disagree"] == (teacher != student).sum()
    confidence = torch.from_numpy(logits["student"]).softmax(-1).amax(-1).numpy()
    for name, expected in members.items():
        group = samples["groups"][name]
        assert group["count"] == expected.sum()
        for item in group["items"]:
            i = item["index"]
            assert expected[i]
            assert item["text"] == f"item {i}"
            assert item["label"] == labels[i]
            assert item["answers"]["student"] == {"class": student[i], "confidence": pytest.approx(confidence[i], abs=1e-6)}
    shown = [item["index"] for item in samples["groups"]["student_wrong"]["items"]]
    assert shown == sorted(np.flatnonzero(members["student_wrong"]), key=lambda i: -confidence[i])[: len(shown)]
    assert sum(len(group["items"]) for group in samples["groups"].values()) == 9


def test_places_that_a_small_group_leaves_go_to_the_others() -> None:
    labels = np.zeros(20, np.int64)
    teacher, student = np.eye(4)[np.zeros(20, int)] * 9, np.eye(4)[np.ones(20, int)] * 9
    groups = analysed(labels, {"teacher": teacher, "student": student}, limit=12)["samples"]["groups"]
    assert [len(g["items"]) for g in groups.values()] == [12, 0, 0]


def test_without_a_teacher_the_student_own_mistakes_are_shown() -> None:
    labels, logits = answers(3)
    samples = analysed(labels, {"student": logits["student"]})["samples"]
    assert samples["disagree"] is None
    assert list(samples["groups"]) == ["mistakes"]
    assert samples["groups"]["mistakes"]["count"] == (logits["student"].argmax(1) != labels).sum()


def test_items_without_a_label_are_left_out_and_indices_stay_those_of_the_data() -> None:
    labels, logits = answers(4)
    hidden = labels.copy()
    hidden[:100] = -1
    found = analysed(hidden, logits)
    rest = analysed(labels[100:], {role: values[100:] for role, values in logits.items()})
    assert found["models"] == rest["models"]
    assert found["items"] == 300
    shown = [item["index"] for group in found["samples"]["groups"].values() for item in group["items"]]
    assert min(shown) >= 100
    assert shown == [100 + item["index"] for group in rest["samples"]["groups"].values() for item in group["items"]]


def test_nan_logits_count_as_wrong_and_infinite_ones_as_certain() -> None:
    logits = np.array([[np.nan, 5.0, 0, 0], [np.inf, 0, 0, 0], [-np.inf, 2.0, -np.inf, -np.inf], [1e300, 0, 0, 0]])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        model = analysed([0, 0, 1, 0], {"student": logits})["models"]["student"]
    assert model["non_finite"] == 1
    assert model["accuracy"] == 0.75
    assert model["bins"][-1] == {"low": pytest.approx(14 / 15, abs=1e-6), "high": 1.0, "count": 3, "correct": 3, "confidence": 1.0}
    assert model["class_accuracy"][2:] == [None, None]


def test_no_item_at_all_is_not_a_crash() -> None:
    found = analysed(np.full(3, -1), {"teacher": np.zeros((3, 4)), "student": np.zeros((3, 4))})
    assert found["models"]["student"]["accuracy"] is None
    assert found["models"]["student"]["ece"] is None


# -- the page -------------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Text, links to elsewhere, and tags that do not nest."""

    VOID = frozenset({"meta", "link", "img", "br"})
    INLINE = frozenset({"span", "b", "i", "code", "a"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text: list[str] = []
        self.prose: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.broken: list[str] = []
        self.tags: list[str] = []
        self.feed(html)
        self.words = " ".join("".join(self.text).replace("\u202f", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.text.append("" if tag in self.INLINE else " ")
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.text.append("" if tag in self.INLINE else " ")
        if not self.open or self.open.pop() != tag:
            self.broken.append(tag)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)
            if "pre" not in self.open:
                self.prose.append(data)


def page(*runs: Path) -> Page:
    html = render(runs)
    assert len(html) < 1_500_000
    found = Page(html)
    assert found.broken == []
    assert found.open == []
    assert [a for a in found.addresses if not a.startswith(("#", "data:"))] == []
    assert "url(" not in html
    assert not re.search(r"\b(nan|inf|None|undefined)\b", " ".join(found.prose))
    return found


def test_the_page_of_a_run_has_every_section_and_its_own_numbers(tmp_path: Path) -> None:
    run = fake.fake_run(tmp_path / "run", notes=["31 corrupt images were skipped."])
    found = page(run)
    metrics = json.loads((run / "metrics.json").read_text())
    for title in (
        "Results",
        "Training",
        "Class by class",
        "Where student and teacher disagree",
        "Use it",
        "What it cost",
        "Recipe",
        "Environment",
    ):
        assert title in found.words
    for role in ("teacher", "baseline", "student"):
        assert f"{100 * metrics['models'][role]['metrics']['accuracy']:.2f} %" in found.words
    assert f"{100 * metrics['gap_closed']:.0f} % of the gap" in found.words
    assert "31 corrupt images were skipped." in found.words
    assert "# <not a tag> & not an entity" in found.words
    assert 'get_model("resnet18", num_classes=10)' in found.words
    assert f'load_model(model, "{run}/student/model.safetensors")' in found.words
    assert f"limbeck distill {run}/recipe.yaml --out {run}-again" in found.words
    assert found.tags.count("img") == 24


def test_the_verdict_of_the_metrics_is_on_the_page_word_for_word(tmp_path: Path) -> None:
    run = fake.fake_run(tmp_path / "run")
    sentence = json.loads((run / "metrics.json").read_text())["verdict"]
    assert f'content="{sentence}"' in render([run])
    assert sentence.split(": ", 1)[1][1:] in page(run).words


def test_a_teacher_no_better_than_the_baseline_is_said_loudly(tmp_path: Path) -> None:
    run = fake.fake_run(tmp_path / "run", skill={"teacher": 1.0})
    found = page(run)
    assert "Mind the teacher." in found.words
    assert "of the gap between baseline and teacher closed" not in found.words
    assert "Mind the teacher." not in page(fake.fake_run(tmp_path / "good")).words


@pytest.mark.parametrize(
    ("gain", "bounds", "tone"),
    [(0.02, [0.01, 0.03], "good"), (0.02, [-0.01, 0.05], "unclear"), (-0.02, [-0.04, 0.01], "bad"), (0.02, None, "good")],
)
def test_the_tone_follows_the_interval(tmp_path: Path, gain: float, bounds: list[float] | None, tone: str) -> None:
    run = fake.fake_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["models"]["student"]["metrics"]["accuracy"] = metrics["models"]["baseline"]["metrics"]["accuracy"] + gain
    metrics["interval"] = bounds and {"student_minus_baseline": bounds}
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert f'<section class="hero {tone}">' in render([run])


def test_the_best_value_of_each_row_is_marked(tmp_path: Path) -> None:
    html = render([fake.fake_run(tmp_path / "run")])
    table = html[html.index('<table class="results">') :].split("</table>")[0]
    marked = [[("best" in cell) for cell in re.findall(r"<td.*?</td>", row)] for row in table.split("<tr>")[2:]]
    assert marked[0] == [True, False, False]  # accuracy: the teacher's
    assert marked[4] == [False, False, False]  # agreement: nothing to compare with
    assert marked[5] == [False, True, True]  # parameters


def test_runs_without_teacher_or_baseline(tmp_path: Path) -> None:
    trained = page(fake.fake_run(tmp_path / "trained", roles=("student",)))
    assert "Where the model is wrong" in trained.words
    assert "limbeck train" in trained.words
    assert "teacher and student" not in trained.words
    alone = page(fake.fake_run(tmp_path / "alone", roles=("teacher", "student")))
    assert "differs from the teacher's" in alone.words


@pytest.mark.parametrize(("classes", "kind"), [(2, "text"), (1000, "image"), (31, "tensor")])
def test_any_number_of_classes(tmp_path: Path, classes: int, kind: str) -> None:
    found = page(fake.fake_run(tmp_path / "run", classes=classes, kind=kind, items=1500))
    assert ("classes between" in found.words) == (classes > 30)
    if kind == "text":
        assert "AutoTokenizer.from_pretrained" in found.words


def test_everything_from_data_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    run = fake.fake_run(
        tmp_path / "run", classes=[evil, "b & c", '"><img src=x onerror=alert(1)>', "z" * 400], notes=[evil], kind="text", student=evil
    )
    analysis = json.loads((run / "analysis.json").read_text())
    for group in analysis["samples"]["groups"].values():
        for item in group["items"]:
            item["text"] = evil
            item["png"] = '"><script>'
    (run / "analysis.json").write_text(json.dumps(analysis))
    (run / "environment.json").write_text(json.dumps({evil: {evil: [evil]}}))
    found = page(run)
    assert found.tags.count("script") == 1
    assert "img" not in found.tags
    assert evil in found.words


def test_unknown_values_are_dashes_and_missing_files_are_not_shown(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    empty = {"metrics": {"accuracy": None, "nll": float("nan")}, "latency_ms": None, "parameters": None}
    (run / "metrics.json").write_text(json.dumps({"models": {"teacher": empty, "student": empty}, "gap_closed": None, "interval": None}))
    found = page(run)
    assert "Recipe" not in found.words
    known = fake.fake_run(tmp_path / "known")
    metrics = json.loads((known / "metrics.json").read_text())
    metrics["models"]["teacher"]["flops"] = None
    (known / "metrics.json").write_text(json.dumps(metrics))
    assert "as torch counts them – 41.3 M 41.3 M" in page(known).words


def test_seeds_are_shown_with_their_spread_and_the_parent_borrows_from_the_best_seed(tmp_path: Path) -> None:
    parent = fake.fake_seeds(tmp_path / "run", 3)
    found = page(parent)
    metrics = json.loads((parent / "metrics.json").read_text())
    accuracies = [
        json.loads((parent / f"seed-{i}" / "metrics.json").read_text())["models"]["student"]["metrics"]["accuracy"] for i in range(3)
    ]
    for value in [*accuracies, float(np.mean(accuracies))]:
        assert f"{100 * value:.2f} %" in found.words
    assert f"± {100 * np.std(accuracies, ddof=1):.2f}" in found.words
    assert metrics["best_seed"] == 1
    best = json.loads((parent / "seed-1" / "analysis.json").read_text())
    assert "Of the run with seed 1, the best on validation." in found.words
    assert f"different answers to {best['samples']['disagree']} of 600" in found.words


def test_several_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    runs = [fake.fake_run(tmp_path / f"t{t}", temperature=t, seed=int(t)) for t in (1.0, 4.0)]
    found = page(*runs)
    assert "objective.0.temperature 1.0 4.0" in found.words
    assert "task" not in found.words.split("Where the recipes differ")[1].split("Each run")[0]
    for run in runs:
        assert str(run) in found.words
    assert "Not alike" not in found.words
    other = fake.fake_run(tmp_path / "other", items=500)
    assert "different numbers of test items (500, 600)" in page(runs[0], other).words
    same = [fake.fake_run(tmp_path / side / "run") for side in "ab"]
    assert "a/run" in page(*same).words


def test_curves_take_the_later_line_of_a_step_and_pass_over_what_is_cut_off(tmp_path: Path) -> None:
    from limbeck.report import _curves, _read

    run = fake.fake_run(tmp_path / "run")
    lines = [
        {"role": "student", "step": 1, "loss": 5.0},
        {"role": "student", "step": 2, "loss": None},
        {"role": "student", "step": 1, "loss": 3.0},
    ]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"role": "student", "step": 3, "lo')
    found = _curves.losses(_read.read_runs([run]), "student")
    assert found is not None
    assert found.seeds == [[(1.0, 3.0)]]


def test_means_over_seeds_are_taken_where_all_have_a_value() -> None:
    from limbeck.report import _curves

    line = _curves.line(_curves.Curve("x", "x", [[(1.0, 2.0), (2.0, 4.0)], [(1.0, 4.0), (3.0, 1.0)]]))
    assert line.bold == ([1.0], [3.0])
    assert len(line.faint) == 2


def test_wrong_folders_are_all_named_at_once(tmp_path: Path) -> None:
    run = fake.fake_run(tmp_path / "run-one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.json").write_text("{")
    with pytest.raises(UsageError) as caught:
        write_report([run, tmp_path / "run-onee", tmp_path / "empty", tmp_path / "broken"], tmp_path / "report.html")
    assert len(caught.value.problems) == 3
    assert "Did you mean 'run-one'?" in str(caught.value)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(UsageError):
        write_report([], tmp_path / "report.html")


def test_the_same_files_give_the_same_page_and_a_folder_gets_report_html(tmp_path: Path) -> None:
    run = fake.fake_run(tmp_path / "run")
    assert write_report([run], tmp_path / "new" / "page.html").read_bytes() == write_report([run], run).read_bytes()
    assert (run / "report.html").is_file()


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"spec": {"model": "timm:resnet50"}, "preprocessing": {"kind": "image", "channels": 1, "mean": [0.5], "std": [0.5]}},
            "in_chans=1",
        ),
        ({"spec": {"model": "timm:resnet50", "options": {"layers": [0]}}}, "load_saved("),
        (
            {"spec": {"model": "python:nets/small.py:net", "options": {"width": 8}}},
            'student/small.py")["net"] model = net(num_classes=10, width=8)',
        ),
        ({"spec": {"model": "python:my.nets:net"}}, "from my.nets import net"),
        (
            {"kind": "torchvision", "spec": {"model": "run:runs/a"}, "build": {"name": "resnet34", "arguments": {}, "cuts": []}},
            'get_model("resnet34"',
        ),
        ({"kind": "module", "spec": {"model": "Net"}}, "your own module"),
    ],
)
def test_the_code_that_loads_a_student_is_that_of_its_library(tmp_path: Path, record: dict[str, Any], expected: str) -> None:
    run = fake.fake_run(tmp_path / "run")
    (run / "student" / "model.json").write_text(json.dumps({"classes": list("abcdefghij"), **record}))
    assert expected in page(run).words


def test_the_code_on_the_page_loads_the_student_and_gives_its_answers(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    from limbeck.report import _code, _read

    run = fake.fake_run(tmp_path / "a run's folder")
    source = (
        "from torch import nn\n\n\n"
        "def net(num_classes, width):\n    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(4 * width, num_classes))\n"
    )
    (run / "student" / "small.py").write_text(source)
    made: dict[str, Any] = {}
    exec(source, made)
    model = made["net"](10, width=2)
    save_model(model, str(run / "student" / "model.safetensors"))
    record = {"spec": {"model": "python:nets/small.py:net", "options": {"width": 2}}, "classes": list("abcdefghij")}
    prepared = {"kind": "image", "channels": 3, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "height": 4, "width": 4}
    (run / "student" / "model.json").write_text(json.dumps({**record, "preprocessing": prepared}))

    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    names: dict[str, Any] = {"images": images}
    exec(_code.snippets(_read.read_runs([run])[0])[0].code, names)
    x = (images.numpy() / 255 - np.reshape([0.5, 0.4, 0.3], (3, 1, 1))) / np.reshape([0.2, 0.3, 0.4], (3, 1, 1))
    torch.testing.assert_close(names["logits"], model(torch.from_numpy(x).float()), rtol=1e-4, atol=1e-5)


def test_many_classes_take_little_more_than_their_logits() -> None:
    """Metrics and analysis of 2,000 samples of 4,000 classes: 64 MB of logits, and no second copy of them."""
    import tracemalloc

    from limbeck.evaluate import metrics

    logits = np.random.default_rng(0).normal(size=(2000, 4000))
    labels = np.arange(2000)
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(2000), labels]
    tracemalloc.start()
    try:
        found = analyse(labels=labels, logits={"student": logits}, classes=[str(c) for c in range(4000)], sample=lambda i: {"text": ""})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 8 * (1 << 22) + (8 << 20)  # a few arrays of a piece
    assert metrics(logits, labels)["nll"] == pytest.approx(expected.mean(), rel=1e-12)
    assert found["models"]["student"]["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean(), abs=1e-6)
