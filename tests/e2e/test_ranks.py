"""Several processes train as one does: the same items, sums and weights; one message for an error on any of them; stopped and resumed together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from running import distance, ended, lines, make_folder, ranks, read, recipe, run, several, start, steps, wait_for, weights

DENSE = """

class Dense(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(64, 11), nn.Tanh(), nn.Linear(11, num_classes)

    def forward(self, x):
        return self.head(self.norm(self.body(x.flatten(1))))


class Sick(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        out = self.head(x.flatten(1))
        return out * torch.nan if self.training and os.environ["RANK"] == "1" else out


class Blocks(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.head = nn.Linear(64, 7), nn.Linear(7, num_classes)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 7)) for _ in range(3)])

    def forward(self, x):
        x = self.first(x.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def blocks(num_classes=3):
    return Blocks(num_classes)


def sick(num_classes=3):
    return Sick(num_classes)


def dense(num_classes=3):
    return Dense(num_classes)
"""

EXACT: dict[str, Any] = {
    "teacher": {"model": "python:nets.py:dense", "train": {"epochs": 1}},  # without batch statistics, which depend on the cut
    "student": {"model": "python:nets.py:plain"},
    # 50 rows in steps of 16: the last step of an epoch has 2, which two ranks cannot share
    "train": {
        "optimizer": "sgd",
        "precision": "float64",
        "accumulate": 2,
        "epochs": 3,
        "checkpoint_every": 2,
    },
    "data": {"source": "npz:pictures.npz", "augment": {"crop": 1, "flip": True}, "labelled_limit": 29},
}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, models, and a run of one process."""
    folder = make_folder(tmp_path_factory.mktemp("ranks"), train=50)
    (folder / "nets.py").write_text((folder / "nets.py").read_text() + DENSE)
    run("distill", recipe(folder, **EXACT), out=folder / "alone")
    return folder


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_end_in_the_weights_of_one_process(there: Path, tmp_path: Path, size: int) -> None:
    metrics = several(size, "distill", there / "recipe.yaml", out=tmp_path / "run")
    for role in ("student", "baseline"):
        assert distance(there / "alone" / role, tmp_path / "run" / role) < 1e-9, role
    alone = read(there / "alone/metrics.json")
    assert metrics["cost"]["steps"] == alone["cost"]["steps"]
    idle = 3 * 2 * (size - 1)  # the last step of each epoch has 2 rows, which one rank takes; the others go along with 2 that do not count
    assert metrics["cost"]["teacher_items"] == alone["cost"]["teacher_items"] + idle
    assert read(tmp_path / "run/environment.json")["world_size"] == size
    for one, other in zip(lines(there / "alone", "student"), lines(tmp_path / "run", "student"), strict=True):
        assert one.get("step") == other.get("step")
        if "loss" in one:
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-9)
            assert other["terms"] == pytest.approx(one["terms"], rel=1e-9)


def test_float32_logits_after_an_epoch_of_adamw(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, train=48)
    path = recipe(folder, student={"model": "python:nets.py:plain"}, train={"epochs": 1, "lr": 0.01}, export=["onnx"])
    run("distill", path, out=tmp_path / "alone")
    assert several(2, "distill", path, out=tmp_path / "two")["export"]["onnx"]["agreement"] == 1.0
    x = np.load(folder / "pictures.npz")["test_x"].reshape(18, -1) / 255.0
    found = []
    for name in ("alone", "two"):
        w = load_file(tmp_path / name / "student/model.safetensors")
        how = read(tmp_path / name / "student/model.json")["preprocessing"]
        hidden = np.tanh((x - how["mean"][0]) / how["std"][0] @ w["1.weight"].T + w["1.bias"])
        found.append(hidden @ w["3.weight"].T + w["3.bias"])
    assert np.abs(found[0] - found[1]).max() < 1e-4


def test_a_projection_is_averaged_with_the_student(there: Path, tmp_path: Path) -> None:
    terms = [
        {"loss": "kd", "weight": 0.5, "temperature": 2.0},
        {"loss": "hint", "weight": {"start": 1.0, "end": 0.0, "until": 0.5}, "student": "1", "teacher": "norm", "projector": "linear"},
    ]
    path = recipe(
        there,
        "hint.yaml",
        **{**EXACT, "objective": terms, "baseline": False},
    )
    run("distill", path, out=tmp_path / "alone")
    several(2, "distill", path, out=tmp_path / "two")
    assert distance(tmp_path / "alone/student", tmp_path / "two/student") < 1e-9


