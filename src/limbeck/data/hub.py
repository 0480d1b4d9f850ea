"""Data sets of the Hugging Face hub (or folders in its layout), read by the ``datasets`` library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.data.labels import Labels
from limbeck.data.splits import Part, Role
from limbeck.data.tables import part_from_table, split_of
from limbeck.errors import Problem, UsageError, listed, missing_extra, nearest

if TYPE_CHECKING:
    from limbeck.recipe import DataSpec

__all__ = ["part_from_dataset", "read_hub"]


def read_hub(
    name: str, base: Path, role: Role | None, spec: DataSpec, task: str, notes: list[str], problems: list[Problem]
) -> tuple[dict[Role, Part], tuple[str, ...] | None]:
    """The splits of ``HUB_ID`` or ``HUB_ID:CONFIGURATION``, and its ClassLabel names.

    A split whose labels are all -1 (hidden) is left out; the validation split then takes the place of a test split.
    """
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "text", "Reading data sets of the Hugging Face hub") from None
    local = base / name
    hub_id, _, configuration = (str(local), "", "") if local.exists() else name.partition(":")
    try:
        if local.is_dir() and ((local / "dataset_dict.json").exists() or (local / "state.json").exists()):
            loaded = datasets.load_from_disk(str(local))
        else:
            loaded = datasets.load_dataset(hub_id, configuration or None)
    except Exception as error:  # the library raises its own, the hub client's, HTTP and builders' errors
        text = str(error).strip().splitlines()
        problems.append(Problem("data.source", f"hf:{name} cannot be loaded: {text[0] if text else type(error).__name__}"))
        return {}, None
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    chosen: dict[Role, Any] = {}
    for key, dataset in splits.items():
        meant = split_of(str(key))
        if meant is not None and meant not in chosen:
            chosen[meant] = dataset
    if role is not None:
        if role not in chosen and len(splits) != 1:
            message = f"hf:{name} has no {role} split; it has {listed([str(s) for s in splits])}."
            problems.append(Problem(f"data.{role}", message, nearest(role, [str(s) for s in splits])))
            return {}, None
        chosen = {role: chosen.get(role, next(iter(splits.values())))}
    elif "train" not in chosen:
        problems.append(Problem("data.source", f"hf:{name} has no train split; it has {listed([str(s) for s in splits])}."))
        return {}, None
    parts: dict[Role, Part] = {}
    classes: tuple[str, ...] | None = None
    for split, dataset in chosen.items():
        where = f"hf:{name} ({split})"
        part, names = part_from_dataset(dataset, where, split, spec, task, notes, problems)
        classes = classes or names
        if part is None:
            continue
        if role is None and split in ("test", "valid") and part.labels is not None and _hidden(part.labels):
            notes.append(f"{where} has no labels (all are -1) and is not used.")
            continue
        parts[split] = part
    if role is None and "test" in chosen and "test" not in parts and "valid" in parts:
        parts["test"] = parts.pop("valid")
        notes.append(f"The validation split of hf:{name} is used as the test split.")
    return parts, classes


def _hidden(labels: Labels) -> bool:
    return not labels.named and len(labels) > 0 and bool((labels.values == -1).all())


def part_from_dataset(
    dataset: Any, where: str, role: Role, spec: DataSpec, task: str, notes: list[str], problems: list[Problem]
) -> tuple[Part | None, tuple[str, ...] | None]:
    """One split of a ``datasets.Dataset``; images stay encoded until they are read."""
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "with_format"):
        raise UsageError(Problem(where, f"a datasets.Dataset is expected, not {type(dataset).__name__} (no streaming)."))
    features = dict(dataset.features or {})
    names = getattr(features.get(spec.label), "names", None)
    table = dataset.with_format("arrow")[:]
    return part_from_table(table, where, role, spec, task, notes, problems), tuple(map(str, names)) if names else None
