"""Losses on what transformers compute inside: the first token of a layer, attention scores, relations of queries, keys and values.

``patient`` stands in the table of losses. The others need several layers of one model, or scores that no module gives out; they are functions for
loops of one's own until a recipe can name such inputs.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from limbeck.losses._seam import Shape, raised
from limbeck.losses._shared import kl, unit

__all__ = ["heads", "minilm", "minilm_v2", "of_first_tokens", "patient", "tinybert_attention"]

Qkv = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of one layer."""


def of_first_tokens(student: Shape, teacher: Shape) -> str:
    """Vectors of one width, by sample or by token."""
    fit = all(len(shape) in (2, 3) for shape in (student, teacher)) and student[-1] == teacher[-1]
    return "" if fit else "Choose layers of one width that give (B, T, D) or (B, D); for two widths use cosine or hint."


def patient(
    student: Tensor, teacher: Tensor, *, normalize: Annotated[bool, Field(strict=True, description="true or false")] = True
) -> Tensor:
    """``mean over D of (s / |s| - t / |t|)^2``, s and t the first token ([CLS]) of a layer of the student and of the teacher.

    student, teacher: (N, T, D) hidden states, of which the first token counts, or (N, D); one D; the teacher gets no gradient. Returns (N,), 0 where
    they agree. normalize: false leaves the lengths as they are. A zero vector stays zero and gets no gradient. One term compares one pair of layers:
    for the published mean over L layers give L terms of 1/L of the weight each, the last layer left out. The authors weigh it by 10 to 1000.

    The mean is over D, as in the authors' code; the paper and TextBrewer sum, which is D times as much. In float16 the authors' own code returns
    half a number; here it is raised.

    Source: Sun et al. 2019, "Patient Knowledge Distillation for BERT Model Compression", arXiv:1908.09355, section 3.2.

    >>> patient(torch.tensor([[[3.0, 4.0], [9.0, 9.0]]]), torch.tensor([[[6.0, 8.0], [0.0, 1.0]]]))
    tensor([0.])
    """
    s, t = (x[:, 0] if x.ndim == 3 else x for x in (raised(student), raised(teacher).detach()))
    if normalize:
        s, t = unit(s), unit(t)
    return (s - t).square().mean(-1)


def tinybert_attention(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean over heads and pairs of tokens of (A_s - A_t)^2``, A the attention scores before the softmax.

    student, teacher: (N, heads, T, T), scores with the additive mask on them; the teacher gets no gradient. A score of -100 or less counts as 0, on
    each side: so padded keys vanish, and yet are counted, as padded queries are, in the authors' code. Returns (N,), 0 where they agree.

    Source: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", arXiv:1909.10351, equation 7.

    >>> tinybert_attention(torch.full((1, 2, 3, 3), -10000.0), torch.zeros(1, 2, 3, 3))
    tensor([0.])
    """
    s, t = (x.masked_fill(x <= -1e2, 0.0) for x in (raised(student), raised(teacher).detach()))
    return (s - t).square().flatten(1).mean(1)


def heads(x: Tensor, count: int) -> Tensor:
    """(N, T, D) -> (N, count, T, D / count). Raises ValueError where D cannot be divided so.

    >>> heads(torch.zeros(2, 5, 12), 4).shape
    torch.Size([2, 4, 5, 3])
    """
    if x.shape[-1] % count:
        raise ValueError(f"{x.shape[-1]} dimensions cannot be divided among {count} heads")
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def minilm(student: Qkv, teacher: Qkv, mask: Tensor) -> Tensor:
    """``KL(A_t || A_s) + KL(V_t || V_s)`` a token, with ``A = softmax(Q K' / sqrt(d))`` and ``V = softmax(V V' / sqrt(d))``, mean over heads.

    student, teacher: (q, k, v) of the last layer, each (N, heads, T, d), with one number of heads and any two d; the teacher gets no gradient. They
    are the inputs of the attention, so this works beside fused attention, which never shows its scores. mask: (N, T), 0 at padding: padded keys
    are left out of the softmax, padded queries are not counted. Returns (M,) nats for the M valid tokens, in order; 0 where they agree.

    Source: Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
    arXiv:2002.10957, equations 5 to 8.

    >>> one = tuple(torch.ones(1, 2, 3, 4) for _ in "qkv")
    >>> minilm(one, one, torch.tensor([[1, 1, 0]]))
    tensor([0., 0.])
    """
    attention = _divergence((student[0], student[1]), (teacher[0], teacher[1]), mask)
    return attention + _divergence((student[2], student[2]), (teacher[2], teacher[2]), mask)


def minilm_v2(student: Qkv, teacher: Qkv, mask: Tensor, *, relation_heads: int = 48) -> Tensor:
    """``sum over X in Q, K, V of KL(R_t || R_s)`` a token, with ``R = softmax(X X' / sqrt(D / relation_heads))``, mean over relation heads.

    student, teacher: (q, k, v) of one layer, each (N, T, D) with the heads side by side; they are divided anew into ``relation_heads``, so the two
    models need not have the same heads or widths. Otherwise as :func:`minilm`. Returns (M,) nats for the M valid tokens.

    Source: Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers", arXiv:2012.15828,
    section 3 (48 or 64 relation heads; the teacher's layer is an upper middle one for large teachers).

    >>> one = tuple(torch.ones(1, 3, 8) for _ in "qkv")
    >>> minilm_v2(one, one, torch.tensor([[1, 1, 0]]), relation_heads=4)
    tensor([0., 0.])
    """
    parts = [
        _divergence((heads(s, relation_heads),) * 2, (heads(t, relation_heads),) * 2, mask) for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(parts).sum(0)


def _divergence(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """(M,): KL of the relations of two (N, heads, T, d) each, mean over heads, at the valid tokens."""
    q, p = _relation(*student, mask), _relation(*teacher, mask).detach()
    return kl(p, q).mean(1)[mask != 0]


def _relation(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """(N, heads, T, T) log-probabilities: of each query, over the valid keys."""
    scores = raised(a) @ raised(b).transpose(-1, -2) / a.shape[-1] ** 0.5
    padded = (mask == 0)[:, None, None, :]
    nobody = padded.all(-1, keepdim=True)  # a sample of padding alone: whatever, but finite
    return F.log_softmax(scores.masked_fill(padded & ~nobody, -torch.inf), dim=-1)