def test_blocks_that_are_computed_again_and_a_feature_inside_one(there: Path, tmp_path: Path) -> None:
    """Against one process that keeps everything: gradients are reduced once, and after the second forward pass of a block."""
    terms = [
        {"loss": "kd", "weight": 0.5, "temperature": 2.0},
        {"loss": "hint", "weight": 1.0, "student": "blocks.1.0", "teacher": "norm", "projector": "linear"},
    ]
    changes = {**EXACT, "student": {"model": "python:nets.py:blocks"}, "objective": terms, "baseline": False}
    run("distill", recipe(there, "kept.yaml", **changes), out=tmp_path / "alone")
    again = {**changes, "train": {**EXACT["train"], "gradient_checkpointing": ["blocks.*"]}}
    several(2, "distill", recipe(there, "again.yaml", **again), out=tmp_path / "two")
    assert distance(tmp_path / "alone/student", tmp_path / "two/student") < 1e-9


def test_batch_statistics_come_from_the_main_rank(tmp_path: Path) -> None:
    """Both ranks evaluate the weights that are saved: the figures are those of one process that reads them."""
    folder = make_folder(tmp_path, train=50)
    metrics = several(2, "distill", recipe(folder, train={"ema": 0.5, "select": "best"}), out=tmp_path / "run")
    again = run_evaluate(tmp_path / "run")
    assert again["models"]["student"]["metrics"] == metrics["models"]["student"]["metrics"]


def run_evaluate(folder: Path) -> dict[str, Any]:
    from limbeck.again import evaluate_run

    return dict(evaluate_run(folder))


def test_a_cache_filled_by_ranks_has_the_bytes_of_one_process(there: Path, tmp_path: Path) -> None:
    changes = {"teacher": {"model": "run:teacher"}, "train": {**EXACT["train"], "precision": "float32"}}
    run("train", recipe(there, "train.yaml", teacher=None, student={"model": "python:nets.py:teacher"}), out=there / "teacher")
    files = {}
    for name, size in (("alone", 1), ("two", 2)):
        cache = {"path": str(tmp_path / f"cache-{name}"), "views": 2}
        path = recipe(there, f"{name}.yaml", **{**EXACT, **changes, "teacher_cache": cache})
        metrics = several(size, "distill", path, out=tmp_path / name) if size > 1 else run("distill", path, out=tmp_path / name)
        assert metrics["cost"]["teacher_items"] >= 2 * 50 + 18
        files[name] = {
            str(p.relative_to(tmp_path / f"cache-{name}")): p.read_bytes()
            for p in sorted((tmp_path / f"cache-{name}").rglob("*"))
            if p.is_file() and p.name != "figures.json" and not p.name.startswith(".")
        }
    assert files["alone"] == files["two"]
    assert read(tmp_path / "alone/metrics.json")["cost"]["cache_hits"] == 150
    assert metrics["cost"]["cache_hits"] == 150 + 6


