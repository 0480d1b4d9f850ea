"""The command line: quick to answer, one JSON document where asked, exit codes that scripts can rely on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from limbeck import cli
from limbeck._cli_run import call
from limbeck.errors import Interrupted, ParityFailed

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "numpy", "pydantic", "pyarrow", "yaml", "transformers", "torchvision"}
COMMANDS = ("demo", "distill", "train", "evaluate", "export", "report", "serve", "predict", "losses", "models", "recipes", "convert")


def limbeck(*arguments: str) -> int:
    return call(typer.main.get_command(cli.app), arguments, "limbeck")


def process(*arguments: str, cwd: Path, script: str | None = None) -> subprocess.CompletedProcess[str]:
    program = [script] if script else ["-m", "limbeck"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def spine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A spine that records how it was called and does nothing."""
    calls: dict[str, Any] = {}
    module = ModuleType("limbeck.spine")

    def run_recipe(recipe: Any, **arguments: Any) -> dict[str, Any]:
        print("a library that prints")
        os.write(1, b"and one that writes\n")
        calls.update(recipe=recipe, **arguments)
        if "raises" in calls:
            raise calls["raises"]
        return {"verdict": "fine", "gap_closed": float("nan"), "path": Path("x")}

    module.run_recipe = run_recipe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "limbeck.spine", module)
    return calls


