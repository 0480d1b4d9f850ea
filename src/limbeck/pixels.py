"""Encoded images to uint8 arrays and back, and from there to what a model takes; the only file that knows Pillow's modes.

Training and serving both go through it, and it needs no torch.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from limbeck.errors import Problem, UsageError, missing_extra

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from limbeck.preprocessing import ImagePreprocessing

__all__ = [
    "EXTENSIONS",
    "TooManyPixels",
    "Undecodable",
    "channels_of",
    "decode",
    "fit",
    "inspect",
    "normalise",
    "pillow",
    "png",
    "resize",
    "to_array",
]

Pixels = npt.NDArray[np.uint8]

EXTENSIONS = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".dib",
        ".gif",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".jp2",
        ".avif",
        ".tga",
        ".ico",
    ]
)
"""File name endings that are taken for images."""

_GREY = frozenset(["1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"])


_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")
"""What Pillow calls the formats of these files. It goes by the content and not by the name, and would hand a PostScript file to Ghostscript."""

MAX_PIXELS = 89_478_485
"""Of one image: 256 MiB of RGB. Pillow warns from here on; a small file may say that it has far more."""

MAX_BYTES = 1 << 30
"""Of one encoded image."""


class Undecodable(Exception):
    """Bytes that are no image, or a damaged one; the message says why."""


class TooManyPixels(Undecodable):
    """An image with more pixels than are decoded."""


def pillow() -> Any:
    """The module ``PIL.Image``.

    Raises:
        UsageError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise missing_extra("pillow", "vision", "Reading and resizing images") from None
    return Image


@contextmanager
def _opened(content: bytes, most: int | None = None) -> Iterator[Any]:
    """The Pillow image, its header read and judged, nothing decoded. Raises: Undecodable, also for what is raised inside."""
    image_module, most = pillow(), MAX_PIXELS if most is None else most
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image_module.init()
            with image_module.open(io.BytesIO(content), formats=[f for f in _FORMATS if f in image_module.OPEN]) as image:
                width, height = image.size
                if width * height > most:
                    raise TooManyPixels(f"it has {width:,} x {height:,} pixels, and at most {most:,} are decoded")
                yield image
    except Undecodable:
        raise
    except Exception as error:  # Pillow's plugins raise anything at all on damaged files
        raise Undecodable(_reason(error)) from None


def channels_of(mode: str) -> int:
    """1 for Pillow's grey modes, 3 for all others."""
    return 1 if mode in _GREY else 3


def _reason(error: Exception) -> str:
    text = str(error).strip().rstrip(".")
    if not text or "cannot identify" in text:
        return "it is not an image that can be read"
    if "DecompressionBomb" in type(error).__name__:
        return f"it has more pixels than the {MAX_PIXELS:,} that are decoded"
    return text


