"""Recipes of papers: the models have the published sizes, and every recipe can be read, built and learned from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml

from limbeck import _published_show as show
from limbeck.losses import Population
from limbeck.models import Capture, cifar
from limbeck.objective import Objective, needs_of
from limbeck.published import METHODS, PAIRS, is_published, names, published
from limbeck.reading import build_recipe
from limbeck.recipe import Term
from limbeck.types import Batch, Outputs, Signal

PARAMETERS = {  # with 100 classes, in the papers and repositories that use them
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet50": 23_705_252,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenet_v2": 812_836,
    "shufflenet_v1": 949_258,
    "shufflenet_v2": 1_355_528,
}
NAMED = {  # one parameter of each family as it is called in RepDistiller's checkpoints
    "resnet8x4": "layer3.0.downsample.1.weight",
    "resnet50": "layer4.2.conv3.weight",
    "wrn_16_2": "block2.layer.0.convShortcut.weight",
    "vgg8": "block4.1.running_var",
    "mobilenet_v2": "blocks.3.2.conv.7.bias",
    "shufflenet_v1": "layer2.7.bn3.weight",
    "shufflenet_v2": "layer1.0.conv5.weight",
}
CIFAR = [key for key, pair in PAIRS.items() if pair.title == "CIFAR-100"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_model_has_the_published_number_of_parameters(name: str) -> None:
    assert sum(p.numel() for p in getattr(cifar, name)(num_classes=100).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", NAMED)
def test_a_published_checkpoint_would_fit(name: str) -> None:
    assert NAMED[name] in getattr(cifar, name)().state_dict()


@pytest.mark.parametrize("name", cifar.__all__)
def test_every_model_learns_two_steps(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(cifar, name)(num_classes=3)
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for key, value in model.named_parameters():
        assert value.grad is not None, key
        assert value.grad.isfinite().all(), key
        assert value.ndim == 1 or not torch.equal(value, before[key]), key
    assert model.eval()(images).isfinite().all()


def test_a_wide_residual_block_is_the_published_one() -> None:
    """Zagoruyko and Komodakis, figure 1 and their code: where the shape changes, the short way too begins behind norm and ReLU."""
    torch.manual_seed(0)
    block = cifar.wrn_16_2().block2.layer[0].eval()  # type: ignore[union-attr, operator]
    x = torch.randn(2, 32, 8, 8)
    first = torch.relu(block.bn1(x))
    expected = block.convShortcut(first) + block.conv2(torch.relu(block.bn2(block.conv1(first))))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("name", names())
def test_every_recipe_can_be_read_from_its_file(name: str) -> None:
    text = show.text(name)
    assert yaml.safe_load(text) == published(name)
    assert max(map(len, text.splitlines())) <= 200
    recipe = build_recipe(published(name), command="distill")
    assert recipe.train.precision == "float32"
    assert is_published(name)


def test_every_method_is_of_a_pair() -> None:
    assert {name.partition("/")[2] for name in names()} == set(METHODS)


@pytest.mark.parametrize("key", CIFAR)
def test_every_method_of_a_pair_reaches_the_student(key: str) -> None:
    """Layers are there, shapes can be compared, and the gradient is finite and not zero."""
    torch.manual_seed(0)
    pair = PAIRS[key]
    teacher, student = (getattr(cifar, name.removeprefix("cifar:"))(num_classes=100) for name in pair.models)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    teacher.eval()
    for method in pair.methods:
        terms = [Term.model_validate(t) for t in build_recipe(published(f"{key}/{method}"), command="distill").model_dump()["objective"]]
        ours, theirs = needs_of(terms)
        with torch.no_grad(), Capture(teacher, theirs.features) as seen:
            signal = Signal(teacher(images), dict(seen.features))
        with Capture(student, ours.features) as capture:
            outputs = Outputs(student(images), capture.features)
            shapes = [{path: tuple(x.shape) for path, x in each.items()} for each in (capture.features, signal.features)]
            classes = [str(i) for i in range(100)]
            batch = _batch(images, labels)
            objective = Objective.build(
                terms,
                classes=classes,
                label_counts=[1] * 100,
                shapes_student=shapes[0],
                shapes_teacher=shapes[1],
                population=Population(batch.ids, labels.numpy()),
            )
            loss, _ = objective(outputs, signal, batch, progress=0.5, counts=objective.counts(batch))
        student.zero_grad()
        loss.backward()
        assert loss.isfinite(), method
        first = next(student.parameters()).grad
        assert first is not None, method
        assert first.isfinite().all(), method
        assert first.abs().sum() > 0, method


def _batch(images: torch.Tensor, labels: torch.Tensor) -> Batch:
    count = len(images)
    ids = np.arange(2 * count, dtype=np.uint64).reshape(count, 2)
    return Batch(ids, 0, {"x": images}, None, labels, torch.ones(count, dtype=torch.bool))
