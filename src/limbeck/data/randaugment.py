"""RandAugment (Cubuk et al. 2020) on Pillow images, with torchvision's list of operations and its scales of magnitude."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from limbeck.pixels import pillow

if TYPE_CHECKING:
    from PIL import Image as PILImage

__all__ = ["OPERATIONS", "randaugment"]

Pixels = npt.NDArray[np.uint8]
_Operation = Callable[["PILImage.Image", float, float], "PILImage.Image"]
"""(image, strength in 0 .. 1, sign) -> image."""


def _affine(image: PILImage.Image, matrix: tuple[float, float, float, float, float, float]) -> PILImage.Image:
    module = pillow()
    return image.transform(image.size, module.Transform.AFFINE, matrix, module.Resampling.NEAREST)


def _enhanced(name: str) -> _Operation:
    def apply(image: PILImage.Image, strength: float, sign: float) -> PILImage.Image:
        from PIL import ImageEnhance

        enhanced: PILImage.Image = getattr(ImageEnhance, name)(image).enhance(1.0 + sign * 0.9 * strength)
        return enhanced

    return apply


def _rotate(image: PILImage.Image, strength: float, sign: float) -> PILImage.Image:
    return image.rotate(sign * 30.0 * strength, pillow().Resampling.NEAREST)


def _posterize(image: PILImage.Image, strength: float, sign: float) -> PILImage.Image:
    from PIL import ImageOps

    return ImageOps.posterize(image, 8 - round(4.0 * strength))


def _solarize(image: PILImage.Image, strength: float, sign: float) -> PILImage.Image:
    from PIL import ImageOps

    return ImageOps.solarize(image, int(255.0 * (1.0 - strength)))


def _autocontrast(image: PILImage.Image, strength: float, sign: float) -> PILImage.Image:
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def _equalize(image: PILImage.Image, strength: float, sign: float) -> PILImage.Image:
    from PIL import ImageOps

    return ImageOps.equalize(image)


OPERATIONS: dict[str, _Operation] = {
    "Identity": lambda image, strength, sign: image,
    "ShearX": lambda image, strength, sign: _affine(image, (1, sign * 0.3 * strength, 0, 0, 1, 0)),
    "ShearY": lambda image, strength, sign: _affine(image, (1, 0, 0, sign * 0.3 * strength, 1, 0)),
    "TranslateX": lambda image, strength, sign: _affine(image, (1, 0, int(sign * 150 / 331 * image.width * strength), 0, 1, 0)),
    "TranslateY": lambda image, strength, sign: _affine(image, (1, 0, 0, 0, 1, int(sign * 150 / 331 * image.height * strength))),
    "Rotate": _rotate,
    "Brightness": _enhanced("Brightness"),
    "Color": _enhanced("Color"),
    "Contrast": _enhanced("Contrast"),
    "Sharpness": _enhanced("Sharpness"),
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}


def randaugment(image: Pixels, draws: npt.NDArray[np.float64], magnitude: float) -> Pixels:
    """``image`` (H, W, 1 or 3) after ``len(draws) / 2`` operations, each chosen by one draw and signed by the next.

    magnitude: 0 .. 30, as in torchvision's 31 bins; fractions are allowed.
    """
    operations = list(OPERATIONS.values())
    grey = image.shape[2] == 1
    picture = pillow().fromarray(np.ascontiguousarray(image[..., 0] if grey else image))
    for choice, side in zip(draws[0::2], draws[1::2], strict=True):
        picture = operations[int(choice * len(operations))](picture, magnitude / 30.0, 1.0 if side < 0.5 else -1.0)
    pixels: Pixels = np.asarray(picture, dtype=np.uint8)
    return pixels[..., None] if grey else pixels
