"""Short versions of R8 to R12; the long ones are the ``run`` of each module."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import r08_disk_full as r08
from faults import r09_not_finite as r09
from faults import r10_bad_samples as r10
from faults import r11_hostile_files as r11
from faults import r12_configurations as r12
from limbeck.checkpoint import load_newest
from limbeck.data import load_data
from limbeck.errors import UsageError
from limbeck.recipe import DataSpec


def test_r8_a_full_disk() -> None:
    reason = r08.why_not()
    if reason:
        pytest.skip(reason)
    found = r08.run(2, export=("torchscript",))
    assert found["held"] == found["tried"] == 2, found["details"]


def test_r9_not_finite() -> None:
    found = r09.run(10, places=r09.PLACES[:-1], whole=False)
    assert found["held"] == found["tried"] > 10, found["details"]
    found = r09.run(10, places=("optimiser",), whole=False)
    assert found["held"] == found["tried"] > 10, found["details"]


def test_r10_bad_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path / "home"))
    kinds = {f"{s}/{c}/{i}.jpg": "good" for s in ("train", "test") for c in r10.CLASSES for i in range(3)}
    slow = ("enormous", "a comment of 512 MB")  # to make, not to refuse
    strange = [k for k in (*r10.BAD, *r10.ODD) if k not in slow]
    kinds |= {f"train/{r10.CLASSES[i % 5]}/x{i}.jpg": kind for i, kind in enumerate(strange)}
    monkeypatch.setattr(r10, "enormous", lambda side: b"")
    monkeypatch.setattr(r10, "text_bomb", lambda: b"")
    r10.furnish(tmp_path, kinds, 1)
    bad = {name for name, kind in kinds.items() if kind in r10.BAD}
    with pytest.raises(UsageError) as refused:
        load_data(DataSpec(source="imagefolder:photos"), "image-classification", tmp_path)
    assert {str(Path(p.where).relative_to(tmp_path / "photos")) for p in refused.value.problems[:-1]} == bad
    data = load_data(DataSpec(source="imagefolder:photos", corrupt="skip"), "image-classification", tmp_path)
    assert {str(Path(sample).relative_to(tmp_path / "photos")) for sample, _ in data.skipped} == bad
    assert len(data.train) + len(data.valid) + len(data.test) == len(kinds) - len(bad)


def test_r11_what_may_run_code_stands_in_convert_alone() -> None:
    for text in (
        "import pickle",
        "torch.load(f)",
        "yaml.load(f)",
        "eval('1')",
        "np.load(f)",
        "f(trust_remote_code=True)",
        "from joblib import load",
    ):
        assert r11.forbidden(text + "\n"), text
    for text in ("model.eval()", "x = 'eval(1)'  # torch.load(", "np.load(f, allow_pickle=False)", "re.compile(x)", "yaml.safe_load(f)"):
        assert not r11.forbidden(text + "\n"), text
    assert r11.forbidden((r11.SOURCE / "convert.py").read_text(encoding="utf-8"))
    assert r11.in_the_source() == {}


@pytest.mark.parametrize("name", r11.CHECKPOINTS)
def test_r11_a_hostile_checkpoint_is_passed_over(name: str, tmp_path: Path) -> None:
    arguments = r11.CHECKPOINTS[name](tmp_path, r11.random.Random(0))
    said: list[str] = []
    found = load_newest(Path(arguments[1]), said.append)
    assert found is not None
    assert found[0] == 1
    assert len(said) == 1
    assert "step-00000002 is passed over" in said[0]
    assert not r11.canary_of(tmp_path).exists()


def test_r12_configurations() -> None:
    found = r12.run(30)
    assert found["held"] == found["tried"] == 30, found["details"]
