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


def draws_views(setting: Augment) -> bool:
    """Whether an image looks different from view to view before it is mixed with another one."""
    return bool(setting.crop or setting.resized_crop or setting.flip or setting.randaugment or setting.erase)


def image_views(raw: Pixels | list[Pixels], ids: Ids, view: int, augment: Augment, data_seed: int) -> Pixels | list[Pixels]:
    """The views of raw images, at their own geometry (a resized crop: cropped only; the models resize it).

    raw: uint8 ``(B, H, W, Ch)`` or a list of ``(H, W, Ch)``. ids: ``(B, 2)``.
    """
    draws = _draws(ids, view, augment, data_seed)
    images = raw if augment.resized_crop is None else _resized_crops(raw, draws["resized_crop"], augment.resized_crop)
    if isinstance(images, list):
        rows = [{name: drawn[i : i + 1] for name, drawn in draws.items()} for i in range(len(images))]
        return [_changed(image[None], row, augment)[0] for image, row in zip(images, rows, strict=True)]
    return _changed(images, draws, augment)


def _draws(ids: Ids, view: int, augment: Augment, data_seed: int) -> dict[str, Floats]:
    """What is drawn for each change that is asked for, ``(B, draws)``: for the whole batch at once, row i a function of ``ids[i]``."""
    draws = {}
    if augment.resized_crop is not None:
        draws["resized_crop"] = uniform(ids, 22, data_seed, "resized_crop", view)
    if augment.crop:
        draws["crop"] = uniform(ids, 2, data_seed, "crop", view)
    if augment.flip:
        draws["flip"] = uniform(ids, 1, data_seed, "flip", view)
    if augment.randaugment is not None:
        draws["randaugment"] = uniform(ids, 2 * augment.randaugment[0], data_seed, "randaugment", view)
    if augment.erase:
        draws["erase"] = uniform(ids, 41, data_seed, "erase", view)
    return draws


def _changed(images: Pixels, draws: dict[str, Floats], augment: Augment) -> Pixels:
    """All changes but the resized crop, in their order."""
    if augment.crop:
        images = _crop(images, draws["crop"], augment.crop)
    if augment.flip:
        images = _flip(images, draws["flip"][:, 0] < 0.5)
    if augment.randaugment is not None:
        magnitude = augment.randaugment[1]
        images = np.stack([randaugment(image, draw, magnitude) for image, draw in zip(images, draws["randaugment"], strict=True)])
    if augment.erase:
        images = _erase(images, draws["erase"], augment.erase)
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


def _flip(images: Pixels, turned: npt.NDArray[np.bool_]) -> Pixels:
    """A copy, mirrored where ``turned`` says so."""
    out = images.copy()
    whole = out.view(f"V{images.shape[3]}")[..., 0]  # a pixel is moved as one element, which takes half the time
    whole[turned] = whole[turned, :, ::-1]
    return out


def _boxes(
    heights: npt.NDArray[np.int64], widths: npt.NDArray[np.int64], draws: Floats, area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Random boxes in images of these sizes: ``(B, 4)`` top, left, height, width, and ``(B,)`` whether there is one.

    It is the first of the drawn (area, ratio) pairs that fits, as torchvision tries them. draws: ``(B, 2 k + 2)``: k areas, k ratios, and
    the place.
    """
    tries = (draws.shape[1] - 2) // 2
    areas = (heights * widths)[:, None] * (area[0] + draws[:, :tries] * (area[1] - area[0]))
    ratios = np.exp(math.log(ratio[0]) + draws[:, tries : 2 * tries] * (math.log(ratio[1]) - math.log(ratio[0])))
    tried_w, tried_h = np.rint(np.sqrt(areas * ratios)).astype(np.int64), np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (tried_w >= 1) & (tried_h >= 1) & (tried_w <= widths[:, None]) & (tried_h <= heights[:, None])
    first = (np.arange(len(draws)), fits.argmax(axis=1))
    h, w = tried_h[first], tried_w[first]
    top, left = (draws[:, -2] * (heights - h + 1)).astype(np.int64), (draws[:, -1] * (widths - w + 1)).astype(np.int64)
    found: npt.NDArray[np.bool_] = np.logical_or.reduce(fits, axis=1)
    return np.stack([top, left, h, w], axis=1), found


def _resized_crops(raw: Pixels | list[Pixels], draws: Floats, area: tuple[float, float]) -> list[Pixels]:
    """Boxes of a random area fraction and a ratio of 3/4 to 4/3 (Szegedy et al. 2015), the largest centred one where none fits."""
    heights, widths = (np.array([image.shape[axis] for image in raw], dtype=np.int64) for axis in (0, 1))
    boxes, found = _boxes(heights, widths, draws, area, (3 / 4, 4 / 3))
    crops = []
    for image, (top, left, h, w), fits in zip(raw, boxes.tolist(), found.tolist(), strict=True):
        if not fits:
            height, width = image.shape[:2]
            h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
            top, left = (height - h) // 2, (width - w) // 2
        crops.append(image[top : top + h, left : left + w])
    return crops


def _erase(images: Pixels, draws: Floats, probability: float) -> Pixels:
    """A black box of 0.02 to 1/3 of the area and a ratio of 0.3 to 3.3 (Zhong et al. 2017), with the given probability."""
    out = images.copy()
    count, height, width = images.shape[:3]
    boxes, found = _boxes(np.full(count, height), np.full(count, width), draws[:, 1:], (0.02, 1 / 3), (0.3, 3.3))
    for number in np.flatnonzero((draws[:, 0] < probability) & found).tolist():
        top, left, h, w = boxes[number].tolist()
        out[number, top : top + h, left : left + w] = 0
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
