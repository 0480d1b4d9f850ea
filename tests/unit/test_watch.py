"""limbeck watch: what is told of a run is what its log says, through beginnings, cuts, seeds and the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.errors import UsageError
from limbeck.watch import Seen, look, watch
from running import limbeck


def step(role: str, number: int, time: float, **more: Any) -> dict[str, Any]:
    return {"role": role, "step": number, "steps": 40, "epoch": 0, "loss": 1.0 / number, "terms": {"kd": 0.5}, "time": time, **more}


def write(path: Path, *rows: dict[str, Any], end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n".join(json.dumps(row) for row in rows) + end)


def finish(folder: Path) -> None:
    (folder / "metrics.json").write_text(json.dumps({"verdict": "The teacher helped."}))
    (folder / "report.html").write_text("")


class Story:
    """Something happens to the files at every pause of the one who watches."""

    def __init__(self, *events: Any) -> None:
        self.events, self.clock, self.said = list(events), 1000.0, list[str]()

    def sleep(self, seconds: float) -> None:
        self.clock += seconds
        event = self.events.pop(0)
        if isinstance(event, float):
            self.clock += event
        else:
            event()

    def watched(self, folder: Path) -> Seen:
        return watch(folder, self.said.append, now=lambda: self.clock, sleep=self.sleep)


def test_from_the_beginning_to_the_verdict(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    story = Story(
        lambda: write(log, step("student", 10, 1001.0)),
        lambda: write(log, step("student", 20, 1002.0), end=""),  # half a line
        lambda: log.open("a").write("\n"),
        lambda: write(log, {"role": "student", "epoch": 0, "step": 20, "valid": {"accuracy": 0.75}, "time": 1003.0}),
        lambda: write(log, step("baseline", 10, 1004.0)),
        lambda: finish(tmp_path),
    )
    last = story.watched(tmp_path)
    assert last.result is not None
    assert story.said[0].startswith("No step has been logged yet")
    assert "student  epoch 1  step 10/40  loss 0.1000  kd 0.5000" in story.said[1]
    assert "step 20/40" in story.said[2]
    assert "validation accuracy 0.7500" in story.said[3]
    assert "baseline  epoch 1  step 10/40" in story.said[4]
    assert story.said[5].startswith("Finished. The teacher helped.")
    assert len(story.said) == 6


def test_a_run_that_was_stopped_and_cut_back(tmp_path: Path) -> None:
    """A resume cuts the log back to its checkpoint; what stands there then is told."""
    log = tmp_path / "log.jsonl"
    write(log, *(step("student", n, 990.0) for n in (10, 20, 30)))

    def cut() -> None:
        log.write_text("")
        write(log, step("student", 10, 1400.0))

    story = Story(300.0, cut, lambda: finish(tmp_path))
    story.watched(tmp_path)
    assert "step 30/40" in story.said[0]
    assert story.said[1].startswith("Nothing new for 5:1")
    assert f"--out {tmp_path} --resume" in story.said[1]
    assert "step 10/40" in story.said[2]


def test_seeds_and_combinations_are_told_by_their_names(tmp_path: Path) -> None:
    write(tmp_path / "log.jsonl", step("teacher", 40, 900.0))
    write(tmp_path / "seed-0/log.jsonl", step("student", 40, 950.0))
    write(tmp_path / "seed-1/log.jsonl", step("student", 5, 990.0))
    assert look(tmp_path, lambda: 1000.0).line().startswith("seed-1: student  epoch 1  step 5/40")
    sweep = tmp_path / "sweep"
    write(sweep / "runs/t=4/seed-0/log.jsonl", step("student", 5, 990.0))
    (sweep / "plan.json").write_text("{}")
    found = look(sweep, lambda: 1000.0)
    assert (found.part, found.age, found.result) == ("runs/t=4/seed-0", 10.0, None)
    rows = [{"name": "t=4", "values": {"temp": "4"}}]
    (sweep / "sweep.json").write_text(json.dumps({"rows": rows, "best": "t=4", "chosen_on": "validation accuracy"}))
    (sweep / "report.html").write_text("")
    assert "Best on validation accuracy: temp = 4." in str(look(sweep).result)


def test_foreign_lines_do_not_stop_it(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('not JSON\n[1]\n{"step": 3}\n')
    assert look(tmp_path).step is None
    write(tmp_path / "log.jsonl", {"role": "student", "step": 1, "epoch": 0, "loss": None, "time": 1.0})
    assert "loss unknown" in look(tmp_path).line()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run/log.jsonl", step("student", 10, 1001.0))
    assert limbeck("watch", tmp_path / "run", "--once") == 0
    assert "step 10/40" in capsys.readouterr().out
    assert limbeck("watch", tmp_path / "run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["step"]["step"] == 10
    finish(tmp_path / "run")
    assert limbeck("watch", tmp_path / "run") == 0
    assert "Finished. The teacher helped." in capsys.readouterr().out
    assert limbeck("watch", tmp_path / "rum") == 2
    assert "Did you mean 'run'?" in capsys.readouterr().err
    with pytest.raises(UsageError, match="there is no folder"):
        look(tmp_path / "rum")