class TestErrors:
    def test_a_mistake_is_told_once(self, there: Path, tmp_path: Path) -> None:
        codes, said = ended(ranks(2, "distill", there / "recipe.yaml", "--lr", "fast", "--out", tmp_path / "run", said=tmp_path / "said"))
        assert codes == [2, 2]
        assert said.count("--lr: got 'fast'") == 1
        assert "Traceback" not in said
        assert not (tmp_path / "run").exists()

    def test_what_one_process_does_is_not_begun_by_two(self, there: Path, tmp_path: Path) -> None:
        codes, said = ended(ranks(2, "evaluate", there / "alone", said=tmp_path / "said"))
        assert codes == [2, 2]
        assert said.count("is done by one process, and 2 were started") == 1

    def test_a_plan_is_made_by_one_process(self, there: Path, tmp_path: Path) -> None:
        codes, said = ended(ranks(2, "distill", there / "recipe.yaml", "--dry-run", said=tmp_path / "said"))
        assert codes == [2, 2]
        assert said.count("--dry-run: measures what one process takes, and 2 were started") == 1

    def test_a_mistake_on_one_rank_ends_a_sweep(self, there: Path, tmp_path: Path) -> None:
        """What one machine lacks is told by its rank; the others do not wait for it."""
        torn = "import os\nfrom nets import *\n\n\ndef torn(num_classes=3):\n    return Dense(num_classes) if os.environ['RANK'] == '0' else None\n"
        (there / "torn.py").write_text(torn)
        path = recipe(there, "torn.yaml", **{**EXACT, "student": {"model": "python:torn.py:torn"}})
        codes, said = ended(ranks(2, "sweep", path, "--vary", "train.lr=0.1,0.2", "--out", tmp_path / "sweep", said=tmp_path / "said"))
        assert codes == [2, 2], said
        assert "torn" in said
        assert "Traceback" not in said

    def test_what_only_one_rank_sees_ends_all(self, there: Path, tmp_path: Path) -> None:
        """A NaN on one rank: that rank names the samples, and the other says nothing."""
        path = recipe(there, "sick.yaml", **{**EXACT, "student": {"model": "python:nets.py:sick"}})
        codes, said = ended(ranks(2, "distill", path, "--out", tmp_path / "run", said=tmp_path / "said"))
        assert codes == [3, 3], said
        assert said.count("the student's logits has NaN or infinity for samples") == 1
        assert said.count("The weights were not touched") == 1
        assert "Traceback" not in said

    def test_who_waits_for_the_main_rank_leaves_as_it_does(self, there: Path, tmp_path: Path) -> None:
        """The main rank is stopped while it alone works; without torchrun the store ends with it."""
        out = tmp_path / "run"
        slow = "import time\nfrom nets import *\n\n\nclass Late(Dense):\n"
        slow += "    def forward(self, x):\n        time.sleep(0.0 if self.training else 0.2)\n        return super().forward(x)\n"
        (there / "late.py").write_text(slow + "\n\ndef late(num_classes=3):\n    return Late(num_classes)\n")
        path = recipe(there, "late.yaml", **{**EXACT, "student": {"model": "python:late.py:late"}})
        processes = ranks(2, "distill", path, "--out", out, said=tmp_path / "said")
        wait_for(processes[0], lambda: any(out.glob("checkpoints/baseline-done/step-*")))
        time.sleep(0.5)
        processes[0].send_signal(signal.SIGTERM)
        codes, said = ended(processes)
        assert codes == [75, 75], said
        assert "was lost" not in said

    def test_a_lost_rank_ends_the_other(self, there: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        processes = ranks(2, "distill", there / "recipe.yaml", "--out", out, said=tmp_path / "said", SLOW="0.05")
        wait_for(processes[0], lambda: len(steps(out, "student")) >= 3)
        processes[1].kill()
        codes, said = ended(processes)
        assert codes[0] == 3, said
        assert said.count("was lost, or did not answer") == 1
        assert "Traceback" not in said
        several(2, "distill", there / "recipe.yaml", "--resume", out=out)
        for role in ("student", "baseline"):
            assert distance(there / "alone" / role, out / role) < 1e-9

    def test_a_rank_that_hangs_ends_the_other_by_the_timeout(self, there: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        processes = ranks(2, "distill", there / "recipe.yaml", "--out", out, said=tmp_path / "said", SLOW="0.05", LIMBECK_RANK_TIMEOUT="5")
        wait_for(processes[0], lambda: len(steps(out, "student")) >= 2)
        processes[1].send_signal(signal.SIGSTOP)
        end = time.monotonic() + 120
        while processes[0].poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        processes[1].kill()
        codes, said = ended(processes)
        assert codes[0] == 3, said
        assert "did not answer for 5 s" in said


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(there: Path, tmp_path: Path, signalled: int) -> None:
    out = tmp_path / "run"
    processes = ranks(2, "distill", there / "recipe.yaml", "--out", out, said=tmp_path / "said", SLOW="0.05")
    wait_for(processes[0], lambda: len(steps(out, "student")) >= 4)
    processes[signalled].send_signal(signal.SIGTERM)
    codes, said = ended(processes)
    assert codes == [75, 75], said
    assert said.count("after a checkpoint") == 1
    at = steps(out, "student")[-1]
    assert at < 12
    # with another number of ranks, and again with another one: the same ids at every step, and so the same weights
    processes = ranks(3, "distill", there / "recipe.yaml", "--out", out, "--resume", said=tmp_path / "again", SLOW="0.05")
    wait_for(processes[0], lambda: len(steps(out, "baseline")) >= 2)
    processes[signalled].send_signal(signal.SIGINT)
    assert ended(processes)[0] == [75] * 3
    run("distill", there / "recipe.yaml", "--resume", out=out)
    for role in ("student", "baseline"):
        assert distance(there / "alone" / role, out / role) < 1e-9
        assert steps(out, role) == steps(there / "alone", role)
    assert at in read(out / "environment.json")["resumed_from"]


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_while_models_are_built_ends_all_with_its_code(there: Path, tmp_path: Path, signalled: int) -> None:
    """Of a rank that loads for minutes, while the others wait for it."""
    nets = (there / "nets.py").read_text()
    slow = f"if os.environ['RANK'] == '{signalled}':\n    open(os.environ['THERE'], 'w').close()\n    time.sleep(60)\n"
    (there / "loading.py").write_text(nets + slow)
    path = recipe(there, "loading.yaml", **{**EXACT, "student": {"model": "python:loading.py:dense"}})
    processes = ranks(2, "distill", path, "--out", tmp_path / "run", said=tmp_path / "said", THERE=str(tmp_path / "there"))
    wait_for(processes[0], lambda: (tmp_path / "there").exists())
    time.sleep(0.5)
    began = time.monotonic()
    processes[signalled].send_signal(signal.SIGTERM)
    codes, said = ended(processes)
    assert codes == [75, 75], said
    assert "Traceback" not in said
    assert time.monotonic() - began < 30  # and not as long as the one that sleeps


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_others_do_not_come_hears_a_signal(there: Path, tmp_path: Path, rank: int) -> None:
    one, other = ranks(2, "distill", there / "recipe.yaml", "--out", tmp_path / "run", said=tmp_path / "said")
    alive, gone = (one, other) if rank == 0 else (other, one)
    gone.kill()
    status = Path(f"/proc/{alive.process.pid}/status")  # type: ignore[attr-defined]

    def hears() -> bool:
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    wait_for(alive, hears)
    time.sleep(1)  # it waits for the other by now
    alive.send_signal(signal.SIGTERM)
    said = alive.communicate(timeout=60)[1]
    assert alive.returncode == 75, said


def test_torchruns_restarts_go_on_with_their_own_run_alone(there: Path, tmp_path: Path) -> None:
    """One that stood there before is refused at every start, as --resume was not asked for; and one process is restarted as several are."""
    out, again = tmp_path / "run", {"TORCHELASTIC_RESTART_COUNT": "1"}
    process = start("distill", there / "recipe.yaml", "--out", out, SLOW="0.05", TORCHELASTIC_RUN_ID="first")
    wait_for(process, lambda: len(steps(out, "student")) >= 3)
    process.kill()
    process.communicate(timeout=600)
    for environment in ({"TORCHELASTIC_RUN_ID": "second"}, {"TORCHELASTIC_RUN_ID": "second", **again}, {}):
        process = start("distill", there / "recipe.yaml", "--out", out, **environment)
        said = process.communicate(timeout=600)[1]
        assert (process.returncode, "exists and is not empty" in said) == (2, True), said
    process = start("distill", there / "recipe.yaml", "--out", out, TORCHELASTIC_RUN_ID="first", **again)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    assert distance(there / "alone/student", out / "student") == 0.0


def test_two_processes_do_not_write_into_one_folder(there: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "run", recipe(there, "slow.yaml", baseline=False)
    first = start("distill", path, "--out", out, SLOW="10")
    wait_for(first, lambda: (out / "recipe.yaml").exists())
    second = start("distill", path, "--out", out, "--resume")
    said = second.communicate(timeout=600)[1]
    assert second.returncode == 2, said
    assert "is writing into" in " ".join(said.split())
    assert first.poll() is None
    first.kill()
    first.communicate(timeout=600)
    run("distill", path, "--resume", out=out)


def test_the_same_number_of_ranks_ends_in_the_same_bytes(there: Path, tmp_path: Path) -> None:
    changes = {"student": {"model": "python:nets.py:student", "options": {"dropout": 0.3}}, "train": {"checkpoint_every": 1, "epochs": 3}}
    path = recipe(there, "dropout.yaml", **changes)
    several(2, "distill", path, out=tmp_path / "quiet")
    out = tmp_path / "run"
    processes = ranks(2, "distill", path, "--out", out, said=tmp_path / "said", SLOW="0.05")
    wait_for(processes[0], lambda: len(steps(out, "student")) >= 5)
    for process in processes:
        process.kill()
    ended(processes)
    several(2, "distill", path, "--resume", out=out)
    for role in ("student", "baseline"):
        assert weights(out / role) == weights(tmp_path / "quiet" / role)


def test_several_seeds(there: Path, tmp_path: Path) -> None:
    run("distill", there / "recipe.yaml", "--seeds", "2", out=tmp_path / "alone")
    several(2, "distill", there / "recipe.yaml", "--seeds", "2", out=tmp_path / "two")
    for seed in ("seed-0", "seed-1"):
        assert distance(tmp_path / "alone" / seed / "student", tmp_path / "two" / seed / "student") < 1e-9


def test_a_sweep(there: Path, tmp_path: Path) -> None:
    vary = ("--vary", "objective.0.temperature=1,3", "--vary", "train.lr=0.05,0.1")
    terms = [{"loss": "kd", "weight": 0.7, "temperature": 2.0}, {"loss": "cross_entropy", "weight": 0.3}]
    path = recipe(there, "swept.yaml", **{**EXACT, "objective": terms})
    run("sweep", path, *vary, out=tmp_path / "alone")
    several(2, "sweep", path, *vary, out=tmp_path / "two")
    one, other = (read(tmp_path / name / "sweep.json") for name in ("alone", "two"))
    assert one["best"] == other["best"]
    for row in one["rows"]:
        for role in ("student", "baseline"):
            assert distance(tmp_path / "alone" / row["folder"] / role, tmp_path / "two" / row["folder"] / role) < 1e-9
    assert distance(tmp_path / "alone/student", tmp_path / "two/student") < 1e-9


def test_torchrun_itself(there: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "limbeck")
    process = start("distill", there / "recipe.yaml", "--out", out, "--json", program=launcher)
    shown, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    import json

    assert json.loads(shown) == read(out / "metrics.json")
    assert distance(there / "alone/student", out / "student") < 1e-9


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_shares_of_a_request_are_its_rows(count: int, size: int) -> None:
    from limbeck.data import Request

    whole = Request(3, 1, 0, np.arange(count) * 5)
    shares = [whole.share(rank, size) for rank in range(size)]
    counted = [share.rows for share in shares if share.counted]
    np.testing.assert_array_equal(np.concatenate(counted), whole.rows)
    assert all(len(rows) >= 2 for rows in counted) or count < 4
    assert all(len(share.rows) for share in shares)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_shares_may_be_cut_alike_by_their_requests_alone(size: int, accumulate: int) -> None:
    """Into as many parts as the share has that is cut into the fewest; each share is still covered, in order."""
    from limbeck.data import Request

    for count in range(1, 40):
        shares = [Request(0, 0, 0, np.arange(count)).share(rank, size) for rank in range(size)]
        fewest = min(len(share.cuts(accumulate)) for share in shares)
        for share in shares:
            bounds = share.cuts(accumulate, alike=True)
            assert len(bounds) == fewest
            assert [i for start, stop in bounds for i in range(start, stop)] == list(range(len(share.rows)))


def test_no_group_is_let_go_of_while_the_process_lives(tmp_path: Path) -> None:
    """PyTorch 2.6 hangs now and then where one is (`limbeck.ranks._kept`); so whatever PyTorch knows at the end is held here too."""
    script = tmp_path / "groups.py"
    script.write_text(
        "import os, torch\n"
        "import torch.distributed as dist\n"
        "from torch.distributed import distributed_c10d\n"
        "from limbeck import ranks\n"
        "with ranks.joined() as first:\n"
        "    seen = list(distributed_c10d._world.pg_map)\n"
        "    with ranks.joined(1) as world:\n"
        "        own = world.seats.own\n"
        "        own.gather([torch.ones(2)])\n"
        "        seen += list(distributed_c10d._world.pg_map)\n"
        "assert len(seen) >= 5, seen\n"
        "assert all(any(group is kept for kept in ranks._GROUPS) for group in seen), (seen, ranks._GROUPS)\n"
        "os._exit(0)  # as the command does: an interpreter that is taken down may abort in a native thread\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {
            **os.environ,
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)], env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True
        )
        for r in range(3)
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
