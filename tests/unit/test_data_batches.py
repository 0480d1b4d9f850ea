"""Plans, batches, tokens and streams."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.data import BatchBuilder, Plan, Request, Split, choose_workers, evaluation_requests, stream, token_lengths
from limbeck.data.ids import array_ids, text_ids
from limbeck.data.sources import ArrayImages, FileImages, ImageList, Joined, Tensors, Texts
from limbeck.errors import LimbeckError, UsageError
from limbeck.randomness import order
from limbeck.recipe import Augment
from limbeck.types import Batch, ImagePreprocessing, TensorPreprocessing, TextPreprocessing


def images(count: int = 30, size: tuple[int, int] = (6, 5), channels: int = 3) -> Split:
    x = np.random.default_rng(0).integers(0, 256, (count, *size, channels), dtype=np.uint8)
    return Split("train", ArrayImages(x), np.arange(count), array_ids(x), np.arange(count) % 3)


def whole(split: Split) -> Request:
    return Request(0, 0, 0, np.arange(len(split)))


PLAIN = ImagePreprocessing(3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def test_further_views_are_draws_of_their_own_and_change_nothing_else() -> None:
    """Of the same samples, in the same mixture: a function of (data seed, id, view, its number)."""
    split = images(40, (8, 8))
    how: dict[str, Any] = {"student": PLAIN, "augment": Augment(crop=2, flip=True, mixup=0.4), "num_classes": 3}
    alone, build = BatchBuilder(split, **how), BatchBuilder(split, **how, others=2)
    request = Request(5, 1, 1, np.arange(40)[::-1].copy())
    batch, before = build(request), alone(request)
    assert before.others == ()
    assert torch.equal(batch.student["image"], before.student["image"])
    assert torch.equal(batch.labels, before.labels)
    pictures = [inputs["image"] for inputs in (batch.student, *batch.others)]
    assert len(pictures) == 3
    for i in range(3):
        for j in range(i):
            same = (pictures[i] == pictures[j]).flatten(1).all(1)
            assert same.float().mean() < 0.2, (i, j)
    # each alone as in any batch
    few = build(Request(9, 1, 1, np.array([7, 3])))
    for inputs, picture in zip(few.others, pictures[1:], strict=True):
        assert torch.equal(inputs["image"][0], picture[39 - 7])
    assert not torch.equal(build(Request(5, 1, 2, request.rows)).others[0]["image"], pictures[1])
    for same in (None, Augment(mixup=0.4)):  # where nothing is drawn for a view, all are the student's
        assert BatchBuilder(split, student=PLAIN, augment=same, num_classes=3, others=2)(request).others == ()


def test_further_views_read_no_sample_again(monkeypatch: pytest.MonkeyPatch) -> None:
    split, read = images(10), []
    real = ArrayImages.read
    monkeypatch.setattr(ArrayImages, "read", lambda self, rows: read.append(len(rows)) or real(self, rows))
    augment = Augment(flip=True, mixup=0.3)
    BatchBuilder(split, student=PLAIN, augment=augment, num_classes=3, others=3)(whole(split))
    assert read == [10, 10]  # and those that they are mixed with


def test_further_views_go_where_the_batch_goes() -> None:
    split = images(10)
    batch = BatchBuilder(split, student=PLAIN, augment=Augment(flip=True), num_classes=3, others=1)(whole(split))
    part = batch.part(3, 6)
    assert torch.equal(part.others[0]["image"], batch.others[0]["image"][3:6])
    assert part.to(torch.device("cpu"), torch.float64).others[0]["image"].dtype == torch.float64


# ---- plans


@pytest.mark.parametrize("lengths", [None, np.random.default_rng(1).integers(1, 90, 1003)])
def test_an_epoch_visits_every_sample_once(lengths: np.ndarray | None) -> None:
    split = images(1003)
    plan = Plan(split, seed=5, data_seed=0, epochs=3, batch_size=8, lengths=lengths)
    assert (plan.steps_per_epoch, plan.total_steps) == (126, 378)
    epochs = [[plan.request(s) for s in range(e * 126, (e + 1) * 126)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert sorted(np.concatenate([r.rows for r in epoch]).tolist()) == list(range(1003))
        assert sorted(len(r.rows) for r in epoch) == [3] + [8] * 125
        assert {r.epoch for r in epoch} == {number} == {r.view for r in epoch}
    assert [r.rows.tolist() for r in epochs[0]] != [r.rows.tolist() for r in epochs[1]]
    fresh = Plan(split, seed=5, data_seed=0, epochs=3, batch_size=8, lengths=lengths)
    assert np.array_equal(fresh.request(300).rows, plan.request(300).rows)  # any step can be the first
    other = Plan(split, seed=6, data_seed=0, epochs=3, batch_size=8, lengths=lengths)
    assert not np.array_equal(other.request(0).rows, plan.request(0).rows)
    if lengths is not None:
        spread = np.mean([np.ptp(lengths[r.rows]) for r in epochs[0]])
        assert spread < 0.25 * 60  # at random it would be about 70
        assert np.corrcoef(np.arange(126), [lengths[r.rows].mean() for r in epochs[0]])[0, 1] < 0.5


def test_views_repeat_and_single_samples_are_dropped() -> None:
    split = images(33)
    plan = Plan(split, seed=0, data_seed=0, epochs=5, batch_size=8, views=2, drop_single=True)
    assert plan.steps_per_epoch == 4
    assert [plan.request(s * 4).view for s in range(5)] == [0, 1, 0, 1, 0]
    assert all(len(plan.request(s).rows) == 8 for s in range(20))
    assert Plan(split, seed=0, data_seed=0, epochs=1, batch_size=8).steps_per_epoch == 5
    assert Plan(images(1), seed=0, data_seed=0, epochs=1, batch_size=8, drop_single=True).steps_per_epoch == 1
    assert Plan(split, seed=0, data_seed=0, epochs=2, batch_size=1, drop_single=True).total_steps == 66
    assert Plan(split, seed=0, data_seed=0, epochs=9, batch_size=8, total_steps=7).total_steps == 7
    with pytest.raises(IndexError):
        plan.request(20)


@pytest.mark.parametrize("count", [1, 5, 20, 64, 1003])
@pytest.mark.parametrize("bucketed", [False, True])
def test_a_number_of_steps_is_of_whole_batches_over_the_epochs_ends(count: int, bucketed: bool) -> None:
    """What a baseline with fewer rows reads: every step as large as the student's, every epoch once before the next."""
    split, steps = images(count), 400
    lengths = np.random.default_rng(1).integers(1, 90, count) if bucketed else None
    arguments: dict[str, Any] = {"seed": 5, "data_seed": 0, "batch_size": 8, "lengths": lengths, "views": 3, "drop_single": True}
    plan = Plan(split, epochs=steps, total_steps=steps, **arguments)
    assert plan.total_steps == steps
    requests = [plan.request(s) for s in range(steps)]
    assert {len(r.rows) for r in requests} == {8}
    assert [r.epoch for r in requests] == [s * 8 // count for s in range(steps)]
    assert [r.view for r in requests] == [r.epoch % 3 for r in requests]
    read = np.concatenate([r.rows for r in requests])
    times = np.bincount(read, minlength=count)
    assert times.max() - times.min() <= (1 if lengths is None else 2)
    if lengths is None:
        for epoch in range(len(read) // count):
            assert sorted(read[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
            assert read[epoch * count : (epoch + 1) * count].tolist() == order(count, 5, "order", epoch).tolist()
    elif count == 1003:
        assert np.mean([np.ptp(lengths[r.rows]) for r in requests]) < 0.25 * 60  # at random it would be about 70
    if count >= 20:
        assert max(np.bincount(r.rows).max() for r in requests) <= 2
    for step in (0, 1, 17, 250, steps - 1):  # any step can be the first
        fresh = Plan(split, epochs=steps, total_steps=steps, **arguments).request(step)
        assert np.array_equal(fresh.rows, requests[step].rows)
    with pytest.raises(IndexError):
        plan.request(steps)


def test_evaluation_requests_cover_a_split() -> None:
    split = images(10)
    assert [r.rows.tolist() for r in evaluation_requests(split, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    lengths = np.array([3, 9, 1, 9, 5, 2, 8, 7, 6, 4])
    assert np.concatenate([r.rows for r in evaluation_requests(split, 4, lengths)]).tolist() == [1, 3, 6, 7, 8, 4, 9, 0, 5, 2]


# ---- images


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_images_are_normalised_as_published(dtype: torch.dtype, tolerance: float) -> None:
    split = images()
    batch = BatchBuilder(split, student=PLAIN, teacher=PLAIN, num_classes=3, dtype=dtype)(whole(split))
    x = np.asarray(split.read(np.arange(30))) / 255.0
    wanted = ((x - np.array(PLAIN.mean)) / np.array(PLAIN.std)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(batch.student["image"].numpy(), wanted, atol=tolerance, rtol=0)
    assert batch.student["image"].dtype == dtype
    assert batch.teacher is batch.student
    assert batch.labels.tolist() == split.labels.tolist()
    assert batch.mask.all()
    assert np.array_equal(batch.ids, split.ids)


def test_each_model_gets_the_same_view_in_its_own_way() -> None:
    split = images(6, (12, 12))
    teacher = ImagePreprocessing(3, (0.0,) * 3, (1.0,) * 3, height=24, width=24, interpolation="nearest")
    batch = BatchBuilder(
        split, student=ImagePreprocessing(3, (0.0,) * 3, (1.0,) * 3), teacher=teacher, augment=Augment(crop=2, flip=True), num_classes=3
    )(Request(0, 0, 3, np.arange(6)))
    assert batch.teacher is not None
    assert batch.teacher["image"].shape == (6, 3, 24, 24)
    assert torch.equal(batch.teacher["image"][:, :, ::2, ::2], batch.student["image"])


@pytest.mark.parametrize(("size", "shorter"), [((30, 50), 20), ((50, 30), 20), ((30, 50), None), ((9, 9), 16)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_is_torchvisions(size: tuple[int, int], shorter: int | None, interpolation: str) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    from PIL import Image

    split = images(3, size)
    wanted = ImagePreprocessing(3, PLAIN.mean, PLAIN.std, height=16, width=16, resize_shorter=shorter, interpolation=interpolation)
    got = BatchBuilder(split, student=wanted, num_classes=3)(whole(split)).student["image"]
    mode = transforms.InterpolationMode(interpolation)
    steps = [transforms.Resize(shorter, mode), transforms.CenterCrop(16)] if shorter else [transforms.Resize((16, 16), mode)]
    pipeline = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(PLAIN.mean, PLAIN.std)])
    raw = np.asarray(split.read(np.arange(3)))
    torch.testing.assert_close(got, torch.stack([pipeline(Image.fromarray(x)) for x in raw]), atol=2e-6, rtol=0)


def test_a_random_box_is_resized_whole() -> None:
    split = images(5, (40, 60))
    augment = Augment(resized_crop=(0.3, 0.6))
    sized = {s: ImagePreprocessing(3, (0.0,) * 3, (1.0,) * 3, height=16, width=16, resize_shorter=s) for s in (None, 18)}
    first, second = (BatchBuilder(split, student=p, augment=augment, num_classes=3)(whole(split)).student["image"] for p in sized.values())
    assert torch.equal(first, second)


def test_channels_are_repeated_or_made_grey_as_pillow_does() -> None:
    from PIL import Image

    unit = ImagePreprocessing(3, (0.0,) * 3, (1.0,) * 3)
    grey = images(4, channels=1)
    got = BatchBuilder(grey, student=unit, num_classes=3)(whole(grey)).student["image"]
    assert got.shape == (4, 3, 6, 5)
    assert torch.equal(got[:, 0], got[:, 2])
    colour = images(4)
    got = BatchBuilder(colour, student=ImagePreprocessing(1, (0.0,), (1.0,)), num_classes=3)(whole(colour)).student["image"]
    wanted = [np.asarray(Image.fromarray(x).convert("L")) for x in np.asarray(colour.read(np.arange(4)))]
    np.testing.assert_allclose(got[:, 0].numpy() * 255, np.stack(wanted), atol=1e-3)
    with pytest.raises(UsageError, match="4 channels, and the data has 3"):
        BatchBuilder(colour, student=ImagePreprocessing(4, (0.0,) * 4, (1.0,) * 4), num_classes=3)(whole(colour))


def test_several_sizes_need_a_resolution() -> None:
    x = [np.zeros((4 + i, 5, 3), np.uint8) for i in range(3)]
    split = Split("train", ImageList(x), np.arange(3), array_ids(x), np.arange(3))
    with pytest.raises(LimbeckError, match=r"options\.resolution"):
        BatchBuilder(split, student=PLAIN, num_classes=3)(whole(split))


def test_float_arrays_are_taken_as_they_are_and_joined_sources_keep_their_rows() -> None:
    x = np.random.default_rng(0).normal(size=(9, 4))
    split = Split(
        "train", Joined((Tensors(x[:5]), Tensors(x[5:]))), np.arange(9)[::-1].copy(), array_ids(x)[::-1].copy(), np.zeros(9, np.int64)
    )
    batch = BatchBuilder(split, student=TensorPreprocessing((4,)), teacher=TensorPreprocessing((4,)), num_classes=2)(
        Request(0, 0, 0, np.array([8, 0, 4, 3]))
    )
    assert np.array_equal(batch.student["x"].numpy(), x[[0, 8, 4, 5]])
    assert batch.student["x"].dtype == torch.float64


# ---- text

WORDS = ["the", "cat", "sat", "on", "mat", "a", "dog", "ran"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose own file pads to 24 and cuts at 6, as the packaged MiniLM does."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.enable_padding(length=24)
    backend.enable_truncation(6)
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    return folder


def texts(pairs: bool = False, count: int = 20) -> Split:
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, int(rng.integers(0, 15)))) for _ in range(count)]
    second = [" ".join(rng.choice(WORDS, 3)) for _ in range(count)] if pairs else None
    return Split("train", Texts(lines, second), np.arange(count), text_ids(lines, second), np.arange(count) % 2)


@pytest.mark.parametrize("pairs", [False, True])
def test_tokens_are_the_tokenizers_without_its_own_padding_and_cutting(tokenizer: Path, pairs: bool) -> None:
    split = texts(pairs)
    wanted = TextPreprocessing(str(tokenizer), 10, ("input_ids", "attention_mask", "token_type_ids"), f"x{pairs}")
    batch = BatchBuilder(split, student=wanted, teacher=wanted, num_classes=2)(Request(0, 0, 0, np.array([5, 2, 9])))
    index = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    for place, row in enumerate([5, 2, 9]):
        text, pair = split.read([row])[0]
        first, second = [index[w] for w in text.split()], [index[w] for w in (pair or "").split()]
        while len(first) + len(second) + (3 if pairs else 2) > 10:
            (first if len(first) >= len(second) else second).pop()
        ids = [2, *first, 3] + ([*second, 3] if pairs else [])
        n = len(ids)
        assert batch.student["input_ids"][place, :n].tolist() == ids
        assert batch.student["input_ids"][place, n:].sum() == 0
        assert batch.student["attention_mask"][place].tolist() == [1] * n + [0] * (batch.student["input_ids"].shape[1] - n)
        assert batch.student["token_type_ids"][place, :n].tolist() == [0] * (len(first) + 2) + [1] * (n - len(first) - 2)
        assert token_lengths(split, wanted)[row] == n
    assert batch.student["input_ids"].shape[1] == max(token_lengths(split, wanted)[[5, 2, 9]])
    assert batch.teacher is batch.student


def test_teacher_and_student_have_their_own_tokens_and_each_source_is_tokenised_once(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from limbeck.data import text as text_module

    split = texts()
    student = TextPreprocessing(str(tokenizer), 6, ("input_ids", "attention_mask"), "s")
    teacher = TextPreprocessing(str(tokenizer), 12, ("input_ids", "attention_mask"), "s")
    calls: list[int] = []
    original = text_module._tokenise
    monkeypatch.setattr(text_module, "_tokenise", lambda *a: (calls.append(1), original(*a))[1])
    part = split.take(np.arange(20)[::-2].copy())
    token_lengths(split, student)
    build = BatchBuilder(part, student=student, teacher=teacher, num_classes=2)
    batch = build(Request(0, 0, 0, np.arange(10)))
    assert len(calls) == 2
    assert batch.teacher is not None
    assert (batch.student["input_ids"].shape[1], batch.teacher["input_ids"].shape[1]) == (6, 12)
    again = pickle.loads(pickle.dumps(build))(Request(0, 0, 0, np.arange(10)))
    assert torch.equal(again.student["input_ids"], batch.student["input_ids"])
    assert torch.equal(again.teacher["input_ids"], batch.teacher["input_ids"])
    joined = Split("train", Joined((split.source, Texts(["a dog ran"]))), np.array([20, 3]), split.ids[:2], split.labels[:2])
    assert token_lengths(joined, student).tolist() == [5, int(token_lengths(split, student)[3])]


# ---- streams


def content(batches: Iterator[tuple[Request, Batch]]) -> list[tuple[int, bytes, bytes]]:
    return [(r.step, b.student["image"].numpy().tobytes(), b.ids.tobytes()) for r, b in batches]


def test_workers_change_nothing() -> None:
    split = images(40, (8, 8))
    plan = Plan(split, seed=0, data_seed=0, epochs=2, batch_size=8)
    build = BatchBuilder(split, student=PLAIN, augment=Augment(crop=2, flip=True, erase=0.3, mixup=0.3), num_classes=3)
    requests = [plan.request(s) for s in range(10)]
    direct = [(r.step, b.student["image"].numpy().tobytes(), b.ids.tobytes()) for r, b in ((r, build(r)) for r in requests)]
    assert content(stream(build, iter(requests), workers=0)) == direct
    assert content(stream(build, iter(requests), workers=2)) == direct


class Timed:
    """Builds in about so many seconds, and fails at step 5 if asked to."""

    def __init__(self, seconds: float, error: Exception | None = None) -> None:
        self.seconds, self.error = seconds, error
        self.build = BatchBuilder(images(), student=PLAIN, num_classes=3)

    def __call__(self, request: Request) -> Batch:
        if request.step == 5 and self.error is not None:
            raise self.error
        if self.seconds:
            time.sleep(self.seconds)
        return self.build(request)


def in_the_background() -> bool:
    return any(t.name == "limbeck-batches" for t in threading.enumerate())


@pytest.mark.parametrize("seconds", [0.0, 0.005])
def test_batches_are_the_same_with_and_without_a_thread(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.data.loader._QUICK", 1e-3 if seconds else 1e9)
    requests = [Request(s, 0, 0, np.arange(s % 3, 5)) for s in range(12)]
    batches = stream(Timed(seconds), iter(requests), workers=0)
    found = [next(batches) for _ in range(6)]
    assert in_the_background() == bool(seconds), "what is made at once needs no thread"
    found += list(batches)
    assert content(iter(found)) == [
        (r.step, b.student["image"].numpy().tobytes(), b.ids.tobytes()) for r, b in zip(requests, map(Timed(0.0), requests), strict=True)
    ]
    assert not in_the_background()


@pytest.mark.parametrize("seconds", [0.0, 0.005])
def test_errors_and_early_ends_stop_the_thread(seconds: float) -> None:
    requests = [Request(s, 0, 0, np.arange(2)) for s in range(50)]
    for error in (LimbeckError("cat.png changed"), ZeroDivisionError("a bug")):
        seen: list[int] = []
        with pytest.raises(type(error)) as e:
            seen.extend(request.step for request, _ in stream(Timed(seconds, error), requests, workers=0))
        assert e.value is error
        assert seen == [0, 1, 2, 3, 4]
    batches = stream(Timed(seconds), iter(requests), workers=0)
    for _ in range(5):
        next(batches)
    batches.close()
    assert not in_the_background()


def test_a_missing_file_in_a_worker_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.data.loader.shared_memory", lambda: None)  # a batch that is measured would be made here first
    ids = np.zeros((4, 2), np.uint64)
    split = Split("train", FileImages(tmp_path, [f"{i}.png" for i in range(4)], ids, 3), np.arange(4), ids, np.zeros(4, np.int64))
    build = BatchBuilder(split, student=PLAIN, num_classes=3)
    with pytest.raises(LimbeckError, match=r"0\.png could not be read") as e:
        list(stream(build, evaluation_requests(split, 2), workers=1))
    assert "Traceback" not in str(e.value)


SIGNALLED = """
import os, signal, sys, time
import numpy as np
from limbeck.data import BatchBuilder, Request, Split, stream
from limbeck.data.sources import Tensors
from limbeck.types import TensorPreprocessing

class Slow(BatchBuilder):
    def __call__(self, request):
        time.sleep({sleep})
        return super().__call__(request)

if __name__ == "__main__":
    told = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    split = Split("train", Tensors(np.zeros((40, 2))), np.arange(40), np.zeros((40, 2), np.uint64), np.zeros(40, int))
    build = Slow(split, student=TensorPreprocessing((2,)), num_classes=2)
    batches = stream(build, (Request(s, 0, 0, np.arange(2)) for s in range(12)), workers=2)
    seen = []
    for request, _ in batches:
        if request.step == 2:
            os.killpg(0, signal.SIGTERM)
        seen.append(request.step)
        if request.step == {last}:
            break
    batches.close()
    print(told == [signal.SIGTERM], seen == list(range({last} + 1)), flush=True)
"""


@pytest.mark.parametrize(("sleep", "last"), [(0.2, 11), (0.6, 5)])
def test_a_sigterm_to_the_whole_group_is_the_main_processs_to_handle(tmp_path: Path, sleep: float, last: int) -> None:
    """docker stop, systemd and schedulers tell every process; the batches under way still come, and the workers end with the stream."""
    script = tmp_path / "script.py"
    script.write_text(SIGNALLED.format(sleep=sleep, last=last))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, start_new_session=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]
    assert "Traceback" not in done.stderr


def stuck(request: Request) -> Any:
    time.sleep(0.0 if request.step == 0 else 600.0)
    return Batch(np.zeros((2, 2), np.uint64), 0, {}, None, torch.zeros(2), torch.ones(2, dtype=torch.bool))


def test_a_worker_that_hangs_is_ended_with_the_stream() -> None:
    batches = stream(stuck, (Request(s, 0, 0, np.arange(2)) for s in range(3)), workers=1)
    next(batches)
    before = {p.pid for p in multiprocessing.active_children()}
    assert before
    batches.close()
    assert not [p for p in multiprocessing.active_children() if p.pid in before]


def test_workers_are_chosen_with_a_reason(tmp_path: Path) -> None:
    ids = np.zeros((300, 2), np.uint64)
    files = Split("train", FileImages(tmp_path, ["x"] * 300, ids, 3), np.arange(300), ids, np.zeros(300, np.int64))
    count, reason = choose_workers("auto", images(), None)
    assert count == 0
    assert "in memory" in reason
    count, reason = choose_workers("auto", files, None)
    assert 0 <= count <= 8
    assert reason
    assert choose_workers(3, files, None)[0] == 3


def test_scripts_that_workers_would_run_again_are_refused(tmp_path: Path) -> None:
    code = (
        "import numpy as np\nfrom limbeck.data import choose_workers, Split\nfrom limbeck.data.sources import Tensors\n"
        "s = Split('t', Tensors(np.zeros((2, 2))), np.arange(2), np.zeros((2, 2), np.uint64), np.zeros(2, int))\n"
        "try:\n    print(choose_workers(2, s, None))\nexcept Exception as e:\n    print(type(e).__name__, e)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    assert "UsageError" in subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
