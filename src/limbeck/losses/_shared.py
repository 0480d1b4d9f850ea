"""What several losses are made of: divergences and directions that stay finite, value and gradient, where the plain formula does not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["averaged", "kl", "log_softmax", "soft_ce", "standardized", "unit"]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, of log-probabilities; a class of probability 0 under p adds 0, whatever q says about it."""
    p = log_p.exp()
    none = p == 0
    return (p * (log_p.masked_fill(none, 0.0) - log_q.masked_fill(none, 0.0))).sum(-1)  # masked first: 0 * inf has no gradient


def soft_ce(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``-sum p log q`` over the last dimension; a class of probability 0 under p adds 0."""
    p = log_p.exp()
    return -(p * log_q.masked_fill(p == 0, 0.0)).sum(-1)


def standardized(logits: Tensor) -> Tensor:
    """``(z - mean) / (1e-7 + std)`` over the finite classes of each item, with the unbiased standard deviation; -inf stays -inf.

    Source: Sun et al. 2024, "Logit Standardization in Knowledge Distillation", arXiv:2403.01427, section 4; 1e-7 and the unbiased form are the
    authors' code. An item whose logits are all equal becomes zeros, and its gradient is multiplied by 1e7.

    >>> standardized(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[-1.0000,  0.0000,  1.0000]])
    """
    known = ~torch.isneginf(logits)
    count = known.sum(-1, keepdim=True)
    mean = logits.masked_fill(~known, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
    centred = (logits - mean).masked_fill(~known, 0.0)
    std: Tensor = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (count - 1).clamp(min=1).sqrt()
    return (centred / (1e-7 + std)).masked_fill(~known, -torch.inf)


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    """``x / |x|`` over the last dimension; a vector shorter than ``eps`` becomes zeros and gets no gradient, where one of order 1/eps would be.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    short = length <= eps
    return (x / length.masked_fill(short, 1.0)).masked_fill(short, 0.0)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities over the last dimension, softened."""
    return F.log_softmax(logits / temperature, dim=-1)


def averaged(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, Ch, H, W) averaged down to (N, Ch, *size), as ``adaptive_avg_pool2d`` does; a map of that size as it is.

    On a CPU torch averages channels-last maps several times faster; where the size divides the map, fixed windows have an ordered kernel on CUDA.
    """
    height, width = x.shape[2:]
    if (height, width) == size:
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    if height % size[0] == 0 and width % size[1] == 0:
        return F.avg_pool2d(x, (height // size[0], width // size[1]))
    return F.adaptive_avg_pool2d(x, size)
