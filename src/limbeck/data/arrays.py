"""Arrays in memory: NPZ files and the digits of scikit-learn."""

from __future__ import annotations

import difflib
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.data.ids import array_ids
from limbeck.data.labels import Labels, from_array
from limbeck.data.sources import ArrayImages, ImageList, Tensors, channels_last
from limbeck.data.splits import Part, Role
from limbeck.errors import Problem, listed, missing_extra, nearest

__all__ = ["digits", "images_part", "may_unfold_to", "part_from_array", "read_npz"]


def images_part(pixels: npt.NDArray[np.uint8], where: str, labels: Labels | None) -> Part:
    """A part of (N, H, W, Ch) uint8 images."""
    images = np.ascontiguousarray(pixels)
    height, width, channels = images.shape[1:]
    return Part(where, ArrayImages(images), array_ids(images), labels, size=(height, width), channels=channels)


def list_part(images: list[npt.NDArray[np.uint8]], where: str, labels: Labels | None) -> Part:
    """A part of (H, W, Ch) uint8 images of any sizes; grey ones are repeated where others are not."""
    ids = array_ids(images)
    channels = max((i.shape[2] for i in images), default=0)
    even = [np.repeat(i, channels, axis=2) if i.shape[2] == 1 and channels > 1 else i for i in images]
    sizes = {i.shape[:2] for i in even}
    if len(sizes) == 1:
        stack = np.stack(even)
        return Part(where, ArrayImages(stack), ids, labels, size=(stack.shape[1], stack.shape[2]), channels=channels)
    return Part(where, ImageList(even), ids, labels, size=None, channels=channels)


def part_from_array(values: npt.NDArray[Any], where: str, labels: Labels | None, problems: list[Problem]) -> Part | None:
    """A part of uint8 images (NHWC, NCHW or NHW) or of floats, told apart by their type. Problems are added, and None returned."""
    if labels is not None and values.ndim and len(values) != len(labels):
        problems.append(Problem(where, f"{len(values):,} samples, and {labels.where} has {len(labels):,} labels; they must be as many."))
        return None
    if values.dtype == np.uint8:
        try:
            return images_part(channels_last(values), where, labels)
        except ValueError as error:
            problems.append(Problem(where, f"{error}.", "Features that are no images are given as floats."))
            return None
    if values.dtype.kind == "f" and values.ndim >= 2:
        bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if bad.any():
            rows = listed([str(r) for r in np.flatnonzero(bad)[:5]])
            problems.append(Problem(where, f"{int(bad.sum())} samples hold NaN or infinite values (rows {rows})."))
            return None
        array = np.ascontiguousarray(values)
        return Part(where, Tensors(array), array_ids(array), labels, shape=array.shape[1:])
    hint = "Convert them with .astype('uint8') or .astype('float32')." if values.dtype.kind in "iub" else ""
    message = f"samples have type {values.dtype} and shape {values.shape}; uint8 images or floats of shape (N, ...) are expected."
    problems.append(Problem(where, message, hint))
    return None


_NAMES: dict[Role, str] = {"train": "train", "valid": "valid", "test": "test", "unlabelled": "unlabelled"}


