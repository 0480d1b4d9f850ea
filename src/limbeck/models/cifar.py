"""The networks for 32 x 32 images that papers on distillation compare on CIFAR-100, and torchvision does not have.

Shapes, initial weights and names of parameters are those of RepDistiller (Tian et al. 2020, arXiv 1910.10699), which later papers took over, so
that its published checkpoints load after ``limbeck convert``. Every function takes ``num_classes`` and returns a module that reads (B, 3, H, W)
and answers (B, num_classes). This file needs torch alone: a copy of it lies beside each student that was built from it.

- ``resnet20`` ... ``resnet110``: He et al. 2016, arXiv 1512.03385, section 4.2, with projections. ``resnet8x4``, ``resnet32x4``: twice the channels
  at the stem and four times those of the stages.
- ``wrn_16_1`` ... ``wrn_40_2``: Zagoruyko and Komodakis 2016, arXiv 1605.07146, without dropout.
- ``vgg8`` ... ``vgg19``: Simonyan and Zisserman 2015, arXiv 1409.1556, with batch normalisation, three poolings and one linear layer.
- ``resnet18``, ``resnet34``, ``resnet50``: the ImageNet networks with a 3 x 3 stem and no pooling behind it.
- ``mobilenet_v2``: Sandler et al. 2018, arXiv 1801.04381, half as wide. ``shufflenet_v1``: Zhang et al. 2018, arXiv 1707.01083, 3 groups.
  ``shufflenet_v2``: Ma et al. 2018, arXiv 1807.11164, 1x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "mobilenet_v2",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet110",
    "shufflenet_v1",
    "shufflenet_v2",
    "vgg8",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=bias)


def _initialise(model: nn.Module, *, linear: float | None = None) -> None:
    """Convolutions as He et al. 2015 (by the outputs); linear: the deviation of the last layer's weights, its bias then 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear is not None:
            nn.init.normal_(module.weight, 0.0, linear)
            nn.init.zeros_(module.bias)


# -- residual networks ----------------------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    """Two 3 x 3 convolutions, or with ``narrow`` 1 x 1, 3 x 3, 1 x 1; ``way``: what the module on the short way is called."""

    def __init__(self, inputs: int, outputs: int, stride: int, narrow: int | None, way: str) -> None:
        super().__init__()
        if narrow is None:
            shapes = [(inputs, outputs, 3, stride), (outputs, outputs, 3, 1)]
        else:
            shapes = [(inputs, narrow, 1, 1), (narrow, narrow, 3, stride), (narrow, outputs, 1, 1)]
        self._count = len(shapes)
        for i, shape in enumerate(shapes, 1):
            self.add_module(f"conv{i}", _conv(*shape))
            self.add_module(f"bn{i}", nn.BatchNorm2d(shape[1]))
        short = nn.Sequential()
        if stride != 1 or inputs != outputs:
            short = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self._way = way
        self.add_module(way, short)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self._count + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            if i < self._count:
                out = F.relu(out)
        return F.relu(out + getattr(self, self._way)(x))