def inspect(content: bytes) -> tuple[int, int, int]:
    """``(height, width, channels)`` as :func:`decode` will give them, after decoding everything once at the least cost.

    Raises:
        Undecodable: not an image, or truncated.
    """
    with _opened(content) as image:
        width, height = image.size
        # JPEG: all of the entropy coding, little of the rest
        drafted = image.draft(None, (max(1, width // 8), max(1, height // 8)))
        image.load()
        if drafted is None:
            width, height = image.size  # the TIFF reader turns images itself while it loads them
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        channels = channels_of(image.mode)
    return (width, height, channels) if turned else (height, width, channels)


def decode(content: bytes, channels: int | None, draft: int | None = None, most: int | None = None) -> Pixels:
    """``(H, W, channels)`` uint8 of an encoded image, upright by its EXIF orientation.

    The first frame of an animation; 16-bit grey by its high byte; palettes, CMYK and others converted; alpha dropped. ``channels`` is 1 or
    3, or None for one channel of grey images and three of all others. ``draft`` allows
    a smaller decoding with sides of at least that many pixels, for statistics and thumbnails. More than ``most`` pixels are refused
    (:class:`TooManyPixels`).

    Raises:
        Undecodable: not an image, or truncated.
    """
    with _opened(content, most) as image:
        if draft is not None:
            image.draft(None, (draft, draft))
        return to_array(image, channels)


def to_array(image: PILImage.Image, channels: int | None = None) -> Pixels:
    """``(H, W, channels)`` uint8 of a Pillow image; by default one channel for grey images and three for all others."""
    from PIL import ImageOps

    wanted = channels_of(image.mode) if channels is None else channels
    upright = ImageOps.exif_transpose(image) or image
    mode = upright.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        grey = _to_eight_bits(np.asarray(upright), mode)
        return np.repeat(grey[..., None], wanted, axis=2)
    if mode == "P" or (mode in ("L", "RGB") and "transparency" in upright.info):
        upright = upright.convert("RGBA")  # resolves the palette's own transparency before it is dropped
    pixels: Pixels = np.array(upright.convert("L" if wanted == 1 else "RGB"), dtype=np.uint8)
    return pixels[..., None] if wanted == 1 else pixels


def _to_eight_bits(values: npt.NDArray[Any], mode: str) -> Pixels:
    if mode.startswith("I;16"):
        return (values.astype(np.uint16) >> 8).astype(np.uint8)
    if mode == "I":  # how some versions open 16-bit PNG files
        wide = values.max(initial=0) > 255
        low: Pixels = np.clip(values >> 8 if wide else values, 0, 255).astype(np.uint8)
        return low
    clean = np.nan_to_num(values.astype(np.float64))
    scale = 255.0 if clean.max(initial=0.0) <= 1.0 else 1.0
    scaled: Pixels = np.clip(np.rint(clean * scale), 0, 255).astype(np.uint8)
    return scaled


def _filter(name: str) -> Any:
    return getattr(pillow().Resampling, name.upper())


def resize(image: Pixels, height: int, width: int, interpolation: str) -> Pixels:
    """``image`` (H, W, Ch) uint8 at ``height x width`` by Pillow's antialiased filters, each image on its own (so that a result does not
    depend on the batch)."""
    if image.shape[:2] == (height, width):
        return image
    image_module, resample = pillow(), _filter(interpolation)
    if image.shape[2] == 3:
        resized = image_module.fromarray(np.ascontiguousarray(image)).resize((width, height), resample)
        return np.asarray(resized, dtype=np.uint8)
    planes = [
        np.asarray(image_module.fromarray(np.ascontiguousarray(image[..., c])).resize((width, height), resample), dtype=np.uint8)
        for c in range(image.shape[2])
    ]
    return np.stack(planes, axis=-1)


def fit(image: Pixels, height: int, width: int, shorter: int | None, interpolation: str) -> Pixels:
    """``image`` (H, W, Ch) at ``height x width``: stretched, or (``shorter``) its shorter side brought to that and the middle cut out."""
    if shorter is None:
        return resize(image, height, width, interpolation)
    h, w = image.shape[:2]
    # as torchvision: the longer side is cut to whole pixels
    height_, width_ = (shorter, int(shorter * w / h)) if h <= w else (int(shorter * h / w), shorter)
    image = resize(image, height_, width_, interpolation)
    h, w = image.shape[:2]
    if h < height or w < width:
        return resize(image, height, width, interpolation)
    top, left = round((h - height) / 2), round((w - width) / 2)
    return image[top : top + height, left : left + width]


def normalise(images: Pixels, wanted: ImagePreprocessing, kind: type[np.floating[Any]]) -> npt.NDArray[Any]:
    """``(x / 255 - mean) / std`` as ``(B, channels, H, W)``; one channel is repeated, three become luminance (ITU-R 601), as needed."""
    channels = images.shape[3]
    if channels == 3 and wanted.channels == 1:
        weights = np.array([19595, 38470, 7471], dtype=np.uint32)  # Pillow's, in 1/65536
        images = ((images.astype(np.uint32) @ weights + 32768) >> 16).astype(np.uint8)[..., None]
        channels = 1
    if channels not in (1, wanted.channels):
        raise UsageError(Problem("", f"the model takes images with {wanted.channels} channels, and the data has {channels}."))
    out = np.empty((len(images), wanted.channels, *images.shape[1:3]), dtype=kind)
    for channel in range(wanted.channels):
        mean, std = wanted.mean[channel], wanted.std[channel]
        plane = images[..., channel if channels > 1 else 0]
        np.multiply(plane, kind(1.0 / (255.0 * std)), out=out[:, channel], dtype=kind, casting="unsafe")
        out[:, channel] -= kind(mean / std)
    return out


def png(image: Pixels, size: int | None = None) -> bytes:
    """``image`` (H, W, 1, 3 or more; the first three are shown) uint8 as PNG, its longer side brought to ``size`` pixels."""
    image_module = pillow()
    shown = image[..., 0] if image.shape[2] in (1, 2) else image[..., :3]
    picture = image_module.fromarray(np.ascontiguousarray(shown))
    if size is not None:
        scale = size / max(picture.size)
        target = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(target, _filter("nearest" if scale > 1 else "bilinear"))
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return out.getvalue()
