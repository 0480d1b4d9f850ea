"""Losses on the maps of convolutional networks: where a layer looks, and what its channels say."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.errors import Problem, UsageError
from limbeck.losses._seam import Layer, Path, Shape, of_maps, raised, shaped
from limbeck.losses._shared import averaged, unit

__all__ = ["Ofd", "Review", "Vid", "attention_transfer", "hcl", "nst", "partial_l2", "pooled"]


def pooled(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps (N, Ch, H, W), the larger averaged down to the size of the smaller."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return averaged(student, size), averaged(teacher, size)


def attention_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    p: Annotated[int, Field(ge=1, le=8, description="a whole number from 1 to 8")] = 2,
    form: Literal["code", "paper"] = "code",
) -> Tensor:
    """``mean over places of (Q_s / |Q_s| - Q_t / |Q_t|)^2``, with ``Q = mean over channels of |f|^p``: where the layer looks.

    That is the form ``code``, of the authors' code and RepDistiller; ``paper`` is the length of the same difference, without square and mean (at
    8 x 8 places about 100 times as large). student: (N, Ch, H, W), teacher: (N, any channels, H, W), which gets no gradient; of maps of two sizes the
    larger is averaged down. Returns (N,), 0 where they agree. A map of zeros looks nowhere and gets no gradient.

    Over several pairs of layers it is their sum, as published (weight 1000 in ``code``).

    Source: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", arXiv:1612.03928, section 3.1, equation 2.

    >>> attention_transfer(torch.ones(1, 3, 2, 2), torch.full((1, 5, 4, 4), 7.0))
    tensor([0.])
    """
    student, teacher = pooled(raised(student), raised(teacher).detach())
    looks = [unit(x.abs().pow(p).mean(1).flatten(1)) for x in (student, teacher)]
    difference = looks[0] - looks[1]
    if form == "paper":
        length: Tensor = torch.linalg.vector_norm(difference, dim=-1)
        return length
    return difference.square().mean(-1)


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean k(t, t) + mean k(s, s) - 2 mean k(s, t)``, with ``k(a, b) = (a . b)^2``: do the channels look at the same places?

    s and t run over the channels of an item, each a vector of its H x W places of length 1: the squared maximum mean discrepancy of the two
    sets. student: (N, Ch, H, W), teacher: (N, any channels, H, W), which gets no gradient; of maps of two sizes the larger is averaged down.
    Returns (N,), 0 where the sets agree. A channel of zeros stays zero and gets no gradient. RepDistiller weighs it by 50.

    Source: Huang and Wang 2017, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", arXiv:1707.01219, section 4, with the
    polynomial kernel of degree 2 (c = 0), as RepDistiller.

    >>> nst(torch.ones(1, 3, 2, 2), torch.ones(1, 5, 2, 2)).round(decimals=5).abs()
    tensor([0.])
    """
    student, teacher = pooled(raised(student), raised(teacher).detach())
    s, t = unit(student.flatten(2)), unit(teacher.flatten(2))
    if s.shape[2] <= min(s.shape[1], t.shape[1]):
        # The sum of squared products of all channels is the product of the two Gram matrices of places, which are the smaller ones here.
        return (s.transpose(1, 2) @ s / s.shape[1] - t.transpose(1, 2) @ t / t.shape[1]).square().sum((1, 2))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.transpose(1, 2)).square().mean((1, 2))

    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def hcl(student: Tensor, teacher: Tensor) -> Tensor:
    """``sum over sizes of w * mean (s - t)^2 / sum of w``: one level of ReviewKD, at full size (w = 1) and averaged to 4 x 4, 2 x 2 and 1 x 1.

    w halves from size to size; sizes that the map does not exceed are left out and halve nothing. student, teacher: (N, Ch, H, W) of one shape, what
    ReviewKD's fusion gives for this level (:class:`Review`); the teacher gets no gradient. Returns (N,), 0 where they agree.

    Source: Chen et al. 2021, "Distilling Knowledge via Knowledge Review", arXiv:2104.09044, section 3 (hierarchical context loss), authors' code.

    >>> hcl(torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))
    tensor([1.])
    """
    student, teacher = raised(student), raised(teacher).detach()
    total, weights, weight = (student - teacher).square().flatten(1).mean(1), 1.0, 1.0
    for size in (4, 2, 1):
        if size < student.shape[2]:
            weight /= 2
            apart = averaged(student, (size, size)) - averaged(teacher, (size, size))
            total, weights = total + weight * apart.square().flatten(1).mean(1), weights + weight
    return total / weights


