"""Ranks find each other, whatever those before them have left in the launcher's store."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from limbeck.errors import Stopped, UsageError
from limbeck.ranks import ALONE, Ranks, joined, meet, restarted


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
