"""What is compared: pairs of teacher and student on real data, and the methods, each with the weights that validation chooses from.

Every method has cross entropy at weight 1. A loss of logits takes the place of kd. A loss of layers is added to kd (weight 1, T = 4), which is the
question that a person has: what does it add to what costs nothing? Its weights are a tenth, once and ten times the published one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.losses import LOSSES

__all__ = ["TRACKS", "Method", "Track", "methods_of"]

KD: dict[str, Any] = {"loss": "kd", "weight": 1.0, "temperature": 4.0}
CE: dict[str, Any] = {"loss": "cross_entropy", "weight": 1.0}


@dataclass(frozen=True)
class Method:
    """``term`` is the loss whose weight is chosen from ``weights``; ``beside`` are the other terms."""

    term: Mapping[str, Any]
    weights: tuple[float, ...]
    beside: tuple[Mapping[str, Any], ...]

    @property
    def objective(self) -> list[dict[str, Any]]:
        return [{**self.term, "weight": self.weights[0]}, *map(dict, self.beside)]


@dataclass(frozen=True)
class Track:
    """``pair``: tracks that have it in common have one teacher; ``teacher``: the recipe that trains it. ``needs``: what fetch.py fetches.
    ``layers``: by kind of loss, the layers of (student, teacher) that it compares. timed: the steps that are timed at once."""

    title: str
    pair: str
    needs: tuple[str, ...]
    teacher: Mapping[str, Any]
    recipe: Mapping[str, Any]
    layers: Mapping[str, tuple[Any, Any]]
    methods: tuple[str, ...]
    timed: int = 20


def _logits(loss: str, *weights: float, **parameters: Any) -> Method:
    return Method({"loss": loss, **parameters}, weights, (CE,))


def _layers(loss: str, layers: tuple[Any, Any], **parameters: Any) -> Method:
    published = LOSSES[loss].weight
    term = {"loss": loss, "student": layers[0], "teacher": layers[1], **parameters}
    return Method(term, (published / 10, published, 10 * published), (KD, CE))


_LOGITS = {
    "kd": _logits("kd", 0.5, 1.0, 4.0, temperature=4.0),
    "kd, standardised": _logits("kd", 1.0, 4.0, 9.0, temperature=2.0, standardize=True),
    "dkd": _logits("dkd", 0.25, 1.0, 4.0),
    "dist": _logits("dist", 0.5, 2.0, 4.0),
    "nkd": _logits("nkd", 0.5, 1.0, 4.0),
    "mse_logits": _logits("mse_logits", 0.1, 1.0, 10.0),
    "jsd": _logits("jsd", 1.0, 4.0, 16.0),
}
_OF_LAYERS = {
    "hint": ("hint", "stages"),
    "attention_transfer": ("attention_transfer", "stages"),
    "similarity_preserving": ("similarity_preserving", "stages"),
    "vid": ("vid", "stages"),
    "nst": ("nst", "last"),
    "rkd_distance": ("rkd_distance", "last"),
    "pkt": ("pkt", "last"),
    "cka": ("cka", "last"),
    "cosine": ("cosine", "states"),
    "hint (hidden states)": ("hint", "states"),
    "patient": ("patient", "states"),
    "tinybert_attention": ("tinybert_attention", "attention"),
    "minilm": ("minilm", "last attention"),
    "minilm_v2": ("minilm_v2", "last attention"),
}


_HEADS = {name: {"heads": 12} for name in ("tinybert_attention", "minilm", "minilm_v2")}  # of MiniLM


def methods_of(track: Track) -> dict[str, Method]:
    """The methods of a track, by the name that the tables show."""
    found = {}
    for name in track.methods:
        if name in _LOGITS:
            found[name] = _LOGITS[name]
        else:
            loss, kind = _OF_LAYERS[name]
            found[name] = _layers(loss, track.layers[kind], **_HEADS.get(loss, {}))
    return found


_IMAGES = {
    "task": "image-classification",
    "student": {"model": "python:MODELS/cifar.py:student"},
    "data": {"source": "npz:DATA/cifar10.npz", "train_limit": 10000, "augment": {"crop": 2, "flip": True}},
    "train": {
        "epochs": 30,
        "batch_size": 128,
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": "one_cycle",
        "warmup": 0.2,
        "clip_norm": 5.0,
        "precision": "bf16",
        "layout": "channels_last",
    },
    "teacher_cache": {"views": 8},
}
_CIFAR_TEACHER = {
    "task": "image-classification",
    "student": {"model": "python:MODELS/cifar.py:teacher"},
    "data": {"source": "npz:DATA/cifar10.npz", "augment": {"crop": 2, "flip": True}},
    "train": {
        "epochs": 6,
        "batch_size": 256,
        "optimizer": "sgd",
        "lr": 0.25,
        "weight_decay": 1e-3,
        "schedule": "one_cycle",
        "warmup": 0.2,
        "clip_norm": None,
        "precision": "bf16",
        "layout": "channels_last",
    },
}
_CIFAR_LAYERS = {"stages": (["features.2", "features.4"], ["stages.1", "stages.2"]), "last": ("features.4", "stages.2")}
_CIFAR_METHODS = (
    *("kd", "kd, standardised", "dkd", "dist", "nkd", "mse_logits"),
    *("hint", "attention_transfer", "similarity_preserving", "vid", "nst", "rkd_distance", "pkt", "cka"),
)


def _text(name: str, epochs: int, **limits: int) -> dict[str, Any]:
    return {
        "task": "text-classification",
        "student": {"model": "TEACHER", "options": {"layers": [0, 5]}},
        "data": {"source": f"csv:DATA/{name}.csv", "test": f"DATA/{name}-test.csv", "max_length": 64, **limits},
        "train": {
            "epochs": epochs,
            "batch_size": 32,
            "lr": 2e-4,
            "weight_decay": 0.01,
            "schedule": "linear",
            "warmup": 0.1,
            "precision": "bf16",
        },
        "teacher_cache": {"mode": "auto", "views": 1},
    }


def _text_teacher(name: str, epochs: int) -> dict[str, Any]:
    recipe = _text(name, epochs)
    del recipe["teacher_cache"]
    return {**recipe, "student": {"model": "hf:DATA/minilm-l6"}, "train": {**recipe["train"], "lr": 1e-4}}


_TEXT_LAYERS = {
    "states": (["bert.encoder.layer.0", "bert.encoder.layer.1"], ["bert.encoder.layer.2", "bert.encoder.layer.5"]),
    "attention": (["bert.encoder.layer.0", "bert.encoder.layer.1"], ["bert.encoder.layer.2", "bert.encoder.layer.5"]),
    "last attention": ("bert.encoder.layer.1", "bert.encoder.layer.5"),
    "last": ("bert.pooler", "bert.pooler"),
}
_TEXT_METHODS = (
    *("kd", "kd, standardised", "dkd", "dist", "mse_logits"),
    *("hint (hidden states)", "patient", "tinybert_attention", "minilm", "minilm_v2", "rkd_distance", "cka"),
)

TRACKS: dict[str, Track] = {
    "cifar10": Track(
        "CIFAR-10, 10,000 images, all of them labelled: a CNN of 2.0 M parameters into one of 0.1 M",
        "cifar10",
        ("cifar10",),
        _CIFAR_TEACHER,
        _IMAGES,
        _CIFAR_LAYERS,
        _CIFAR_METHODS,
    ),
    "cifar10-tenth": Track(
        "CIFAR-10, 10,000 images, a tenth of them labelled: the same pair",
        "cifar10",
        ("cifar10",),
        _CIFAR_TEACHER,
        {**_IMAGES, "data": {**_IMAGES["data"], "labelled_limit": 1000}},  # type: ignore[dict-item]
        _CIFAR_LAYERS,
        tuple(
            name for name in _CIFAR_METHODS if name not in ("dkd", "nkd")
        ),  # which need the label, and would teach by a tenth of the rows
    ),
    "r52": Track(
        "Reuters R52, 2,000 texts in 52 classes: MiniLM-L6, fine-tuned on 5,869, into two of its layers",
        "r52",
        ("r52", "minilm"),
        _text_teacher("r52", 4),
        _text("r52", 2, train_limit=2000),
        _TEXT_LAYERS,
        _TEXT_METHODS,
        timed=6,
    ),
    "20newsgroups": Track(
        "20 Newsgroups, 2,000 texts in 20 classes: MiniLM-L6, fine-tuned on all, into two of its layers",
        "20newsgroups",
        ("20newsgroups", "minilm"),
        _text_teacher("20newsgroups", 3),
        _text("20newsgroups", 2, train_limit=2000),
        _TEXT_LAYERS,
        _TEXT_METHODS,
        timed=6,
    ),
}
