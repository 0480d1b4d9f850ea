"""A teacher and a student for CIFAR-10, chosen for what two CPU cores do fast: few, wide layers and early pooling.

On a CPU with bf16 (AVX-512 BF16 or AMX) and channels-last, 3x3 convolutions of 64 channels and more run at two to three times the float32
rate, while thin layers at full resolution are bound by memory. Both models are plain modules, without control flow that depends on data:

    python:../benchmarks/models/cifar.py:teacher      about 240 MFLOPs an image, 2.0 M parameters
    python:../benchmarks/models/cifar.py:student      about  11 MFLOPs an image, 0.1 M parameters

They expect 32x32 images, normalised by the training split's mean and standard deviation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["student", "teacher"]


class PatchWhitening(nn.Module):
    """2x2 patches, decorrelated and brought to unit variance by a fixed linear map; then the same with the sign changed.

    A network starts from well-conditioned inputs instead of having to learn them. Jordan 2024 ("94% on CIFAR-10 in 3.29 seconds on a single
    GPU", arXiv 2404.00498) takes the eigenvectors of the patches' covariance. For natural images those are very nearly the products of a
    colour axis (sum, red - blue, red + blue - 2 green) and a Haar pattern (mean, vertical, horizontal, diagonal), so they can be written
    down. The twelve standard deviations were measured on 5,000 training images; they are the only numbers here that come from data.

    (B, 3, H, W) -> (B, 24, H - 1, W - 1)
    """

    channels = 24
    deviations = (
        (3.18, 0.63, 0.58, 0.236),
        (0.91, 0.129, 0.120, 0.040),
        (0.434, 0.071, 0.068, 0.025),
    )
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        colour = nn.functional.normalize(torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]]))
        haar = torch.tensor([[[1.0, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]) / 2
        noise = 5e-4  # keeps the weakest pattern, which is mostly noise, from being blown up
        scale = (torch.tensor(self.deviations) ** 2 + noise).rsqrt()
        filters = torch.einsum("ki,hyx,kh->khiyx", colour, haar, scale).reshape(12, 3, 2, 2)
        self.register_buffer("weight", torch.cat([filters, -filters]))
        self.bias = nn.Parameter(torch.zeros(self.channels))

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.conv2d(image, self.weight, self.bias)


def convolution(inputs: int, outputs: int, activation: type[nn.Module], *, stride: int = 1, pool: bool = False) -> nn.Sequential:
    """3x3 convolution, pooled by 2 before the norm where asked (a quarter of the work for what follows), norm, activation."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs), activation())


class Teacher(nn.Module):
    """Whitened patches, then three stages of two convolutions at 15x15, 7x7 and 3x3."""

    def __init__(self, num_classes: int = 10, widths: tuple[int, int, int] = (64, 256, 256)) -> None:
        super().__init__()
        self.patches = nn.Sequential(PatchWhitening(), nn.GELU())
        stages = []
        inputs = PatchWhitening.channels
        for outputs in widths:
            stages.append(nn.Sequential(convolution(inputs, outputs, nn.GELU, pool=True), convolution(outputs, outputs, nn.GELU)))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, num_classes, bias=False)
        self.scale = 1 / 9  # maxima of normalised features are large: without it the first logits saturate the softmax

    def forward(self, image: Tensor) -> Tensor:
        features = self.stages(self.patches(image)).amax(dim=(2, 3))
        logits: Tensor = self.head(features) * self.scale
        return logits


class Student(nn.Module):
    """A small network: it halves the image in its first layer and spends its work at 16x16, 8x8 and 4x4."""

    def __init__(self, num_classes: int = 10, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        first, second, third = widths
        self.features = nn.Sequential(
            convolution(3, first, nn.ReLU, stride=2),
            convolution(first, second, nn.ReLU, pool=True),
            convolution(second, third, nn.ReLU),
            convolution(third, third, nn.ReLU, pool=True),
            convolution(third, third, nn.ReLU),
        )
        self.head = nn.Linear(third, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(image).mean(dim=(2, 3)))
        return logits


def teacher(num_classes: int = 10) -> nn.Module:
    return Teacher(num_classes)


def student(num_classes: int = 10) -> nn.Module:
    return Student(num_classes)
