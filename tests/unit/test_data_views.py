"""Views: pure functions of (data seed, id, view), judged by NumPy, Pillow and torchvision."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from limbeck.data import data_from_python
from limbeck.data.batches import BatchBuilder, Request
from limbeck.data.ids import array_ids
from limbeck.data.randaugment import OPERATIONS
from limbeck.data.sources import ArrayImages, ImageList
from limbeck.data.splits import Split
from limbeck.data.views import Partners, augmentation, beta, check_augment, image_views
from limbeck.errors import UsageError
from limbeck.recipe import Augment
from limbeck.types import ImagePreprocessing, TensorPreprocessing

ALL = Augment(crop=2, flip=True, randaugment=(2, 9.0), erase=0.5)
AUGMENTS = {
    "crop": Augment(crop=2),
    "flip": Augment(flip=True),
    "erase": Augment(erase=0.7),
    "randaugment": Augment(randaugment=(2, 9.0)),
    "resized_crop": Augment(resized_crop=(0.25, 1.0)),
    "mixup": Augment(mixup=0.4),
    "all": Augment(crop=2, flip=True, randaugment=(2, 9.0), erase=0.5, mixup=0.4),
}


def images(count: int = 12, size: int = 12, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (count, size, size, channels), dtype=np.uint8)


def split_of(pixels: np.ndarray, labels: np.ndarray | None = None) -> Split:
    labels = np.arange(len(pixels)) % 3 if labels is None else labels
    return Split("train", ArrayImages(pixels), np.arange(len(pixels)), array_ids(pixels), labels)


def builder(split: Split, augment: Augment | None, seed: int = 0) -> BatchBuilder:
    wanted = ImagePreprocessing(3, (0.0,) * 3, (1.0,) * 3)
    return BatchBuilder(split, student=wanted, augment=augment, data_seed=seed, num_classes=3)


def view_of(build: BatchBuilder, rows: list[int], view: int) -> tuple[np.ndarray, np.ndarray]:
    batch = build(Request(0, 0, view, np.array(rows)))
    return batch.student["image"].numpy(), batch.labels.numpy()


@pytest.mark.parametrize("name", AUGMENTS)
def test_a_view_is_the_same_alone_and_in_any_batch(name: str) -> None:
    build = builder(split_of(images()), AUGMENTS[name])
    together, labels = view_of(build, [3, 0, 7, 9, 5], 2)
    for place, row in enumerate([3, 0, 7, 9, 5]):
        alone, label = view_of(build, [row], 2)
        assert np.array_equal(alone[0], together[place])
        assert np.array_equal(label[0], labels[place])


@pytest.mark.parametrize("name", AUGMENTS)
def test_a_view_does_not_depend_on_where_the_sample_stands(name: str) -> None:
    pixels, turned = images(), images()[::-1].copy()
    labels = np.arange(12) % 3
    here, _ = view_of(builder(split_of(pixels, labels), AUGMENTS[name]), [4], 1)
    there, _ = view_of(builder(split_of(turned, labels[::-1].copy()), AUGMENTS[name]), [7], 1)
    assert np.array_equal(here, there)


@pytest.mark.parametrize("name", AUGMENTS)
def test_views_samples_and_seeds_differ(name: str) -> None:
    same = np.repeat(images(1), 1, axis=0)
    many = np.concatenate([same, images(40)[1:]])
    split = split_of(many)
    views = [view_of(builder(split, AUGMENTS[name]), [0], v)[0].tobytes() for v in range(12)]
    assert len(set(views)) > 1
    seeds = [view_of(builder(split, AUGMENTS[name], seed), [0], 0)[0].tobytes() for seed in range(12)]
    assert len(set(seeds)) > 1
    # equal pixels under different ids: the draws are of the id
    ids = array_ids(many)
    raw = np.repeat(same, 12, axis=0)
    if name != "mixup":
        drawn = image_views(raw, ids[:12], 0, AUGMENTS[name].model_copy(update={"mixup": 0.0}), 0)
        assert len({np.asarray(v).tobytes() for v in drawn}) > 1


def test_lists_and_arrays_of_the_same_images_give_the_same_views() -> None:
    pixels = images()
    ids = array_ids(pixels)
    as_array = image_views(pixels, ids, 5, ALL, 1)
    as_list = image_views(list(pixels), ids, 5, ALL, 1)
    assert all(np.array_equal(a, b) for a, b in zip(as_array, as_list, strict=True))


GOLDEN = {
    "crop": "dceb2e97f3cfbf3a",
    "flip": "04669e33ca204896",
    "erase": "6efb08002670be0d",
    "resized_crop": "f96ea860aa32c37f",
    "all": "18d846510c144aed",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_of_views_stay_what_they_were(name: str) -> None:
    """A teacher's answers are kept by (id, view): if views change their bytes, the answers are wrong and nobody notices."""
    augment = (AUGMENTS | {"all": Augment(resized_crop=(0.5, 1.0), flip=True, erase=0.5)})[name]
    digest = hashlib.sha256()
    for size, channels in ((12, 3), (9, 1)):
        pixels = np.random.default_rng(0).integers(1, 256, (40, size, size + 3, channels), dtype=np.uint8)
        for view in range(3):
            for image in image_views(pixels, array_ids(pixels), view, augment, 1):
                digest.update(f"{image.shape}".encode() + image.tobytes())
    assert digest.hexdigest()[:16] == GOLDEN[name]


