"""Short versions of the rows of several processes; `python tests/faults/together.py ROW` runs the long ones."""

from __future__ import annotations

import pytest

from faults import r03_world_size, r06_ranks, r07_lost_rank


@pytest.mark.parametrize(("row", "count"), [(r03_world_size, 1), (r06_ranks, 2), (r07_lost_rank, 1)])
def test_a_few_of_each(row: object, count: int) -> None:
    found = row.run(count)  # type: ignore[attr-defined]
    assert found["held"] == found["tried"], found["details"]["failed"]
    assert found["tried"] >= count