class Review(nn.Module):
    """``sum over levels of hcl(review_i(s_i, s_i+1, ...), t_i)``: each level of the student, with what the deeper ones know, against the teacher's.

    From the last level to the first: x_i is a 1x1 convolution of s_i to ``width`` channels. Where there is a deeper level, y is its x, brought to
    the size of s_i, and x_i becomes a x_i + b y, with two maps a and b in (0, 1) that a 1x1 convolution of both finds. Brought to the size of t_i,
    it goes through a 3x3 convolution, and that is compared with t_i (:func:`hcl`). All convolutions but that of a and b have batch normalisation,
    so a value depends on its neighbours.

    student_shape, teacher_shape: a list of shapes from the first stage to the last (or one shape), (B, Ch, H, W) of square maps, or (B, D), which
    counts as a map of one place. width: 0 for the last level's channels, at most 512. Returns (N,). For CNNs, all stages and the pooled
    embedding; the authors weigh it by 0.6 to 8, raised over the first 20 epochs. What was learned here is never exported.

    Source: Chen et al. 2021, "Distilling Knowledge via Knowledge Review", arXiv:2104.09044, sections 3.2 to 3.4, in the form of the authors' code.

    >>> _ = torch.manual_seed(0)
    >>> shapes = [(2, 3, 4, 4), (2, 5)]
    >>> review = Review(shapes, shapes, student="a", teacher="b")
    >>> review([torch.ones(s) for s in shapes], [torch.ones(s) for s in shapes]).shape
    torch.Size([2])
    """

    def __init__(
        self,
        student_shape: Shape | list[Shape],
        teacher_shape: Shape | list[Shape],
        *,
        student: Annotated[str, Path, Layer("student")],
        teacher: Annotated[str, Path, Layer("teacher")],
        width: Annotated[int, Field(ge=0, description="a whole number of channels, or 0 for the last level's")] = 0,
    ) -> None:
        super().__init__()
        ours, theirs = ([shape] if isinstance(shape, tuple) else shape for shape in (student_shape, teacher_shape))
        for shape in (*ours, *theirs):
            if len(shape) != 2 and not (len(shape) == 4 and shape[2] == shape[3]):
                hint = "Choose layers that give square maps (B, channels, size, size), or one vector (B, D) a sample."
                raise UsageError(Problem("student", f"review cannot compare {shaped(shape)}.", hint))
        width = width or min(512, ours[-1][1])
        self._sizes = [_size(shape) for shape in theirs]
        last = len(ours) - 1
        self.first = nn.ModuleList(_normed(shape[1], width, 1) for shape in ours)
        self.then = nn.ModuleList(_normed(width, shape[1], 3) for shape in theirs)
        self.weigh = nn.ModuleList(nn.Conv2d(2 * width, 2, 1) for _ in range(last))

    def forward(self, student: Tensor | list[Tensor], teacher: Tensor | list[Tensor]) -> Tensor:
        """Features of all levels, (N, Ch, H, W) or (N, D), of which the teacher's get no gradient -> (N,)."""
        ours, theirs = ([_as_map(raised(x)) for x in ([given] if isinstance(given, Tensor) else given)] for given in (student, teacher))
        total, deeper = ours[0].new_zeros(len(ours[0])), None
        for i in reversed(range(len(ours))):
            x: Tensor = self.first[i](ours[i])
            if deeper is not None:
                y = F.interpolate(deeper, x.shape[2:], mode="nearest")
                a, b = torch.sigmoid(self.weigh[i](torch.cat([x, y], 1))).chunk(2, 1)
                x = a * x + b * y
            if x.shape[3] != self._sizes[i]:
                x = F.interpolate(x, (self._sizes[i],) * 2, mode="nearest")
            deeper = x
            total = total + hcl(self.then[i](x), theirs[i])
        return total


def _size(shape: Shape) -> int:
    return shape[2] if len(shape) == 4 else 1


def _as_map(x: Tensor) -> Tensor:
    return x if x.ndim == 4 else x[:, :, None, None]


def _normed(inputs: int, outputs: int, size: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, _Norm(outputs))


class _Norm(nn.BatchNorm2d):
    """Batch normalisation; one place of one sample alone, which has no deviation, by what was seen before."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        found: Tensor = super().forward(x)
        return found


class Vid(nn.Module):
    """``mean over elements of ((mu(s) - t)^2 / v + log v) / 2``: how well the student's map foretells the teacher's.

    mu is three 1x1 convolutions without bias, ReLU between them; v one learned variance a channel, softplus(log_scale) + 1e-5, which begins at
    ``variance``. student_shape, teacher_shape: (B, Ch, H, W); the larger map is averaged down. hidden: channels between the convolutions; 0: as
    many as the teacher has. Returns (N,); a likelihood up to a constant, so it may fall below 0. What was learned here is never exported.

    Source: Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer", arXiv:1904.05835, section 2, in RepDistiller's form.

    >>> _ = torch.manual_seed(0)
    >>> vid = Vid((2, 3, 4, 4), (2, 5, 2, 2), student="a", teacher="b")
    >>> vid(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 2, 2)).detach()
    tensor([0.8047, 0.8047])
    """

    def __init__(
        self,
        student_shape: Shape,
        teacher_shape: Shape,
        *,
        student: Annotated[str, Path, Layer("student")],
        teacher: Annotated[str, Path, Layer("teacher")],
        hidden: Annotated[int, Field(ge=0, description="a whole number of channels, or 0 for the teacher's")] = 0,
        variance: Annotated[float, Field(gt=1e-4, allow_inf_nan=False, description="a number above 0.0001")] = 5.0,
    ) -> None:
        super().__init__()
        _need_maps("vid", student, teacher, student_shape, teacher_shape)
        given, wanted = student_shape[1], teacher_shape[1]
        between = hidden or wanted
        self.regressor = nn.Sequential(
            nn.Conv2d(given, between, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(between, between, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(between, wanted, 1, bias=False),
        )
        self.log_scale = nn.Parameter(torch.full((wanted,), math.log(math.expm1(variance - 1e-5))))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(N, Ch, H, W) of both, of which the teacher's get no gradient -> (N,)."""
        student, teacher = pooled(raised(student), raised(teacher).detach())
        variance = F.softplus(self.log_scale) + 1e-5
        variance = variance[:, None, None]
        missed: Tensor = self.regressor(student) - teacher
        return 0.5 * (missed.square() / variance + variance.log()).flatten(1).mean(1)


