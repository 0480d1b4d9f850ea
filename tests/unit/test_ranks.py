"""Ranks find each other, whatever those before them have left in the launcher's store."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from limbeck._begin import begin, job_of
from limbeck.errors import Stopped, UsageError
from limbeck.ranks import ALONE, Ranks, _is_lost, joined, launch, meet, own_device, restarted
from limbeck.reading import absolute, build_recipe
from running import make_folder, recipe


def together(store: dist.HashStore, size: int, late: dict[int, float] | None = None) -> set[str]:
    def one(rank: int) -> str:
        time.sleep((late or {}).get(rank, 0.0))
        return meet(store, rank, size, 30)

    with ThreadPoolExecutor(size) as pool:
        return set(pool.map(one, range(size)))


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2, 2), (4, 2, 3)])
def test_each_start_has_one_name_of_its_own(sizes: tuple[int, ...]) -> None:
    store = dist.HashStore()
    found = [together(store, size) for size in sizes]
    assert all(len(names) == 1 for names in found)
    assert len(set.union(*found)) == len(sizes)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_what_an_earlier_start_left_is_not_taken_for_a_rank(late: int) -> None:
    """The main rank finds a number of the rank that is late: that of the start before."""
    store = dist.HashStore()
    [first] = together(store, 3)
    [second] = together(store, 3, {late: 0.5})
    assert first != second


def test_one_that_was_killed_after_it_came_is_waited_for() -> None:
    store = dist.HashStore()
    with pytest.raises(Stopped):
        meet(store, 1, 2, 0.1)
    with pytest.raises(Stopped, match="Not all of the 2 processes"):
        meet(store, 0, 2, 0.3)
    assert len(together(store, 2)) == 1


def test_alone_nothing_is_asked_of_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with joined() as ranks:
        assert ranks is ALONE
        ranks.look()
        ranks.agree({"data": "a"})
        assert not restarted(ranks)
        assert ranks.from_main(lambda: (1, 2)) == (1, 2)


def test_a_group_of_the_caller_that_cannot_sum_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(UsageError, match=r"cuda:nccl\) cannot sum on the CPU"), joined():
        pass


def test_other_facts_are_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Ranks(1, 2)
    monkeypatch.setattr(Ranks, "from_main", lambda self, make: {"data": "theirs", "seeds": 1})
    with pytest.raises(UsageError, match="data is ours, and the main rank has theirs"):
        other.agree({"data": "ours", "seeds": 1})


def test_one_device_for_all_processes_of_a_machine_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    read = absolute(build_recipe(yaml.safe_load(recipe(folder).read_text()), command="distill"), folder)
    # where there is no such device the recipe is refused before
    there = read.model_copy(update={"train": read.train.model_copy(update={"device": "cuda:0"})})
    job = job_of(there, folder, folder / "run")
    with pytest.raises(UsageError, match="got cuda:0, on which all 2 processes of this machine would work"):
        begin(replace(job, ranks=Ranks(local_size=2)))


@pytest.mark.parametrize(
    ("count", "local", "of", "torchrun", "expected"),
    [
        (0, 0, 2, True, None),
        (2, 0, 2, True, 0),
        (2, 1, 2, True, 1),
        (4, 1, 2, True, 1),
        (1, 0, 2, True, None),  # or both would take the only one
        (1, 1, 2, True, None),
        (2, 0, 4, True, None),
        (1, 1, 2, False, 0),  # srun shows each task its own
        (2, 1, 2, False, 1),
        (1, 0, 1, False, 0),
    ],
)
def test_each_rank_has_a_device_of_its_own_or_none_has(count: int, local: int, of: int, torchrun: bool, expected: int | None) -> None:
    environment = {"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(of), **({"TORCHELASTIC_RUN_ID": "none"} if torchrun else {})}
    assert own_device(count, environment) == expected


def test_a_single_process_may_be_restarted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert not restarted(ALONE)
    assert launch() is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted(ALONE)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a1")
    first = launch()
    assert first == launch()
    assert str(os.getppid()) in str(first)
    monkeypatch.setattr(os, "getppid", os.getpid)  # another process; 1 may be the parent already, in a container
    assert launch() != first


def test_ranks_that_share_a_cuda_device_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a group as it is made where a machine has fewer devices than ranks: it names no backend for CUDA."""
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found: list[str] = []

    def made(backend: str, **_: object) -> None:
        found.append(backend)
        raise KeyboardInterrupt

    monkeypatch.setattr(dist, "init_process_group", made)
    monkeypatch.setattr("limbeck.ranks.meet", lambda *_: "name")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(KeyboardInterrupt), joined():
        pass
    assert found == ["cpu:gloo"]
    monkeypatch.setattr(dist, "get_backend_config", lambda: found[0])
    with pytest.raises(UsageError, match="2 processes of this machine would train on CUDA, and it has 0 devices"):
        Ranks(0, 2, 2).refuse_shared(torch.device("cuda", 0))
    Ranks(0, 2, 2).refuse_shared(torch.device("cpu"))
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    Ranks(0, 2, 2).refuse_shared(torch.device("cuda", 0))


_SILENT = """
import sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
rank = int(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2, timeout=timedelta(seconds=1))
dist.all_reduce(torch.ones(1))
if rank:
    time.sleep(60)
from limbeck.ranks import _is_lost
for _ in range(2):
    for what in (dist.all_reduce, lambda x: dist.broadcast(x, 1), lambda x: dist._broadcast_coalesced(dist.group.WORLD, [x], 1 << 20, 1)):
        try:
            what(torch.ones(3))
            print("answered")
        except Exception as error:
            print(_is_lost(error), type(error).__name__, str(error).splitlines()[0], flush=True)
"""


def test_whatever_is_said_of_a_silent_rank_it_is_taken_for_lost(tmp_path: Path) -> None:
    """The first collective says that it timed out, the later ones that the connection is gone, without naming the transport."""
    command = [sys.executable, "-c", _SILENT, str(tmp_path / "store")]
    silent = subprocess.Popen([*command, "1"])
    try:
        done = subprocess.run([*command, "0"], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        said = done.stdout.splitlines()
    finally:
        silent.kill()
        silent.wait()
    assert len(said) == 6
    assert all(line.startswith("True") for line in said), said


@pytest.mark.parametrize(
    "message",
    [
        "Application timeout caused pair closure",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 6000ms for recv operation to complete",
        "Connection closed by peer [127.0.0.1]:1234",
        "NCCL communicator was aborted on rank 0.",
    ],
)
def test_what_the_transports_say_of_a_lost_rank_is_known(message: str) -> None:
    assert _is_lost(RuntimeError(message))


def test_an_error_of_the_model_is_no_lost_rank() -> None:
    assert not _is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x5)"))
    assert not _is_lost(ConnectionResetError("Connection reset by peer"))  # of a loader that reads over a network
