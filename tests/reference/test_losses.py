"""Every reference case, one test each: value and gradient, in float64 and (where the inputs are exact) in float32.

The numbers are in ``data/`` here, or in the folder that the environment variable LIMBECK_REFERENCE names; ``data/README.md`` explains them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from limbeck.losses import LOSSES, Crd, minilm, minilm_v2, patient, tinybert_scores
from limbeck.losses.maps import hcl, partial_l2
from limbeck.objective import Objective
from limbeck.recipe import Term
from limbeck.types import Batch, Outputs, Signal

FOLDER = Path(os.environ.get("LIMBECK_REFERENCE") or Path(__file__).parent / "data")
CASES = json.loads((FOLDER / "losses.json").read_text())["cases"]

Case = dict[str, Any]
Inputs = dict[str, Tensor]
Made = tuple[Tensor, Inputs]
"""The loss as a scalar, and the tensors that stand for named inputs whose gradients are compared (projections' parameters)."""


@pytest.fixture(scope="module")
def tensors() -> Inputs:
    return load_file(FOLDER / "losses.safetensors")


def batch_of(size: int, labels: Tensor | None = None, mask: Tensor | None = None) -> Batch:
    student = {} if mask is None else {"attention_mask": mask}
    labels = torch.full((size,), -1) if labels is None else labels
    return Batch(np.zeros((size, 2), np.uint64), 0, student, None, labels, torch.ones(size, dtype=torch.bool))


RENAMED = {"tau": "temperature"}
IGNORED = ("reduction", "alpha_for_total", "iota", "kappa", "rows_per_micro_batch", "num_items_in_batch")
"""Parameters of cases that are not the loss's own: what is done around it, or how a peer's bug is asked for."""


def on_logits(name: str) -> Callable[[Case, Inputs], Made]:
    """The mean of a loss over items x classes, with labels where it reads them, and the case's parameters under our names."""

    def run(case: Case, given: Inputs) -> Made:
        values = {RENAMED.get(k, k): v for k, v in case["params"].items() if k not in IGNORED}
        tensors = [given[read.replace(".", "_")] for read in LOSSES[name].reads]
        return LOSSES[name].function(*tensors, **values).mean(), {}

    return run


def run_lskd(case: Case, given: Inputs) -> Made:
    name = "dkd" if case["variant"] == "dkd" else "kd"
    return on_logits(name)({**case, "params": {**case["params"], "standardize": True}}, given)


def of_tokens(case: Case, given: Inputs) -> tuple[Tensor, Tensor]:
    """(N, V) logits of student and teacher at the positions that count."""
    if "student_head" in given:
        student, teacher = (given[f"{side}_hidden"] @ given[f"{side}_head"].T for side in ("student", "teacher"))
        missing = teacher.shape[-1] - student.shape[-1]
        student = torch.nn.functional.pad(student, (0, missing), value=-math.inf)  # what the student does not have, it never says
    else:
        student, teacher = given["student_logits"], given["teacher_logits"]
    valid = given["labels"] != -100
    if "get_batch_logps(loss_type='kd')" in case["source"]:  # DistiLLM-2 shifts inside
        student, teacher, valid = student[:, :-1], teacher[:, :-1], valid[:, 1:]
    return student[valid], teacher[valid]


def run_divergence(case: Case, given: Inputs) -> Made:
    """fkl, rkl and jsd over tokens; a beta of 0 or 1 is one of the two by name."""
    student, teacher = of_tokens(case, given)
    values = {k: v for k, v in case["params"].items() if k not in IGNORED}
    beta = values.pop("beta", {"fkl": 0, "rkl": 1}.get(case["method"], 1e-3))  # the case of the ends gives its value at 1e-3
    name = {0: "fkl", 1: "rkl"}.get(beta, "jsd")
    each = LOSSES[name].function(student, teacher, **values, **({"beta": beta} if name == "jsd" else {}))
    return each.sum() / max(case["params"].get("num_items_in_batch", len(each)), 1), {}


def run_kd_mix(case: Case, given: Inputs) -> Made:
    alpha, student = case["params"]["alpha"], given["student_logits"]
    terms = [
        Term.model_validate({"loss": "kd", "weight": alpha, "temperature": case["params"]["temperature"]}),
        Term.model_validate({"loss": "cross_entropy", "weight": 1 - alpha}),
    ]
    classes = [str(c) for c in range(student.shape[1])]
    objective = Objective.build(terms, classes=classes, label_counts=[1] * len(classes))
    batch = batch_of(len(student), labels=given["labels"])
    return objective(Outputs(student), Signal(given["teacher_logits"]), batch, progress=0.0, counts=objective.counts(batch))[0], {}


def through_hint(student: Tensor, teacher: Tensor, projector: str, weights: Inputs, mask: Tensor | None = None) -> Made:
    term = Term.model_validate({"loss": "hint", "student": "s", "teacher": "t", "projector": projector})
    shapes = {"shapes_student": {"s": tuple(student.shape)}, "shapes_teacher": {"t": tuple(teacher.shape)}}
    objective = Objective.build([term], classes=(), label_counts=(), **shapes).to(student.dtype)
    parameters = {f"regressor.{name.split('projection.')[-1]}": p for name, p in objective.named_parameters()}
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, value in weights.items():
            assert parameters[name].shape == value.shape
            parameters[name].copy_(value)
    batch = batch_of(len(student), mask=mask)
    logits = torch.zeros(len(student), 2, dtype=student.dtype)
    counts = objective.counts(batch)
    loss, _ = objective(Outputs(logits, {"s": student}), Signal(None, {"t": teacher}), batch, progress=0.0, counts=counts)
    return loss, dict(parameters)


def run_fitnet(case: Case, given: Inputs) -> Made:
    if case["variant"] not in ("mse", "convreg") or not case["params"].get("use_relu", True):
        pytest.skip(f"not built: fitnet {case['variant']} {case['params']}")
    weights = {k: v for k, v in given.items() if k.startswith("regressor.")}
    return through_hint(given["student_feat"], given["teacher_feat"], "convreg" if weights else "none", weights)


def run_hidden_mse(case: Case, given: Inputs) -> Made:
    return through_hint(given["student_hidden"], given["teacher_hidden"], "none", {}, given.get("attention_mask"))


def scalar(name: str, student: Tensor, teacher: Tensor, weights: Inputs | None = None, **values: Any) -> Made:
    """The published scalar of a loss on one pair of features, and its parameters, set to these."""
    entry = LOSSES[name]
    if not entry.learned:
        return entry.function(student, teacher, **values).mean(), {}
    loss = entry.function(tuple(student.shape), tuple(teacher.shape), student="s", teacher="t", **values).to(student.dtype)
    parameters = dict(loss.named_parameters())
    given = weights or {}
    assert parameters.keys() == given.keys()
    with torch.no_grad():
        for key, value in given.items():
            assert parameters[key].shape == value.shape
            parameters[key].copy_(value)
    return loss(student, teacher).mean(), parameters


def on_features(name: str, **values: Any) -> Callable[[Case, Inputs], Made]:
    """One pair of features, or the sum over several."""

    def run(case: Case, given: Inputs) -> Made:
        parts = [suffix for suffix in ("", ".0", ".1", ".2", ".3") if f"student_feat{suffix}" in given]
        asked = {k: v for k, v in case["params"].items() if k in LOSSES[name].parameters}
        losses = [scalar(name, given[f"student_feat{p}"], given[f"teacher_feat{p}"], **{**asked, **values})[0] for p in parts]
        return torch.stack(losses).sum(), {}

    return run


def run_at(case: Case, given: Inputs) -> Made:
    return on_features("attention_transfer", form="paper" if case["variant"] == "paper" else "code")(case, given)


def run_rkd(case: Case, given: Inputs) -> Made:
    parts = [scalar(name, given["student_feat"], given["teacher_feat"])[0] for name in ("rkd_distance", "rkd_angle")]
    return case["params"]["w_d"] * parts[0] + case["params"]["w_a"] * parts[1], {}


def run_cc(case: Case, given: Inputs) -> Made:
    return scalar("correlation", given["student_feat"], given["teacher_feat"], embed=0)


def run_vid(case: Case, given: Inputs) -> Made:
    weights = {k.removeprefix("vid."): v for k, v in given.items() if k.startswith("vid.")}
    hidden = len(weights["regressor.0.weight"])
    loss, parameters = scalar("vid", given["student_feat"], given["teacher_feat"], weights, hidden=hidden)
    return loss, {f"vid.{k}": p for k, p in parameters.items()}


def run_ofd(case: Case, given: Inputs) -> Made:
    return partial_l2(given["student_feat"], given["teacher_feat"], given["margin"]).mean(), {}


def run_hidden_cosine(case: Case, given: Inputs) -> Made:
    valid = given["attention_mask"] != 0
    return scalar("cosine", given["student_hidden"][valid], given["teacher_hidden"][valid])


def run_logit_cosine(case: Case, given: Inputs) -> Made:
    return scalar("cosine", *of_tokens(case, given))


def run_hcl(case: Case, given: Inputs) -> Made:
    levels = [k.removeprefix("student_feat") for k in given if k.startswith("student_feat")]
    return torch.stack([hcl(given[f"student_feat{n}"], given[f"teacher_feat{n}"]).mean() for n in levels]).sum(), {}


def run_tinybert(case: Case, given: Inputs) -> Made:
    if case["variant"] == "prediction":  # averaged over classes too
        return run_mean_over_classes(case, given)
    layers, teachers = (sum(k.startswith(f"{side}_att") for k in given) for side in ("student", "teacher"))
    step = teachers // layers
    parts = [tinybert_scores(given[f"student_att.{i}"], given[f"teacher_att.{(i + 1) * step - 1}"]).mean() for i in range(layers)]
    projection = {k: x.requires_grad_() for k, x in given.items() if k.startswith("fit_dense")}
    for i in range(layers + 1 if projection else 0):
        student = torch.nn.functional.linear(given[f"student_hidden.{i}"], projection["fit_dense.weight"], projection["fit_dense.bias"])
        parts.append(scalar("hint", student, given[f"teacher_hidden.{i * step}"], projector="none")[0])
    return torch.stack(parts).sum(), projection


def run_mean_over_classes(case: Case, given: Inputs) -> Made:
    loss, made = on_logits("soft_cross_entropy")(case, given)
    return loss / given["student_logits"].shape[-1], made


def run_minilm(case: Case, given: Inputs) -> Made:
    def packed(side: str) -> Tensor:
        each = [given[f"{side}_{x}"] for x in "qkv"]
        return torch.cat([x.transpose(1, 2).flatten(2) if x.ndim == 4 else x for x in each], -1)

    mask = given["attention_mask"]
    if case["method"] == "minilm":
        values = minilm(packed("student"), packed("teacher"), mask, heads=given["student_q"].shape[1])
    else:
        values = minilm_v2(packed("student"), packed("teacher"), mask, heads=case["params"]["relation_heads"])
    if case["variant"].endswith("seqmean"):
        return values.mean(), {}
    lengths = (mask != 0).sum(1)
    return (values * lengths).sum() / lengths.sum(), {}


def run_patient(case: Case, given: Inputs) -> Made:
    student, teacher = (given[k].flatten(0, -2) for k in ("student_cls", "teacher_cls"))
    return patient(student, teacher, normalize="raw" not in case["variant"]).mean(), {}


def run_distilbert(case: Case, given: Inputs) -> Made:
    """kd over selected tokens, cross entropy with the language model's labels, and the cosine of attended hidden states."""
    weights, labels, attended = case["params"], given["labels"], given["attention_mask"] != 0
    student = given["student_logits"]
    chosen = labels > -1 if weights["restrict_ce_to_mask"] else attended
    parts = [weights["alpha_ce"] * on_logits("kd")({**case, "params": {"temperature": weights["temperature"]}}, picked(given, chosen))[0]]
    shifted = weights["alpha_clm"] > 0
    said, wanted_labels = (student[:, :-1], labels[:, 1:]) if shifted else (student, labels)
    known = wanted_labels != -100
    hard = LOSSES["cross_entropy"].function(said[known], wanted_labels[known]).mean()
    parts.append((weights["alpha_clm"] if shifted else weights["alpha_mlm"]) * hard)
    parts.append(weights["alpha_cos"] * scalar("cosine", given["student_hidden"][attended], given["teacher_hidden"][attended])[0])
    return torch.stack(parts).sum(), {}


def picked(given: Inputs, chosen: Tensor) -> Inputs:
    return {k: given[k][chosen] for k in ("student_logits", "teacher_logits")}


def run_crd(case: Case, given: Inputs) -> Made:
    """One step with the authors' draws; the memory behind it too."""
    params = case["params"]
    student, teacher = given["student_feat"], given["teacher_feat"]
    how = {"dim": params["feat_dim"], "negatives": params["nce_k"], "temperature": params["nce_t"], "momentum": params["nce_m"]}
    loss = Crd(tuple(student.shape), tuple(teacher.shape), params["n_data"], student="a", teacher="b", **how).to(student.dtype)
    with torch.no_grad():
        for side in ("student", "teacher"):
            linear = getattr(loss, f"embed_{side}")
            linear.weight.copy_(given[f"embed_{side[0]}.linear.weight"])
            linear.bias.copy_(given[f"embed_{side[0]}.linear.bias"])
            getattr(loss, f"of_{side}").copy_(given[f"memory_{side}"])
        loss.scale.copy_(torch.tensor(params["Z"], dtype=torch.float64))
    assert torch.equal(given["contrast_index"][:, 0], given["index"])
    value = loss(student, teacher, given["contrast_index"]).mean()
    loss.stepped()
    AFTER[case["id"]] = {f"memory_{side}_after": getattr(loss, f"of_{side}") for side in ("student", "teacher")}
    for at, side in enumerate(("student", "teacher")):
        assert float(loss.scale[at]) == pytest.approx(case["expected"][f"Z_{side}"], rel=1e-9 if student.dtype == torch.float64 else 1e-5)
    named = {
        f"embed_{side[0]}.linear.{what}": getattr(getattr(loss, f"embed_{side}"), what)
        for side in ("student", "teacher")
        for what in ("weight", "bias")
    }
    return value, named


AFTER: dict[str, dict[str, Tensor]] = {}
"""What a case leaves in the memory."""

BUILT: dict[str, Callable[[Case, Inputs], Made]] = {
    "kd": on_logits("kd"),
    "kd_mix": run_kd_mix,
    "soft_ce": on_logits("soft_cross_entropy"),
    "dkd": on_logits("dkd"),
    "dist": on_logits("dist"),
    "lskd": run_lskd,
    "wsld": on_logits("wsld"),
    "nkd": on_logits("nkd"),
    "fkl": run_divergence,
    "rkl": run_divergence,
    "jsd": run_divergence,
    "fitnet": run_fitnet,
    "at": run_at,
    "sp": on_features("similarity_preserving"),
    "rkd": run_rkd,
    "pkt": on_features("pkt"),
    "cc": run_cc,
    "vid": run_vid,
    "nst": on_features("nst"),
    "ofd": run_ofd,
    "cka": on_features("cka"),
    "reviewkd": run_hcl,
    "crd": run_crd,
    "tinybert": run_tinybert,
    "minilm": run_minilm,
    "minilmv2": run_minilm,
    "patientkd": run_patient,
    "distilbert": run_distilbert,
    "hidden_cosine": run_hidden_cosine,
    "logit_cosine": run_logit_cosine,
    "hidden_mse": run_hidden_mse,
}


OFFERED = {("at", "paper")}
"""Variants of peers that are ours by name."""

ACCIDENT = 1e4
"""An edge case's stored gradient beyond this is an accident of the published code (a zero divided by its epsilon): ours need only be smaller."""


def number(x: Any) -> float | None:
    return float(x) if isinstance(x, int | float | str) else None


def wanted(case: Case) -> tuple[float | None, bool]:
    """The value to hold (None: any finite one), and whether the stored gradient belongs to it."""
    expected = case["expected"]
    if (case["method"], case["variant"]) in OFFERED:
        return number(expected["loss"]), True
    if case["role"] in ("do-not-match", "peer-variant"):
        return next((number(v) for k, v in expected.items() if k.startswith("correct")), None), False
    value = number(expected.get("loss"))
    if value is None or not math.isfinite(value):
        value = next((number(v) for k, v in expected.items() if k.startswith(("correct", "loss_over", "loss_logsumexp"))), None)
    return value, True


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Largest difference within tolerance times the largest magnitude; absolute where that is about 0."""
    size = float(want.abs().max()) if want.numel() else 0.0
    allowed = tolerance if size < 10 * tolerance else tolerance * size
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert float((got.double() - want.double()).abs().max()) <= allowed


@pytest.mark.parametrize("case", CASES, ids=[c["id"] for c in CASES])
def test_reference(case: Case, tensors: Inputs) -> None:
    method, role = case["method"], case["role"]
    if method not in BUILT:
        pytest.skip(f"not built: {method}")
    value, has_gradient = wanted(case)
    if role == "peer-variant" and value is None:
        pytest.skip(f"not built: {method} ({case['variant']})")
    # Where inputs are not exact in float32 the README gives no float32 value to hold.
    settings = [(torch.float64, 1e-9)] + ([(torch.float32, 1e-5)] if case.get("inputs_exact_in_float32") else [])
    for dtype, tolerance in settings:
        given = {n: tensors[f"{case['id']}/{n}"] for n in case["tensors"]}
        given = {n: x.to(dtype) if x.is_floating_point() else x for n, x in given.items()}
        leaves = {n: x.requires_grad_() for n, x in given.items() if n.startswith("student")}
        loss, made = BUILT[method](case, given)
        assert torch.isfinite(loss)
        if value is not None:
            close(loss.detach(), torch.tensor(value, dtype=torch.float64), tolerance)
        names = case["grads"] if has_gradient else list(leaves)
        gradients = torch.autograd.grad(loss, [{**leaves, **made}[n] for n in names])
        for name, gradient in zip(names, gradients, strict=True):
            assert torch.isfinite(gradient).all()
            stored = tensors.get(f"{case['id']}/grad/{name}") if has_gradient else None
            if stored is None or not torch.isfinite(stored).all():
                continue
            if role == "edge" and float(stored.abs().max()) > ACCIDENT:
                assert float(gradient.abs().max()) <= 1.01 * float(stored.abs().max())
            else:
                close(gradient, stored, tolerance)
        for name, found in AFTER.pop(case["id"], {}).items():
            close(found, tensors[f"{case['id']}/expected/{name}"], tolerance)
