"""Views: augmented versions of images, each a pure function of (data seed, sample id, view).

All draws come from :func:`limbeck.randomness.uniform`, row by row, so that a view is the same alone, in any batch and in any worker.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from limbeck.data.ids import Ids
from limbeck.data.randaugment import randaugment
from limbeck.data.sources import Kind
from limbeck.data.splits import Data
from limbeck.errors import Problem, UsageError
from limbeck.randomness import mix, seed_for, uniform
from limbeck.recipe import Augment

if TYPE_CHECKING:
    from limbeck.data.splits import Split

__all__ = ["Partners", "augmentation", "beta", "check_augment", "image_views"]

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

_SMALL = 40  # pixels: below, a padded crop is the custom; above, a resized one


def augmentation(setting: Literal["none", "standard"] | Augment, data: Data) -> Augment | None:
    """What ``data.augment`` means for this data, or None.

    ``standard``: images of one size up to 40 pixels: a crop after zero-padding by an eighth of the height, and a flip where they have more
    than one channel; larger or of several sizes: a resized crop of 0.25 to 1 of the area, and a flip; text and float arrays: nothing.

    Raises:
        UsageError: the setting has no effect on, or makes no sense for, this kind of data.
    """
    if setting == "none":
        return None
    if setting == "standard":
        if data.kind != "image":
            return None
        flip = data.channels > 1  # grey arrays are often digits and letters, and a mirrored one is another
        if data.image_size is not None and max(data.image_size) <= _SMALL:
            return Augment(crop=max(1, data.image_size[0] // 8), flip=flip)
        return Augment(resized_crop=(0.25, 1.0), flip=flip)
    check_augment(setting, data.kind, data.channels)
    active = any((setting.crop, setting.resized_crop, setting.flip, setting.randaugment, setting.erase, setting.mixup))
    return setting if active else None


def check_augment(setting: Augment, kind: Kind, channels: int = 3) -> None:
    """Refuse what has no effect on, or makes no sense for, this kind of data.

    Raises:
        UsageError: with all problems.
    """
    problems: list[Problem] = []
    if kind != "image":
        for name in ("crop", "resized_crop", "flip", "randaugment", "erase"):
            if getattr(setting, name):
                problems.append(Problem(f"data.augment.{name}", f"it is for uint8 images, and the data is of kind {kind}."))
        if setting.mixup and kind == "text":
            problems.append(Problem("data.augment.mixup", "it is for images and float arrays, and the data is text."))
    elif setting.crop and setting.resized_crop:
        problems.append(Problem("data.augment", "crop and resized_crop exclude each other.", "Remove one of them."))
    if kind == "image" and setting.randaugment and channels not in (1, 3):
        problems.append(Problem("data.augment.randaugment", f"it is for images with 1 or 3 channels, not {channels}."))
    if setting.resized_crop is not None and not 0 < setting.resized_crop[0] <= setting.resized_crop[1] <= 1:
        given = list(setting.resized_crop)
        problems.append(Problem("data.augment.resized_crop", f"{given} is no range of area fractions, from above 0 to at most 1."))
    if problems:
        raise UsageError(problems)


def image_views(raw: Pixels | list[Pixels], ids: Ids, view: int, augment: Augment, data_seed: int) -> Pixels | list[Pixels]:
    """The views of raw images, at their own geometry (a resized crop: cropped only; the models resize it).

    raw: uint8 ``(B, H, W, Ch)`` or a list of ``(H, W, Ch)``. ids: ``(B, 2)``.
    """
    if isinstance(raw, list):
        views = [image_views(image[None], ids[i : i + 1], view, augment, data_seed) for i, image in enumerate(raw)]
        return [v[0] for v in views]
    if augment.resized_crop is not None:
        cropped = [_resized_crop(image, ids[i : i + 1], view, augment.resized_crop, data_seed) for i, image in enumerate(raw)]
        return image_views(cropped, ids, view, augment.model_copy(update={"resized_crop": None}), data_seed)
    images = raw
    if augment.crop:
        images = _crop(images, uniform(ids, 2, data_seed, "crop", view), augment.crop)
    if augment.flip:
        turned = uniform(ids, 1, data_seed, "flip", view)[:, 0] < 0.5
        images = images.copy()
        images[turned] = images[turned, :, ::-1]
    if augment.randaugment is not None:
        count, magnitude = augment.randaugment
        draws = uniform(ids, 2 * count, data_seed, "randaugment", view)
        images = np.stack([randaugment(image, draw, magnitude) for image, draw in zip(images, draws, strict=True)])
    if augment.erase:
        images = _erase(images, uniform(ids, 41, data_seed, "erase", view), augment.erase)
    return images


def _crop(images: Pixels, draws: Floats, pad: int) -> Pixels:
    """Zero-padded by ``pad`` on each side, then cut back to the old size at a random place."""
    count, height, width, channels = images.shape
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0))).reshape(count, height + 2 * pad, -1)
    at = (draws * (2 * pad + 1)).astype(np.int64)
    # rows of pixels lie together, so that a window is a few long copies
    windows = sliding_window_view(padded, (height, width * channels), axis=(1, 2))
    cut: Pixels = windows[np.arange(count), at[:, 0], at[:, 1] * channels].reshape(images.shape)
    return cut


def _box(height: int, width: int, draws: Floats, area: tuple[float, float], ratio: tuple[float, float]) -> tuple[int, int, int, int] | None:
    """``(top, left, height, width)`` of a random box: the first of the drawn (area, ratio) pairs that fits, as torchvision tries them.

    draws: ``(2 k + 2,)``: k areas, k ratios, and the place.
    """
    tries = (len(draws) - 2) // 2
    areas = height * width * (area[0] + draws[:tries] * (area[1] - area[0]))
    ratios = np.exp(math.log(ratio[0]) + draws[tries : 2 * tries] * (math.log(ratio[1]) - math.log(ratio[0])))
    widths, heights = np.rint(np.sqrt(areas * ratios)).astype(int), np.rint(np.sqrt(areas / ratios)).astype(int)
    fits = np.flatnonzero((widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height))
    if not len(fits):
        return None
    h, w = int(heights[fits[0]]), int(widths[fits[0]])
    return int(draws[-2] * (height - h + 1)), int(draws[-1] * (width - w + 1)), h, w


def _resized_crop(image: Pixels, ids: Ids, view: int, area: tuple[float, float], data_seed: int) -> Pixels:
    """A box of a random area fraction and a ratio of 3/4 to 4/3 (Szegedy et al. 2015), the largest centred one where none fits."""
    height, width, _ = image.shape
    box = _box(height, width, uniform(ids, 22, data_seed, "resized_crop", view)[0], area, (3 / 4, 4 / 3))
    if box is None:
        h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
        box = ((height - h) // 2, (width - w) // 2, h, w)
    top, left, h, w = box
    return image[top : top + h, left : left + w]


def _erase(images: Pixels, draws: Floats, probability: float) -> Pixels:
    """A black box of 0.02 to 1/3 of the area and a ratio of 0.3 to 3.3 (Zhong et al. 2017), with the given probability."""
    out = images.copy()
    for number in np.flatnonzero(draws[:, 0] < probability):
        box = _box(images.shape[1], images.shape[2], draws[number, 1:], (0.02, 1 / 3), (0.3, 3.3))
        if box is not None:
            top, left, height, width = box
            out[number, top : top + height, left : left + width] = 0
    return out


def beta(ids: Ids, alpha: float, *key: int | str) -> Floats:
    """``(B,)`` draws of Beta(alpha, alpha), row i a function of ``ids[i]`` and ``key``.

    The ratio of two gamma variables by Marsaglia and Tsang 2000 ("A simple method for generating gamma variables", with their boost for
    shapes below 1, in logarithms). 16 tries are drawn at once; that all are rejected has a probability below 1e-20.
    """
    draws = 1.0 - uniform(ids, 2 * (16 * 3 + 1), *key, "beta")  # (0, 1]
    first, second = _log_gamma(draws[:, :49], alpha), _log_gamma(draws[:, 49:], alpha)
    return 1.0 / (1.0 + np.exp(np.clip(second - first, -700.0, 700.0)))


def _log_gamma(draws: Floats, alpha: float) -> Floats:
    d = alpha + 1.0 - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    u1, u2, u3 = draws[:, :16], draws[:, 16:32], draws[:, 32:48]
    normal = np.sqrt(-2.0 * np.log(u1)) * np.cos(2.0 * np.pi * u2)
    base = 1.0 + c * normal
    v = np.where(base > 0, base, 1.0) ** 3
    accepted = (base > 0) & (np.log(u3) < 0.5 * normal**2 + d - d * v + d * np.log(v))
    chosen = np.argmax(accepted, axis=1)
    value: Floats = np.log(d * v[np.arange(len(v)), chosen]) + np.log(draws[:, 48]) / alpha
    return value


class Partners:
    """Mixup's partners: for each sample another of the same labelledness, a function of (data seed, id, view) and of which samples there
    are, not of their order. A sample more or less changes few partners, so that few teacher rows become stale."""

    def __init__(self, split: Split, data_seed: int) -> None:
        self._words = mix(split.ids[:, 0]) ^ split.ids[:, 1]
        self._labelled = split.labels >= 0
        self._seed = data_seed
        self._rings: tuple[int, dict[bool, tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]]] | None = None

    def _ring(self, view: int) -> dict[bool, tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]]:
        # samples stand on a ring at hashes that change with the view: so no sample is everybody's neighbour for ever
        if self._rings is None or self._rings[0] != view:
            places = mix(self._words ^ np.uint64(seed_for(self._seed, "mixup ring", view)))
            rings: dict[bool, tuple[Any, Any]] = {}
            for labelled in (False, True):
                members = np.flatnonzero(self._labelled == labelled)
                ordered = members[np.argsort(places[members], kind="stable")]
                rings[labelled] = (places[ordered], ordered)
            self._rings = (view, rings)
        return self._rings[1]

    def of(self, indices: npt.NDArray[np.int64], view: int) -> npt.NDArray[np.int64]:
        """The partner's index for each of ``indices``."""
        with np.errstate(over="ignore"):
            targets = mix(self._words[indices] ^ np.uint64(seed_for(self._seed, "mixup partner", view)))
        partners = np.empty(len(indices), np.int64)
        for labelled, (places, members) in self._ring(view).items():
            here = self._labelled[indices] == labelled
            if here.any():
                partners[here] = members[np.searchsorted(places, targets[here]) % len(members)]
        return partners