def test_a_crop_is_a_window_of_the_zero_padded_image_and_every_window_occurs() -> None:
    pixels = images(2, 6)
    padded = np.pad(pixels[0], ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 6, x : x + 6].tobytes(): (y, x) for y in range(5) for x in range(5)}
    ids = array_ids(pixels)[:1]
    seen = {windows[image_views(pixels[:1], ids, v, Augment(crop=2), 0)[0].tobytes()] for v in range(300)}
    assert len(seen) == 25


def test_flips_are_mirrors_half_of_the_time() -> None:
    pixels = images(400, 4)
    out = np.asarray(image_views(pixels, array_ids(pixels), 0, Augment(flip=True), 0))
    mirrored = np.array([np.array_equal(a, b[:, ::-1]) for a, b in zip(out, pixels, strict=True)])
    kept = np.array([np.array_equal(a, b) for a, b in zip(out, pixels, strict=True)])
    assert (mirrored ^ kept).all()
    assert 0.4 < mirrored.mean() < 0.6


def test_erasing_blackens_one_box_of_2_to_33_percent() -> None:
    pixels = np.full((300, 20, 20, 3), 200, np.uint8) + np.arange(300, dtype=np.uint16)[:, None, None, None].astype(np.uint8) % 50
    ids = np.random.default_rng(1).integers(0, 2**63, (300, 2), dtype=np.uint64)
    out = np.asarray(image_views(pixels, ids, 0, Augment(erase=0.5), 0))
    black = (out == 0).all(axis=3)
    shares = black.mean(axis=(1, 2))
    assert 0.4 < (shares > 0).mean() < 0.6
    for mask in black[shares > 0]:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert 0.005 < mask.mean() < 0.40


