"""Losses on the outputs of named layers."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import Problem, UsageError
from limbeck.losses._seam import Layer, Path, raised, shaped

__all__ = ["ConvReg", "Hint"]


class ConvReg(nn.Module):
    """The regressor of RepDistiller: convolution, batch normalisation, ReLU, from the student's map to the teacher's size.

    student_shape, teacher_shape: (B, Ch, H, W). Raises ValueError where no such convolution joins the two sizes. Its batch statistics make
    the gradient depend on how a step is cut into microbatches.
    """

    def __init__(self, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
        super().__init__()
        _, channels, height, width = student_shape
        _, wanted, to_height, to_width = teacher_shape
        self.conv: nn.Conv2d | nn.ConvTranspose2d
        if (height, width) == (2 * to_height, 2 * to_width):
            self.conv = nn.Conv2d(channels, wanted, 3, stride=2, padding=1)
        elif (2 * height, 2 * width) == (to_height, to_width):
            self.conv = nn.ConvTranspose2d(channels, wanted, 4, stride=2, padding=1)
        elif height >= to_height and width >= to_width:
            self.conv = nn.Conv2d(channels, wanted, (1 + height - to_height, 1 + width - to_width))
        else:
            raise ValueError(f"convreg cannot bring a map of {height} x {width} to {to_height} x {to_width}.")
        self.bn = nn.BatchNorm2d(wanted)

    def forward(self, x: Tensor) -> Tensor:
        """(N, Ch, H, W) of the student -> (N, Ch, H, W) of the teacher."""
        return F.relu(self.bn(self.conv(x)))


class Hint(nn.Module):
    """``mean over elements of (projection(student) - teacher)^2``: a layer of the student, through a learned projection, against the teacher's.

    student_shape, teacher_shape: shapes of the two features, batch first. student, teacher: paths of the layers. projector:

    - ``auto``: ``conv`` for maps (B, Ch, H, W), else ``linear``;
    - ``linear``: on the last dimension, of (B, D), (B, T, D) or channels-last maps; all other dimensions must be equal;
    - ``conv``: a 1x1 convolution of maps (B, Ch, H, W), the larger map then averaged down to the smaller;
    - ``convreg``: :class:`ConvReg`, the authors' regressor (its batch normalisation sees the microbatch);
    - ``none``: nothing is learned; the shapes must be equal, except that maps are averaged down as above.

    The projection belongs to the training alone and is never exported. A layer's features are items by sample, or by valid token for text.
    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550, section 3.1.

    >>> import torch
    >>> hint = Hint((2, 4), (2, 4), student="a", teacher="b", projector="none")
    >>> hint(torch.zeros(2, 4), torch.ones(2, 4))
    tensor([1., 1.])
    """

    def __init__(
        self,
        student_shape: tuple[int, ...],
        teacher_shape: tuple[int, ...],
        *,
        student: Annotated[str, Path, Layer("student")],
        teacher: Annotated[str, Path, Layer("teacher")],
        projector: Literal["auto", "linear", "conv", "convreg", "none"] = "auto",
    ) -> None:
        super().__init__()
        shapes = f"layer '{student}' of the student gives {shaped(student_shape)}, layer '{teacher}' of the teacher {shaped(teacher_shape)}"
        maps = len(student_shape) == 4 and len(teacher_shape) == 4
        if projector == "auto":
            projector = "conv" if maps else "linear"
        if not _fits(projector, student_shape, teacher_shape):
            raise UsageError(Problem("projector", f"{projector} cannot compare these: {shapes}.", _ADVICE[projector]))
        self.projection: nn.Module
        if projector == "linear":
            self.projection = nn.Linear(student_shape[-1], teacher_shape[-1])
        elif projector == "conv":
            self.projection = nn.Conv2d(student_shape[1], teacher_shape[1], 1)
        elif projector == "convreg":
            try:
                self.projection = ConvReg(student_shape, teacher_shape)
            except ValueError as error:
                raise UsageError(Problem("projector", f"{error} ({shapes})", "Use conv, which averages the larger map down.")) from None
        else:
            self.projection = nn.Identity()
        self.pooled = maps and projector in ("conv", "none")

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(N, ...) features of the N items, of which the teacher's get no gradient -> (N,), the mean over each item's elements."""
        teacher = raised(teacher).detach()
        student = self.projection(raised(student))
        if self.pooled and student.shape[2:] != teacher.shape[2:]:
            size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
            student, teacher = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
        return (student - teacher).square().flatten(1).mean(1)


def _fits(projector: str, student: tuple[int, ...], teacher: tuple[int, ...]) -> bool:
    """Whether the projector can bring a feature of one shape to the other."""
    if len(student) != len(teacher) or len(student) < 2:
        return False
    if projector == "linear":
        return student[1:-1] == teacher[1:-1]
    if projector == "none":
        return student[1:] == teacher[1:] or (len(student) == 4 and student[1] == teacher[1])
    return len(student) == 4


_ADVICE = {
    "linear": "Choose layers whose shapes differ in the last dimension alone, or conv for channels-first maps.",
    "conv": "conv and convreg need maps (B, channels, height, width) on both sides; use linear for others.",
    "convreg": "conv and convreg need maps (B, channels, height, width) on both sides; use linear for others.",
    "none": "Choose layers of equal shapes, or a learned projector (linear or conv).",
}