def partial_l2(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """``sum over elements of (s - max(t, margin))^2``, but for those where the target is not above 0 and s not above the target.

    student, teacher: (N, Ch, H, W); margin: broadcast to them, negative. Returns (N,).

    >>> partial_l2(torch.tensor([[[[-3.0, 2.0]]]]), torch.tensor([[[[-2.0, 5.0]]]]), torch.tensor(-1.0))
    tensor([9.])
    """
    target = torch.maximum(teacher, margin)
    return ((student - target).square() * ((student > target) | (target > 0))).flatten(1).sum(1)


class Ofd(nn.Module):
    """``sum over elements of (c(s) - max(t, m))^2``, where max(t, m) > 0 or c(s) above it: what passes the ReLU, and below it only that it is below.

    c is a 1x1 convolution and batch normalisation from the student's channels to the teacher's (``projector: none``: nothing, for maps of equal
    shape). m is the margin of a channel: the mean of the teacher's negative responses. The authors allow two ways to it, from the batch normalisation
    before the layer or straight from the responses; here it is from those of the batch, so a value depends on its neighbours. Choose layers before
    their ReLU (a batch normalisation, or the sum of a block). student_shape, teacher_shape: (B, Ch, H, W) of one H and W. Returns (N,), 0 where
    both agree; nothing is averaged over elements, so the authors weigh it by 0.001, halved for each stage before the last.

    Source: Heo et al. 2019, "A Comprehensive Overhaul of Feature Distillation", arXiv:1904.01866, section 3.

    >>> ofd = Ofd((1, 1, 1, 2), (1, 1, 1, 2), student="a", teacher="b", projector="none")
    >>> ofd(torch.tensor([[[[-3.0, 2.0]]]]), torch.tensor([[[[-1.0, 5.0]]]]))
    tensor([9.])
    """

    def __init__(
        self,
        student_shape: Shape,
        teacher_shape: Shape,
        *,
        student: Annotated[str, Path, Layer("student")],
        teacher: Annotated[str, Path, Layer("teacher")],
        projector: Literal["conv", "none"] = "conv",
    ) -> None:
        super().__init__()
        _need_maps("ofd", student, teacher, student_shape, teacher_shape)
        shapes = f"layer '{student}' of the student gives {shaped(student_shape)}, layer '{teacher}' of the teacher {shaped(teacher_shape)}"
        if student_shape[2:] != teacher_shape[2:]:
            raise UsageError(Problem("student", f"ofd cannot compare these: {shapes}.", "Choose layers of the same height and width."))
        if projector == "none" and student_shape[1] != teacher_shape[1]:
            raise UsageError(Problem("projector", f"none cannot compare these: {shapes}.", "Use conv, which brings the channels together."))
        self.projection: nn.Module = nn.Identity()
        if projector == "conv":
            convolution = nn.Conv2d(student_shape[1], teacher_shape[1], 1, bias=False)
            nn.init.normal_(convolution.weight, 0.0, math.sqrt(2.0 / teacher_shape[1]))
            self.projection = nn.Sequential(convolution, nn.BatchNorm2d(teacher_shape[1]))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(N, Ch, H, W) of both, of which the teacher's get no gradient -> (N,)."""
        teacher = raised(teacher).detach()
        below = teacher.clamp(max=0.0)
        margin = below.sum((0, 2, 3), keepdim=True) / (teacher < 0).sum((0, 2, 3), keepdim=True).clamp(min=1)
        return partial_l2(self.projection(raised(student)), teacher, margin)


def _need_maps(name: str, student: str, teacher: str, student_shape: Shape, teacher_shape: Shape) -> None:
    advice = of_maps(student_shape, teacher_shape)
    if advice:
        shapes = f"layer '{student}' of the student gives {shaped(student_shape)}, layer '{teacher}' of the teacher {shaped(teacher_shape)}"
        raise UsageError(Problem("student", f"{name} cannot compare these: {shapes}.", advice))