def test_a_resized_crop_is_a_box_within_the_area_range() -> None:
    image = (np.arange(40 * 60) % 251).astype(np.uint8).reshape(40, 60, 1)
    ids = np.random.default_rng(2).integers(0, 2**63, (200, 2), dtype=np.uint64)
    shares = []
    for crop in image_views([image] * 200, ids, 0, Augment(resized_crop=(0.25, 0.5)), 0):
        assert crop.shape[0] <= 40
        assert crop.shape[1] <= 60
        shares.append(crop.shape[0] * crop.shape[1] / (40 * 60))
        assert 0.7 < crop.shape[1] / crop.shape[0] < 1.4
    assert 0.23 < min(shares) < 0.30
    assert 0.44 < max(shares) < 0.53


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n != "Identity"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_randaugment_operations_are_torchvisions(name: str, sign: float) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    from PIL import Image
    from torchvision.transforms import autoaugment

    smooth = np.add.outer(np.arange(32) * 4, np.arange(32) * 3)[..., None] + np.array([0, 20, 40])
    picture = Image.fromarray(smooth.astype(np.uint8))
    magnitudes, signed = transforms.RandAugment()._augmentation_space(31, (32, 32))[name]
    magnitude = float(magnitudes[12]) if magnitudes.ndim else 0.0
    wanted = autoaugment._apply_op(
        picture, name, magnitude * (sign if signed else 1.0), interpolation=transforms.InterpolationMode.NEAREST, fill=None
    )
    got = OPERATIONS[name](picture, 12 / 30, sign)
    mirrored = OPERATIONS[name](picture, 12 / 30, -sign)  # signs are random, so that which way is plus does not matter
    gaps = [np.abs(np.asarray(wanted).astype(int) - np.asarray(g).astype(int)).max(axis=2) for g in (got, mirrored)]
    assert min((gap > 8).mean() for gap in gaps) < 0.08  # nearest-neighbour edges may fall one pixel aside
    assert name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY") or min(gap.max() for gap in gaps) == 0


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 2.0, 8.0])
def test_mixups_shares_are_beta_distributed(alpha: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    ids = np.random.default_rng(3).integers(0, 2**63, (4000, 2), dtype=np.uint64)
    drawn = beta(ids, alpha, 0, "mixup", 1)
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert np.array_equal(drawn[7:9], beta(ids[7:9], alpha, 0, "mixup", 1))


def test_mixup_is_a_weighted_sum_of_two_samples_and_of_their_labels() -> None:
    pixels = images()
    labels = np.arange(12) % 3
    split = split_of(pixels, labels)
    out, mixed = view_of(builder(split, Augment(mixup=0.8)), list(range(12)), 3)
    partners = Partners(split, 0).of(np.arange(12), 3)
    share = beta(split.ids, 0.8, 0, "mixup", 3)
    x = pixels.transpose(0, 3, 1, 2) / 255.0
    wanted = share[:, None, None, None] * x + (1 - share)[:, None, None, None] * x[partners]
    np.testing.assert_allclose(out, wanted, atol=1e-6)
    one_hot = np.eye(3)[labels]
    np.testing.assert_allclose(mixed, share[:, None] * one_hot + (1 - share)[:, None] * one_hot[partners], atol=1e-6)


def test_mixups_partners_have_the_same_labelledness_change_with_the_view_and_survive_a_new_sample() -> None:
    pixels = images(400, 4)
    labels = np.where(np.arange(400) < 150, 1, -1)
    split = split_of(pixels, labels)
    partners = [Partners(split, 0).of(np.arange(400), v) for v in range(3)]
    assert all(((labels[p] >= 0) == (labels >= 0)).all() for p in partners)
    assert (partners[0] != partners[1]).mean() > 0.95
    counts = np.bincount(np.concatenate([Partners(split, 0).of(np.arange(400), v) for v in range(40)]), minlength=400)
    assert counts.max() < 40 * 4  # nobody is everybody's partner
    fewer = Partners(split.take(np.arange(399)), 0).of(np.arange(399), 0)
    assert (fewer != partners[0][:399]).mean() < 0.05
    batch = builder(split, Augment(mixup=1.0))(Request(0, 0, 0, np.array([0, 399])))
    assert batch.labels[1].sum() == 0
    assert batch.labels[0].sum() == pytest.approx(1)
    assert batch.labelled.tolist() == [True, False]


def test_images_of_several_sizes_keep_their_views() -> None:
    rng = np.random.default_rng(5)
    pictures = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((9, 12), (14, 7), (10, 10))]
    split = Split("train", ImageList(pictures), np.arange(3), array_ids(pictures), np.arange(3))
    wanted = ImagePreprocessing(3, (0.5,) * 3, (0.5,) * 3, height=8, width=8)
    for augment in (Augment(resized_crop=(0.3, 1.0), flip=True), ALL, None):
        build = BatchBuilder(split, student=wanted, augment=augment, num_classes=3)
        batch = build(Request(0, 0, 4, np.array([2, 0, 1])))
        assert batch.student["image"].shape == (3, 3, 8, 8)
        alone = build(Request(0, 0, 4, np.array([1])))
        assert np.array_equal(batch.student["image"][2].numpy(), alone.student["image"][0].numpy())


def test_what_has_no_effect_is_refused() -> None:
    with pytest.raises(UsageError) as e:
        check_augment(Augment(crop=2, mixup=0.2), "text")
    assert len(e.value.problems) == 2
    with pytest.raises(UsageError, match="exclude each other"):
        check_augment(Augment(crop=2, resized_crop=(0.2, 1.0)), "image")
    with pytest.raises(UsageError, match="kind tensor"):
        check_augment(Augment(flip=True), "tensor")
    check_augment(Augment(mixup=0.2), "tensor")
    with pytest.raises(UsageError, match="takes tensor inputs"):
        BatchBuilder(split_of(images()), student=TensorPreprocessing((3,)), num_classes=3)


def test_standard_means_what_suits_the_data() -> None:
    def standard(*shape: int) -> Augment | None:
        x = np.random.default_rng(0).integers(0, 256, (20, *shape), dtype=np.uint8)
        return augmentation("standard", data_from_python(task="image-classification", train=(x, np.arange(20) % 2)))

    assert standard(8, 8, 1) == Augment(crop=1)
    assert standard(32, 32, 3) == Augment(crop=4, flip=True)
    assert standard(64, 48, 3) == Augment(resized_crop=(0.25, 1.0), flip=True)
    texts = data_from_python(task="text-classification", train=([f"t{i}" for i in range(20)], np.arange(20) % 2))
    assert augmentation("standard", texts) is None
    assert augmentation("none", texts) is None
    assert augmentation(Augment(), texts) is None
    with pytest.raises(UsageError, match="kind text"):
        augmentation(Augment(flip=True), texts)
