"""A checkpoint is complete or not there, and nothing on disk is believed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck import checkpoint
from limbeck.errors import UsageError


def state(value: float) -> dict[str, object]:
    return {"a": torch.full((3,), value), "nested": {0: {"m": torch.arange(4)}, "list": [1, (2.5, None), "x"]}, "flag": True}


def test_a_tree_comes_back_as_it_was() -> None:
    skeleton, tensors = checkpoint.pack(state(1.5))
    found = checkpoint.unpack(skeleton, tensors)
    assert found["nested"][0]["m"].tolist() == [0, 1, 2, 3]
    assert found["nested"]["list"] == [1, (2.5, None), "x"]
    assert found["a"].tolist() == [1.5] * 3


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found[0] == 3
    assert found[1]["a"].tolist() == [3.0] * 3


@pytest.mark.parametrize(("damaged", "kept"), [((10,), ["step-00000008", "step-00000009"]), ((8, 10), ["step-00000009"])])
def test_what_is_committed_after_damaged_ones_stays(tmp_path: Path, damaged: tuple[int, ...], kept: list[str]) -> None:
    """They are of later steps, and must neither count as the newest nor push out the good one before."""
    for step in (8, 10):
        checkpoint.save(tmp_path, step, state(step))
    for step in damaged:
        (tmp_path / f"step-{step:08d}" / "state.json").write_text("{}")
    before = checkpoint.load_newest(tmp_path)
    assert (before[0] if before is not None else 0) == (8 if 8 not in damaged else 0)
    checkpoint.save(tmp_path, 9, state(9))
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found[0] == 9
    assert [name for name in sorted(p.name for p in tmp_path.iterdir()) if name in kept] == kept
    assert not (tmp_path / "step-00000010").exists()


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_every_flipped_byte_is_passed_over_for_the_one_before(tmp_path: Path, name: str) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    checkpoint.save(tmp_path, 2, state(2))
    path = tmp_path / "step-00000002" / name
    good = path.read_bytes()
    for i in range(len(good)):
        path.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        passed_over(tmp_path)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_truncations_are_passed_over(tmp_path: Path, name: str) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    checkpoint.save(tmp_path, 2, state(2))
    path = tmp_path / "step-00000002" / name
    good = path.read_bytes()
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        passed_over(tmp_path)
    path.write_bytes(good + b"\n")
    passed_over(tmp_path)


def passed_over(folder: Path) -> None:
    """The second of two checkpoints is refused by its name, for the first."""
    said: list[str] = []
    found = checkpoint.load_newest(folder, said.append)
    assert found is not None
    assert found[0] == 1
    assert len(said) == 1
    assert "step-00000002 is passed over" in said[0]


def test_one_of_a_later_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """And one that is not even JSON is no matter here: it is passed over when it is read."""
    path = checkpoint.save(tmp_path / "student", 1, state(1)) / "manifest.json"
    checkpoint.refuse_newer(tmp_path)
    path.write_text("{")
    checkpoint.refuse_newer(tmp_path)
    path.write_text('{"format": 2}')
    with pytest.raises(UsageError, match=r"step-00000001 has format 2, and this version of Limbeck reads 1\. .*pip install -U limbeck"):
        checkpoint.refuse_newer(tmp_path)


def test_left_overs_are_swept_and_never_believed(tmp_path: Path) -> None:
    left = tmp_path / ".step-00000009.1.tmp"
    left.mkdir()
    (left / "state.json").write_text("{}")
    assert checkpoint.load_newest(tmp_path) is None
    assert not left.exists()


def test_moments_get_the_strides_of_their_parameters() -> None:
    p = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([p])
    p.grad = torch.randn_like(p)
    optimizer.step()
    skeleton, tensors = checkpoint.pack(optimizer.state_dict())
    fresh = torch.optim.AdamW([p])
    checkpoint.restore_optimizer(fresh, checkpoint.unpack(skeleton, {k: t.contiguous() for k, t in tensors.items()}))
    assert fresh.state[p]["exp_avg"].stride() == p.stride()
    assert torch.equal(fresh.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])