def read_npz(path: Path, role: Role | None, problems: list[Problem]) -> tuple[dict[Role, Part], tuple[str, ...] | None]:
    """The splits of an NPZ file, and its class names (array ``classes``) where it has them.

    ``role`` None: arrays ``train_x, train_y, test_x, test_y``, optional ``valid_x, valid_y, unlabelled_x``. A role: a further file for that
    split, with arrays named so, or ``x, y``, or being the only ones.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            assert archive.zip is not None
            _check_sizes(archive.zip)
            names = sorted(archive.files)
            arrays: dict[str, npt.NDArray[Any]] = {}
            for name in names:
                try:
                    arrays[name] = archive[name]
                except ValueError:
                    message = f"array '{name}' holds Python objects, which are never unpickled."
                    problems.append(Problem(str(path), message, "Save it as numbers, or as strings with dtype 'U'."))
    except (OSError, ValueError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        problems.append(Problem(str(path), f"cannot be read as an .npz file: {error or type(error).__name__}."))
        return {}, None
    if problems:
        return {}, None
    parts: dict[Role, Part] = {}
    for split in _NAMES if role is None else (role,):
        x, y = f"{split}_x", f"{split}_y"
        if role is not None and x not in arrays:
            if "x" in arrays:
                x, y = "x", "y"
            elif split == "unlabelled" and len(arrays) == 1:
                x = names[0]
        if x not in arrays:
            if role is not None or split == "train" or y in arrays:
                problems.append(Problem(str(path), f"there is no array '{x}'; there are {listed(names)}.", nearest(x, names)))
            continue
        labels = None
        if split != "unlabelled":
            if y not in arrays:
                message = f"there is no array '{y}' for '{x}'; there are {listed(names)}."
                problems.append(Problem(str(path), message, nearest(y, set(names) - {x})))
                continue
            labels = from_array(arrays[y], f"{path}: {y}", problems)
            if labels is None:
                continue
        part = part_from_array(arrays[x], f"{path}: {x}", labels, problems)
        if part is not None:
            parts[split] = part
    expected = {f"{s}_{a}" for s in _NAMES for a in "xy"} | {"classes"}
    for name in names if role is None else ():
        # other arrays are somebody's notes; a misspelt one would be a split that is silently not used
        close = difflib.get_close_matches(name.lower(), sorted(expected - set(names)), n=1, cutoff=0.8)
        if name not in expected and close:
            message = f"array '{name}' is not one of the names that are read."
            problems.append(Problem(str(path), message, f"Did you mean '{close[0]}'?"))
    return parts, _class_names(arrays.get("classes"), path, problems)


def may_unfold_to(packed: int) -> int:
    """The bytes that a file of ``packed`` bytes may take in memory: images compress to a tenth and texts to a fifth, zeros to a thousandth.

    >>> may_unfold_to(0) >> 20, may_unfold_to(10 << 20) >> 20
    (256, 2000)
    """
    return max(256 << 20, 200 * packed)


def _check_sizes(archive: zipfile.ZipFile) -> None:
    """Refuse what would fill the memory: arrays that say they are larger than they are, and files that unfold without measure.

    Raises:
        ValueError: says which array, and its bytes.
    """
    for member in archive.infolist():
        if member.file_size > may_unfold_to(member.compress_size):
            raise ValueError(f"'{member.filename}' has {member.compress_size:,} bytes that unfold to {member.file_size:,}")
        if not member.filename.endswith(".npy"):
            continue
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            wanted, there = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
        if not dtype.hasobject and (min(shape, default=0) < 0 or wanted > there):
            raise ValueError(
                f"'{member.filename}' says that it is {dtype} of shape {shape}, which takes {wanted:,} bytes, and has {there:,}"
            )


def _class_names(array: npt.NDArray[Any] | None, path: Path, problems: list[Problem]) -> tuple[str, ...] | None:
    if array is None:
        return None
    if array.ndim != 1 or array.dtype.kind not in "US":
        problems.append(Problem(f"{path}: classes", f"an array of names is expected, not {array.dtype} of shape {array.shape}."))
        return None
    return tuple(v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in array.tolist())


def digits() -> tuple[dict[Role, Part], tuple[str, ...]]:
    """1,797 handwritten digits, 8 x 8, one channel (E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998; the
    test set, as in scikit-learn), grey levels 0 .. 16 scaled to 0 .. 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise missing_extra("scikit-learn", "vision", "The data set 'digits'") from e
    found = load_digits()
    images, labels = np.round(found.images * (255 / 16)).astype(np.uint8), found.target
    values = Labels("digits", labels.astype(np.int64))
    return {"train": images_part(images[..., None], "digits", values)}, tuple(str(d) for d in range(10))
