"""The table of `make mutants` fits the code: every text that it replaces stands there exactly once."""

from __future__ import annotations

import pytest

from mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_old_text_occurs_exactly_once(mutant: Mutant) -> None:
    assert (ROOT / "src/limbeck" / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.new != mutant.old
    for test in mutant.tests:
        file, _, name = test.partition("::")
        kind = "class {}:" if name.startswith("Test") and "::" not in name else "def {}("
        assert kind.format(name.rpartition("::")[2]) in (ROOT / "tests" / file).read_text(encoding="utf-8") or not name


def test_names_are_unique() -> None:
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