class _ResNet(nn.Module):
    """``layer1`` ... and ``avgpool`` are what losses of layers compare. last: what the linear layer is called."""

    def __init__(
        self, stem: int, widths: Sequence[int], depths: Sequence[int], *, expansion: int, way: str, last: str, num_classes: int
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, stem, 3), nn.BatchNorm2d(stem)
        inputs = stem
        self._stages = [f"layer{i}" for i in range(1, len(widths) + 1)]
        for i, (name, width, depth) in enumerate(zip(self._stages, widths, depths, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i and not j else 1
                blocks.append(_Residual(inputs, width * expansion, stride, width if expansion > 1 else None, way))
                inputs = width * expansion
            self.add_module(name, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self._last = last
        self.add_module(last, nn.Linear(inputs, num_classes))
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self._stages:
            x = getattr(self, name)(x)
        out: Tensor = getattr(self, self._last)(self.avgpool(x).flatten(1))
        return out


def _small_resnet(depth: int, stem: int, widths: Sequence[int], num_classes: int) -> nn.Module:
    return _ResNet(stem, widths, [(depth - 2) // 6] * 3, expansion=1, way="downsample", last="fc", num_classes=num_classes)


def resnet8(num_classes: int = 100) -> nn.Module:
    return _small_resnet(8, 16, (16, 32, 64), num_classes)


def resnet14(num_classes: int = 100) -> nn.Module:
    return _small_resnet(14, 16, (16, 32, 64), num_classes)


def resnet20(num_classes: int = 100) -> nn.Module:
    return _small_resnet(20, 16, (16, 32, 64), num_classes)


def resnet32(num_classes: int = 100) -> nn.Module:
    return _small_resnet(32, 16, (16, 32, 64), num_classes)


def resnet44(num_classes: int = 100) -> nn.Module:
    return _small_resnet(44, 16, (16, 32, 64), num_classes)


def resnet56(num_classes: int = 100) -> nn.Module:
    return _small_resnet(56, 16, (16, 32, 64), num_classes)


def resnet110(num_classes: int = 100) -> nn.Module:
    return _small_resnet(110, 16, (16, 32, 64), num_classes)


def resnet8x4(num_classes: int = 100) -> nn.Module:
    return _small_resnet(8, 32, (64, 128, 256), num_classes)


def resnet32x4(num_classes: int = 100) -> nn.Module:
    return _small_resnet(32, 32, (64, 128, 256), num_classes)


def _large_resnet(depths: Sequence[int], expansion: int, num_classes: int) -> nn.Module:
    return _ResNet(64, (64, 128, 256, 512), depths, expansion=expansion, way="shortcut", last="linear", num_classes=num_classes)


def resnet18(num_classes: int = 100) -> nn.Module:
    return _large_resnet((2, 2, 2, 2), 1, num_classes)


def resnet34(num_classes: int = 100) -> nn.Module:
    return _large_resnet((3, 4, 6, 3), 1, num_classes)


def resnet50(num_classes: int = 100) -> nn.Module:
    return _large_resnet((3, 4, 6, 3), 4, num_classes)


# -- wide residual networks -----------------------------------------------------------------------------------------------------


class _WideBlock(nn.Module):
    """Normalised first. Where the shape changes, the short way too begins behind the first ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs, 3)
        self.convShortcut = _conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        short = x if self.convShortcut is None else self.convShortcut(out)
        found: Tensor = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return short + found


class _WideResNet(nn.Module):
    """``block1`` to ``block3`` (before a ReLU) and ``avgpool`` are what losses of layers compare."""

    def __init__(self, depth: int, factor: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = _conv(3, 16, 3)
        inputs = 16
        for i, width in enumerate((16 * factor, 32 * factor, 64 * factor)):
            blocks = []
            for j in range((depth - 4) // 6):
                blocks.append(_WideBlock(inputs, width, 2 if i and not j else 1))
                inputs = width
            stage = nn.Sequential()
            stage.add_module("layer", nn.Sequential(*blocks))
            self.add_module(f"block{i + 1}", stage)
        self.bn1, self.avgpool = nn.BatchNorm2d(inputs), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        _initialise(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for name in ("block1", "block2", "block3"):
            x = getattr(self, name)(x)
        out: Tensor = self.fc(self.avgpool(F.relu(self.bn1(x))).flatten(1))
        return out


def wrn_16_1(num_classes: int = 100) -> nn.Module:
    return _WideResNet(16, 1, num_classes)


def wrn_16_2(num_classes: int = 100) -> nn.Module:
    return _WideResNet(16, 2, num_classes)


def wrn_40_1(num_classes: int = 100) -> nn.Module:
    return _WideResNet(40, 1, num_classes)


def wrn_40_2(num_classes: int = 100) -> nn.Module:
    return _WideResNet(40, 2, num_classes)


# -- VGG ------------------------------------------------------------------------------------------------------------------------


class _VGG(nn.Module):
    """``relu1`` to ``relu4`` and ``pool4`` are what losses of layers compare. A pooling before the last stage comes with images of 64 pixels."""

    def __init__(self, depths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        inputs = 3
        for i, (width, depth) in enumerate(zip((64, 128, 256, 512, 512), depths, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [_conv(inputs, width, 3, bias=True), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            self.add_module(f"block{i}", nn.Sequential(*layers[:-1]))
            self.add_module(f"relu{i}", nn.ReLU())
            self.add_module(f"pool{i}", nn.MaxPool2d(2) if i < 4 else nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(512, num_classes)
        _initialise(self, linear=0.01)

    def forward(self, x: Tensor) -> Tensor:
        large = x.shape[2] == 64
        for i in range(5):
            x = getattr(self, f"relu{i}")(getattr(self, f"block{i}")(x))
            if i != 3 or large:
                x = getattr(self, f"pool{i}")(x)
        out: Tensor = self.classifier(x.flatten(1))
        return out


def vgg8(num_classes: int = 100) -> nn.Module:
    return _VGG((1, 1, 1, 1, 1), num_classes)


def vgg11(num_classes: int = 100) -> nn.Module:
    return _VGG((1, 1, 2, 2, 2), num_classes)


def vgg13(num_classes: int = 100) -> nn.Module:
    return _VGG((2, 2, 2, 2, 2), num_classes)


def vgg16(num_classes: int = 100) -> nn.Module:
    return _VGG((2, 2, 3, 3, 3), num_classes)


def vgg19(num_classes: int = 100) -> nn.Module:
    return _VGG((2, 2, 4, 4, 4), num_classes)


# -- small ones -----------------------------------------------------------------------------------------------------------------


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self._add = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            _conv(inputs, wide, 1),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            _conv(wide, wide, 3, stride, groups=wide),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            _conv(wide, outputs, 1),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self._add else out


class _MobileNetV2(nn.Module):
    """``blocks.1``, ``blocks.2``, ``blocks.4``, ``blocks.6`` and ``avgpool`` are what losses of layers compare. Its second stage keeps the
    resolution, and ReLU stands for ReLU6."""

    def __init__(self, expansion: int, width: float, num_classes: int) -> None:
        super().__init__()
        inputs = int(32 * width)
        self.conv1 = nn.Sequential(_conv(3, inputs, 3, 2), nn.BatchNorm2d(inputs), nn.ReLU())
        stages = []
        for own, channels, depth, stride in (
            (1, 16, 1, 1),
            (expansion, 24, 2, 1),
            (expansion, 32, 3, 2),
            (expansion, 64, 4, 2),
            (expansion, 96, 3, 1),
            (expansion, 160, 3, 2),
            (expansion, 320, 1, 1),
        ):
            outputs, blocks = int(channels * width), []
            for j in range(depth):
                blocks.append(_Inverted(inputs, outputs, 1 if j else stride, own))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.ModuleList(stages)
        self.conv2 = nn.Sequential(_conv(inputs, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        _initialise(self, linear=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in self.blocks:
            x = stage(x)
        out: Tensor = self.classifier(self.avgpool(self.conv2(x)).flatten(1))
        return out


def mobilenet_v2(num_classes: int = 100) -> nn.Module:
    return _MobileNetV2(6, 0.5, num_classes)


def _shuffled(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class _ShuffleV1(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        middle = outputs // 4
        self._groups = 1 if inputs == 24 else groups  # behind the stem
        self.conv1, self.bn1 = _conv(inputs, middle, 1, groups=self._groups), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = _conv(middle, middle, 3, stride, groups=middle), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = _conv(middle, outputs, 1, groups=groups), nn.BatchNorm2d(outputs)
        self._pool = stride == 2

    def forward(self, x: Tensor) -> Tensor:
        out = _shuffled(F.relu(self.bn1(self.conv1(x))), self._groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1) if self._pool else out + x)


class _HalfBlock(nn.Module):
    """ShuffleNetV2: half of the channels pass, the others are convolved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = _conv(half, half, 1), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _conv(half, half, 3, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        right = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(right)))))
        return _shuffled(torch.cat([left, F.relu(self.bn3(self.conv3(right)))], 1), 2)


class _DownBlock(nn.Module):
    """ShuffleNetV2: both halves are made of all channels, at half the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1, self.bn1 = _conv(inputs, inputs, 3, 2, groups=inputs), nn.BatchNorm2d(inputs)
        self.conv2, self.bn2 = _conv(inputs, half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(inputs, half, 1), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = _conv(half, half, 3, 2, groups=half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = _conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return _shuffled(torch.cat([left, F.relu(self.bn5(self.conv5(right)))], 1), 2)


class _ShuffleNet(nn.Module):
    """``layer1`` to ``layer3`` and ``avgpool`` are what losses of layers compare. wide: the channels of a last convolution."""

    def __init__(self, stages: Sequence[nn.Sequential], outputs: int, wide: int | None, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 24, 1), nn.BatchNorm2d(24)
        self.layer1, self.layer2, self.layer3 = stages
        if wide is not None:
            self.conv2, self.bn2 = _conv(outputs, wide, 1), nn.BatchNorm2d(wide)
        self._wide = wide is not None
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(wide or outputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        if self._wide:
            x = F.relu(self.bn2(self.conv2(x)))
        out: Tensor = self.linear(self.avgpool(x).flatten(1))
        return out


def shufflenet_v1(num_classes: int = 100) -> nn.Module:
    stages, inputs = [], 24
    for outputs, depth in ((240, 4), (480, 8), (960, 4)):
        first = _ShuffleV1(inputs, outputs - inputs, 2, 3)  # what passes beside it is the rest
        stages.append(nn.Sequential(first, *(_ShuffleV1(outputs, outputs, 1, 3) for _ in range(depth - 1))))
        inputs = outputs
    return _ShuffleNet(stages, inputs, None, num_classes)


def shufflenet_v2(num_classes: int = 100) -> nn.Module:
    stages, inputs = [], 24
    for outputs, depth in ((116, 3), (232, 7), (464, 3)):
        stages.append(nn.Sequential(_DownBlock(inputs, outputs), *(_HalfBlock(outputs) for _ in range(depth))))
        inputs = outputs
    return _ShuffleNet(stages, inputs, 1024, num_classes)