class TestHelp:
    @pytest.mark.parametrize("arguments", [["--help"], ["distill", "--help"], ["train", "-h"], ["--version"], []])
    def test_nothing_heavy_is_imported(self, arguments: list[str], tmp_path: Path) -> None:
        code = (
            "import sys\nfrom limbeck.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    code = stop.code\n"
            "print('HEAVY', sorted(m for m in sys.modules if '.' not in m), file=sys.stderr)\nsys.exit(code)"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        loaded = set(done.stderr.rpartition("HEAVY ")[2].strip("[]\n").replace("'", "").split(", "))
        assert "typer" in loaded
        assert not loaded & HEAVY
        assert done.stdout

    def test_a_run_imports_no_library_that_it_may_not_need(self, tmp_path: Path) -> None:
        """Each of these takes a second or more of every command; a part of a cache is written without pandas, which pyarrow would import."""
        code = (
            "import sys\nfrom pathlib import Path\nimport numpy as np\nimport limbeck.spine\n"
            "from limbeck.cache._manifest import Column\nfrom limbeck.cache._store import write_part\n"
            "write_part(Path(), 'x', 0, np.ones((1, 2), np.uint64), {'y': np.ones((1, 3), np.float16)}, (Column('y', 'float16', (3,)),))\n"
            "print(sorted(m for m in sys.modules if '.' not in m))"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        loaded = set(done.stdout.strip("[]\n").replace("'", "").split(", "))
        assert "limbeck" in loaded
        assert not loaded & {"torchmetrics", "torchvision", "transformers", "scipy", "sklearn", "pandas"}

    def test_every_command_is_listed_and_explains_itself(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert limbeck("--help") == 0
        shown = capsys.readouterr().out
        assert "..." not in shown.partition("Commands:")[2]
        for name in COMMANDS:
            assert f"\n  {name} " in shown
            assert limbeck(name, "--help") == 0
            assert len(capsys.readouterr().out) > 100

    def test_the_options_of_the_contract(self, capsys: pytest.CaptureFixture[str]) -> None:
        teacher = {"--teacher", "--temp", "--alpha"}
        both = {"--student", "--data", "--task", "--epochs", "--batch-size", "--lr", "--seed", "--seeds", "--out", "--resume"}
        both |= {"--no-baseline", "--dry-run", "--json", "--set"}
        limbeck("distill", "--help")
        words = set(capsys.readouterr().out.split())
        assert teacher | both <= words
        limbeck("train", "--help")
        words = set(capsys.readouterr().out.split())
        assert both <= words
        assert not teacher & words


class TestTheEnd:
    def test_a_native_thread_that_is_still_at_work_ends_with_the_process(self, tmp_path: Path) -> None:
        """Taken down in the ordinary way, the interpreter ends with SIGABRT here: as it did once in a while behind a process group."""
        code = (
            "import atexit, sys, threading\nimport torch\n"
            "def work():\n    x = torch.ones(200, 200)\n    while True:\n        x @ x\n"
            "threading.Thread(target=work, daemon=True).start()\n"
            "atexit.register(lambda: open('left', 'w').close())\n"
            "from limbeck.cli import console\nsys.argv[0] = 'limbeck'\nconsole()\n"
        )
        for arguments, expected in ((["losses"], 0), (["losses", "kdd"], 2)):
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == expected, done.stderr
            assert ("similarity_preserving" in done.stdout) == (expected == 0)
            assert "Traceback" not in done.stderr
            (tmp_path / "left").unlink()  # what was registered for the end of the program has run

    def test_threads_are_waited_for_and_closed_output_is_no_error(self, tmp_path: Path) -> None:
        code = (
            "import threading, time\n"
            "def work():\n    time.sleep(1)\n    open('written', 'w').close()\n"
            "threading.Thread(target=work).start()\n"
            "import sys\nfrom limbeck.cli import console\nsys.argv = ['limbeck', 'losses', 'kdd']\nconsole()\n"
        )
        done = subprocess.run([sys.executable, "-c", f"import os\nos.close(1)\n{code}"], cwd=tmp_path, check=False, timeout=120)
        assert done.returncode == 2
        assert (tmp_path / "written").exists()

    @pytest.mark.parametrize(("given", "expected"), [("None", 0), ("'all of it'", 1), ("75", 75)])
    def test_whatever_a_user_leaves_with(self, given: str, expected: int, tmp_path: Path) -> None:
        code = f"import sys\nimport limbeck.cli as cli\ncli.call = lambda *_: sys.exit({given})\nsys.argv = ['limbeck', 'losses']\ncli.console()\n"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, "all of it" in done.stderr) == (expected, expected == 1)

    def test_a_mistake_of_our_own_keeps_its_traceback(self, tmp_path: Path) -> None:
        code = (
            "import limbeck.cli as cli\ndef bad(*_):\n    raise ZeroDivisionError('ours')\ncli.call = bad\n"
            "import sys\nsys.argv = ['limbeck', 'losses']\ncli.console()\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("Traceback")
        assert done.stderr.endswith("ZeroDivisionError: ours\n")


class TestListings:
    def test_losses(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert limbeck("losses") == 0
        shown = capsys.readouterr().out
        assert all(f"\n{name} " in shown for name in ("kd", "cross_entropy", "hint"))
        assert limbeck("losses", "kd") == 0
        assert "temperature" in capsys.readouterr().out
        assert limbeck("losses", "attention_transfer") == 0
        shown = capsys.readouterr().out
        assert all(
            part in shown
            for part in ("mean over places of (Q_s / |Q_s| - Q_t / |Q_t|)^2", "form", "- {loss: attention_transfer,", "arXiv:1612.03928")
        )
        assert ">>>" not in shown
        assert limbeck("losses", "kdd") == 2
        assert "Did you mean 'kd'?" in capsys.readouterr().err

    def test_the_page_of_losses_is_up_to_date(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert limbeck("losses", "--markdown") == 0
        said = "run: limbeck losses --markdown > docs/losses.md"
        assert capsys.readouterr().out == (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8"), said
        assert limbeck("losses", "kd", "--markdown") == 2

    def test_models(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert limbeck("models") == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in ("bert-base", "timm:", "python:FILE", "run:DIR"))

    def test_recipes(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        from limbeck.reading import build_recipe, read_yaml

        assert limbeck("recipes") == 0
        names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
        assert names.pop() == "PAIR/METHOD"
        names.append("cifar100-vgg13-vgg8/pkt")
        assert len(names) >= 6
        for name in names:
            assert limbeck("recipes", name) == 0
            path = tmp_path / "r.yaml"
            path.write_text(capsys.readouterr().out)
            data = read_yaml(path)
            build_recipe(data, command="distill" if "teacher" in data else "train")
        assert limbeck("recipes", "python-modle") == 2
        assert "Did you mean 'python-model'?" in capsys.readouterr().err
        assert limbeck("recipes", "cifar100-vgg13-vgg8/ptk") == 2
        shown = capsys.readouterr()
        assert not shown.out
        assert "Did you mean 'cifar100-vgg13-vgg8/pkt'?" in shown.err

    def test_recipes_of_papers(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert limbeck("recipes", "--published") == 0
        assert "cifar100-resnet32x4-resnet8x4" in capsys.readouterr().out
        assert limbeck("recipes", "--published", "--markdown") == 0
        said = "run: limbeck recipes --published --markdown > docs/published.md"
        assert capsys.readouterr().out == (Path(__file__).parents[2] / "docs" / "published.md").read_text(encoding="utf-8"), said
        for wrong in (("--published", "kd"), ("--markdown",), ("--published", "--schema")):
            assert limbeck("recipes", *wrong) == 2

    def test_the_schema_is_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert limbeck("recipes", "--schema") == 0
        assert "student" in json.loads(capsys.readouterr().out)["properties"]
        assert limbeck("recipes", "--schema", "x") == 2


BASIC = ("--teacher", "timm:resnet50", "--student", "timm:resnet18", "--data", "digits")


class TestDistill:
    def test_options_reach_the_spine(self, spine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        more = ("--temp", "6.0", "--alpha", "0.7", "--epochs", "2", "--batch-size", "16", "--lr", "1e-2", "--seed", "5", "--seeds", "3")
        rest = ("--out", "o", "--no-baseline", "--dry-run", "--set", "train.optimizer=sgd", "--set", "train.momentum=0.5")
        assert limbeck("distill", *BASIC, *more, *rest) == 0
        recipe = spine["recipe"]
        assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.lr, recipe.seed) == (2, 16, 0.01, 5)
        assert (recipe.train.optimizer, recipe.train.momentum, recipe.baseline) == ("sgd", 0.5, False)
        assert {k: spine[k] for k in ("base", "out", "resume", "seeds", "dry_run", "command")} == {
            "base": tmp_path,
            "out": Path("o"),
            "resume": False,
            "seeds": 3,
            "dry_run": True,
            "command": "distill",
        }

    def test_train_has_no_teacher(self, spine: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        assert limbeck("train", "--student", "resnet18", "--data", "digits", "--no-baseline") == 0
        assert spine["command"] == "train"
        assert limbeck("train", "--teacher", "x") == 2
        assert "limbeck distill" in capsys.readouterr().err

    def test_resume_alone_takes_the_recipe_of_the_run(self, spine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from limbeck.reading import build_recipe

        monkeypatch.chdir(tmp_path)
        recipe = build_recipe({"teacher": "a", "student": "b", "data": "digits", "seed": 9}, command="distill")
        (tmp_path / "o").mkdir()
        (tmp_path / "o" / "recipe.yaml").write_text(recipe.to_yaml())
        assert limbeck("distill", "--resume", "--out", "o") == 0
        assert spine["recipe"] == recipe
        assert spine["resume"]

    def test_json_is_the_only_thing_on_standard_output(self, spine: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
        assert limbeck("distill", *BASIC, "--json") == 0
        out, err = capfd.readouterr()
        assert json.loads(out) == {"verdict": "fine", "gap_closed": None, "path": "x"}
        assert "a library that prints" in err
        assert "and one that writes" in err

    @pytest.mark.parametrize(
        ("error", "code", "kind"),
        [
            (ParityFailed("differs by 0.5"), 3, "ParityFailed"),
            (Interrupted("run again with --resume"), 75, "Interrupted"),
            (KeyboardInterrupt(), 130, "Interrupted"),
        ],
    )
    @pytest.mark.usefixtures("handlers")
    def test_exit_codes(self, spine: dict[str, Any], capsys: pytest.CaptureFixture[str], error: Exception, code: int, kind: str) -> None:
        spine["raises"] = error
        assert limbeck("distill", *BASIC) == code
        out, err = capsys.readouterr()
        assert str(error) in err
        assert "Traceback" not in err
        assert "error" not in out
        assert limbeck("distill", *BASIC, "--json") == code
        document = json.loads(capsys.readouterr().out)
        assert (document["error"]["kind"], document["error"]["exit_code"]) == (kind, code)

    def test_a_bug_keeps_its_traceback(self, spine: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        spine["raises"] = ZeroDivisionError("a bug")
        with pytest.raises(ZeroDivisionError):
            limbeck("distill", *BASIC)
        capsys.readouterr()
        assert limbeck("distill", *BASIC, "--json") == 1
        out, err = capsys.readouterr()
        assert json.loads(out)["error"]["exit_code"] == 1
        assert "Traceback" in err

    def test_mistakes_in_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert limbeck("distill", *BASIC, "--epochs", "abc", "--lr", "x", "--seeds", "0", "--json") == 2
        out, err = capsys.readouterr()
        error = json.loads(out)["error"]
        assert error["kind"] == "RecipeError"
        assert [p["where"] for p in error["problems"]] == ["--epochs", "--lr", "--seeds"]
        assert err.startswith("command line: 3 problems\n")


class TestProcess:
    def test_a_mistake_is_exit_2_without_a_traceback(self, tmp_path: Path) -> None:
        done = process("distill", *BASIC, "--epochs", "abc", "--lr", "x", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 3
        assert list(tmp_path.iterdir()) == []

    def test_the_classic_script(self, tmp_path: Path) -> None:
        done = process(
            *("--teacher", "bert-large", "--student", "bert-base", "--temp", "6.0", "--alpha", "0.7", "--data", "reviews.csv"),
            cwd=tmp_path,
            script=str(ROOT / "kd_train.py"),
        )
        assert done.returncode == 2
        assert done.stderr.startswith("command line: --data: no such file: 'reviews.csv'")

    def test_a_reader_that_leaves_early_is_no_error(self, tmp_path: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(
            f"'{sys.executable}' -m limbeck recipes | true; exit ${{PIPESTATUS[0]}}",
            shell=True,
            executable="/bin/bash",
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr


def test_the_classic_script_is_distill_that_fits_its_teacher(
    spine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import runpy

    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews.csv").write_text("text,label\na,b\n")
    arguments = ["--teacher", "bert-large", "--student", "bert-base", "--temp", "6.0", "--alpha", "0.7", "--data", "reviews.csv"]
    monkeypatch.setattr(sys, "argv", ["kd_train.py", *arguments])
    monkeypatch.setattr("limbeck.cli.console", cli.main)  # which would end this process
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "kd_train.py"), run_name="__main__")
    assert stop.value.code == 0
    recipe = spine["recipe"]
    assert recipe.task == "text-classification"
    assert recipe.data.source == "csv:reviews.csv"
    assert (recipe.teacher.train.epochs, recipe.teacher.train.if_needed) == (3, True)
    assert [t.model_dump() for t in recipe.objective] == [
        {"loss": "kd", "weight": 0.7, "temperature": 6.0},
        {"loss": "cross_entropy", "weight": 0.3},
    ]
