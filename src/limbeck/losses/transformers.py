"""Losses on what transformers compute inside: the first token of a layer, attention scores, relations of queries, keys and values.

Attention and relations are computed from queries, keys and values, (N, T, 3 D) side by side: what :class:`limbeck.models.Capture` gives of a layer
whose path ends in ``:q,k,v``. So fused attention, which shows no scores, can stay on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from limbeck.losses._seam import Shape, raised
from limbeck.losses._shared import kl, unit

__all__ = ["minilm", "minilm_v2", "of_first_tokens", "of_projections", "patient", "split_heads", "tinybert_attention", "tinybert_scores"]

Heads = Annotated[int, Field(ge=1, le=4096, description="a whole number of heads, which divides both widths")]


def of_projections(student: Shape, teacher: Shape, values: Mapping[str, Any]) -> str:
    """Queries, keys and values side by side, of as many tokens and of widths that the heads divide."""
    if not len(student) == len(teacher) == 3:
        return "Choose layers of transformers on both sides."
    if student[1] != teacher[1]:
        return f"Choose models that read the same tokens: these are {student[1]} and {teacher[1]}."
    widths = [shape[-1] // 3 for shape in (student, teacher)]
    if any(width % values["heads"] for width in widths):
        return (
            f"The queries are {widths[0]} and {widths[1]} wide, which {values['heads']} heads do not divide; give another number as heads."
        )
    return ""


def of_first_tokens(student: Shape, teacher: Shape, values: Mapping[str, Any]) -> str:
    """Vectors of one width, by sample or by token."""
    fit = all(len(shape) in (2, 3) for shape in (student, teacher)) and student[-1] == teacher[-1]
    return "" if fit else "Choose layers of one width that give (B, T, D) or (B, D); for two widths use cosine or hint."


def patient(
    student: Tensor, teacher: Tensor, *, normalize: Annotated[bool, Field(strict=True, description="true or false")] = True
) -> Tensor:
    """``mean over D of (s / |s| - t / |t|)^2``, s and t the first token ([CLS]) of a layer of the student and of the teacher.

    student, teacher: (N, T, D) hidden states, of which the first token counts, or (N, D); one D; the teacher gets no gradient. Returns (N,), 0 where
    they agree. normalize: false leaves the lengths as they are. A zero vector stays zero and gets no gradient. Over
    several layers it is their mean, as published, and the last layer is left out (``layers: auto`` does so). The authors weigh it by 10 to 1000.

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


