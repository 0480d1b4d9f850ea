"""Losses on the outputs of named layers."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.errors import Problem, UsageError
from limbeck.losses._seam import Layer, Path, of_samples, raised, shaped
from limbeck.losses._shared import averaged, unit

__all__ = ["ConvReg", "Correlation", "Cosine", "Hint"]


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
        student, teacher = raised(student), raised(teacher).detach()
        if self.pooled:  # before the projection of each pixel, with which it changes places and which then has fewer pixels
            size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
            student, teacher = averaged(student, size), averaged(teacher, size)
        student = self.projection(student)
        return (student.contiguous() - teacher.contiguous()).square().flatten(1).mean(1)


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


class Cosine(nn.Module):
    """``1 - cos(projection(student), teacher)``: the direction of a layer's output, whatever its length.

    student_shape, teacher_shape: (B, D), or (B, T, D) with one T. Over the last dimension; of samples with T vectors, the mean over these.
    Text counts its valid tokens instead, one an item. projector: ``linear`` learns a projection from the student's width to the teacher's, which
    is never exported; ``none`` needs equal widths; ``auto`` is none where they are equal, else linear. Returns (N,), from 0 (one direction) to 2. A
    zero vector has no direction: it gives 1 and gets no gradient.

    Source: Sanh et al. 2019, "DistilBERT, a distilled version of BERT", arXiv:1910.01108, section 3 (hidden states of tokens); for sentence
    embeddings Reimers and Gurevych 2020, arXiv:2004.09813, take the squared error instead (``hint``).

    >>> import torch
    >>> Cosine((2, 2), (2, 2), student="a", teacher="b")(torch.eye(2), torch.ones(2, 2)).round(decimals=4)
    tensor([0.2929, 0.2929])
    """

    def __init__(
        self,
        student_shape: tuple[int, ...],
        teacher_shape: tuple[int, ...],
        *,
        student: Annotated[str, Path, Layer("student")],
        teacher: Annotated[str, Path, Layer("teacher")],
        projector: Literal["auto", "linear", "none"] = "auto",
    ) -> None:
        super().__init__()
        if projector == "auto":
            projector = "none" if student_shape[-1] == teacher_shape[-1] else "linear"
        shapes = f"layer '{student}' of the student gives {shaped(student_shape)}, layer '{teacher}' of the teacher {shaped(teacher_shape)}"
        if len(student_shape) not in (2, 3) or student_shape[1:-1] != teacher_shape[1:-1] or len(student_shape) != len(teacher_shape):
            advice = "Choose layers that give (B, D) or (B, T, D) on both sides."
            raise UsageError(Problem("student", f"cosine cannot compare these: {shapes}.", advice))
        if projector == "none" and student_shape[-1] != teacher_shape[-1]:
            raise UsageError(Problem("projector", f"none cannot compare these: {shapes}.", "Use linear, which brings the widths together."))
        self.projection = nn.Linear(student_shape[-1], teacher_shape[-1]) if projector == "linear" else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(N, D) or (N, T, D) of the N items, of which the teacher's get no gradient -> (N,)."""
        cosine = (unit(self.projection(raised(student))) * unit(raised(teacher).detach())).sum(-1)
        return 1 - cosine.flatten(1).mean(1) if cosine.ndim == 2 else 1 - cosine


class Correlation(nn.Module):
    """``mean over neighbours in the batch of sum over dimensions of |s_i - t_i| |s_i+1 - t_i+1|``: CC as RepDistiller has it.

    s and t are learned linear embeddings of the flattened features of student and teacher, of ``embed`` dimensions each; with ``embed: 0`` the
    features themselves, which must then have the same size. student_shape, teacher_shape: (B, D) or (B, Ch, H, W). Returns (N,), whose mean is the
    published mean over the N - 1 neighbouring pairs: it depends on the order of the batch. 0 where they agree, and for one item. The embeddings
    are never exported; both are learned, so that both may shrink: watch that this loss does not vanish. RepDistiller weighs it by 0.02.

    The paper's loss is another one: ``correlation_rbf``.

    Source: Peng et al. 2019, "Correlation Congruence for Knowledge Distillation", arXiv:1904.01802, as restructured by RepDistiller (Tian et
    al. 2020, arXiv:1910.10699) from the authors' private code.

    >>> import torch
    >>> cc = Correlation((3, 1), (3, 1), student="a", teacher="b", embed=0)
    >>> cc(torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(3, 1))
    tensor([1.5000, 6.0000, 4.5000])
    """

    def __init__(
        self,
        student_shape: tuple[int, ...],
        teacher_shape: tuple[int, ...],
        *,
        student: Annotated[str, Path, Layer("student")],
        teacher: Annotated[str, Path, Layer("teacher")],
        embed: Annotated[int, Field(ge=0, description="a whole number of dimensions, or 0 for none")] = 128,
    ) -> None:
        super().__init__()
        shapes = f"layer '{student}' of the student gives {shaped(student_shape)}, layer '{teacher}' of the teacher {shaped(teacher_shape)}"
        advice = of_samples(student_shape, teacher_shape)
        if advice:
            raise UsageError(Problem("student", f"correlation cannot compare these: {shapes}.", advice))
        widths = [math.prod(shape[1:]) for shape in (student_shape, teacher_shape)]
        if not embed and widths[0] != widths[1]:
            raise UsageError(Problem("embed", f"0 cannot compare these: {shapes}.", "Embed both, into 128 dimensions for example."))
        self.student = nn.Linear(widths[0], embed) if embed else nn.Identity()
        self.teacher = nn.Linear(widths[1], embed) if embed else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(N, ...) features of the N items in order, of which the teacher's get no gradient -> (N,)."""
        apart = (self.student(raised(student).flatten(1)) - self.teacher(raised(teacher).detach().flatten(1))).abs()
        pairs = (apart[:-1] * apart[1:]).sum(-1) * (len(apart) / max(len(apart) - 1, 1))
        return (F.pad(pairs, (0, 1)) + F.pad(pairs, (1, 0))) / 2  # half a pair to each of the two