def tinybert_scores(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean over heads and pairs of tokens of (A_s - A_t)^2`` as the authors' code has it, on attention scores A before the softmax.

    student, teacher: (N, heads, T, T), scores with the additive mask on them; the teacher gets no gradient. A score of -100 or less counts as 0, on
    each side: so padded keys vanish, and yet are counted, as padded queries are. Returns (N,), 0 where they agree. What a recipe names is
    :func:`tinybert_attention`, which does not depend on the padding; without padding (and such scores) the two are one.

    Source: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", arXiv:1909.10351, equation 7, authors' code.

    >>> tinybert_scores(torch.full((1, 2, 3, 3), -10000.0), torch.zeros(1, 2, 3, 3))
    tensor([0.])
    """
    s, t = (x.masked_fill(x <= -1e2, 0.0) for x in (raised(student), raised(teacher).detach()))
    return (s - t).square().flatten(1).mean(1)


def tinybert_attention(student: Tensor, teacher: Tensor, mask: Tensor, *, heads: Heads) -> Tensor:
    """``mean over heads and pairs of tokens of (A_s - A_t)^2``, with ``A = Q K' / sqrt(d)``: the attention scores before the softmax.

    student, teacher: (N, T, 3 D), queries, keys and values of a layer side by side, each of one number of ``heads`` and any two D; the teacher gets
    no gradient. mask: (N, T), 0 at padding. Returns (N,), the mean over the pairs of tokens that are no padding; 0 where they agree. The scores are
    computed again from the inputs of the attention, so this works beside fused attention, which never shows them.

    This is the paper's formula on each text alone. The authors' code also counts padded queries and keys, which makes the value depend on how far a
    batch is padded; ``tinybert_scores`` is that form. Published is the sum over layers, the teacher's evenly spaced, together with the hidden
    states (``hint``) and followed by the logits in a stage of its own.

    Source: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", arXiv:1909.10351, equation 7.

    >>> tinybert_attention(torch.ones(1, 2, 6), torch.zeros(1, 2, 6), torch.tensor([[1, 1]]), heads=1).round(decimals=4)
    tensor([2.])
    """
    real = mask != 0
    pairs = real[:, :, None] & real[:, None, :]
    (q_s, k_s, _), (q_t, k_t, _) = _projections(student, heads), _projections(teacher, heads)
    apart = (_scores(q_s, k_s) - _scores(q_t, k_t).detach()).square().mean(1).masked_fill(~pairs, 0.0)
    return apart.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def split_heads(x: Tensor, count: int) -> Tensor:
    """(N, T, D) -> (N, count, T, D / count). Raises ValueError where D cannot be divided so.

    >>> split_heads(torch.zeros(2, 5, 12), 4).shape
    torch.Size([2, 4, 5, 3])
    """
    if x.shape[-1] % count:
        raise ValueError(f"{x.shape[-1]} dimensions cannot be divided among {count} heads")
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def minilm(student: Tensor, teacher: Tensor, mask: Tensor, *, heads: Heads) -> Tensor:
    """``KL(A_t || A_s) + KL(V_t || V_s)``, with ``A = softmax(Q K' / sqrt(d))`` and ``V = softmax(V V' / sqrt(d))``, mean over heads and tokens.

    student, teacher: (N, T, 3 D), queries, keys and values of the last layer side by side, each of one number of ``heads`` and any two D; the teacher
    gets no gradient. They are the inputs of the attention, so this works beside fused attention, which never shows its scores. mask: (N, T), 0 at
    padding: padded keys are left out of the softmax, padded queries are not counted. Returns (N,) nats, the mean over a text's own tokens as in the
    paper; 0 where they agree.

    Source: Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
    arXiv:2002.10957, equations 5 to 8.

    >>> one = torch.ones(1, 3, 12)
    >>> minilm(one, one, torch.tensor([[1, 1, 0]]), heads=2)
    tensor([0.])
    """
    (q_s, k_s, v_s), (q_t, k_t, v_t) = _projections(student, heads), _projections(teacher, heads)
    return _divergence((q_s, k_s), (q_t, k_t), mask) + _divergence((v_s, v_s), (v_t, v_t), mask)


def minilm_v2(student: Tensor, teacher: Tensor, mask: Tensor, *, heads: Heads = 48) -> Tensor:
    """``sum over X in Q, K, V of KL(R_t || R_s)``, with ``R = softmax(X X' / sqrt(D / heads))``, mean over relation heads and tokens.

    student, teacher: (N, T, 3 D), queries, keys and values of a layer side by side; each is divided anew into ``heads`` relation heads, so the two
    models need not have the same heads or widths, as long as ``heads`` divides both. Otherwise as ``minilm``. Returns (N,) nats.

    Source: Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers", arXiv:2012.15828,
    section 3 (48 or 64 relation heads; the student's last layer, and for a large teacher an upper middle one).

    >>> one = torch.ones(1, 3, 24)
    >>> minilm_v2(one, one, torch.tensor([[1, 1, 0]]), heads=4)
    tensor([0.])
    """
    both = zip(_projections(student, heads), _projections(teacher, heads), strict=True)
    return torch.stack([_divergence((s, s), (t, t), mask) for s, t in both]).sum(0)


def _projections(x: Tensor, heads: int) -> list[Tensor]:
    """(N, T, 3 D) -> queries, keys and values, each (N, heads, T, D / heads)."""
    return [split_heads(part, heads) for part in raised(x).chunk(3, -1)]


def _scores(a: Tensor, b: Tensor) -> Tensor:
    scores: Tensor = a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5
    return scores


def _divergence(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """(N,): KL of the relations of two (N, heads, T, d) each, mean over heads and over the tokens that are no padding."""
    q, p = _relation(*student, mask), _relation(*teacher, mask).detach()
    real = mask != 0
    return kl(p, q).mean(1).masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)


def _relation(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """(N, heads, T, T) log-probabilities: of each query, over the valid keys."""
    padded = (mask == 0)[:, None, None, :]
    nobody = padded.all(-1, keepdim=True)  # a sample of padding alone: whatever, but finite
    return F.log_softmax(_scores(a, b).masked_fill(padded & ~nobody, -torch.inf), dim=-1)
