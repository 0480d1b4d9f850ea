"""Recipes of papers: every method on every pair of models that its paper, or the code that later papers compare with, reports.

A name is PAIR/METHOD (``cifar100-resnet32x4-resnet8x4/dkd``); ``figures`` are what was reported, in percent. A recipe says what the paper's own code
does. What it cannot have the same: the papers choose the best epoch on the test split, or report the last; here a fiftieth of the training rows
(ImageNet: a hundredth) is kept for validation, and the last epoch is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from limbeck.errors import Problem, UsageError, nearest

__all__ = ["METHODS", "PAIRS", "Pair", "is_published", "names", "published"]

Terms = list[dict[str, Any]]
Figures = Mapping[str, float]
"""By method, and ``teacher`` and ``student`` (trained without the teacher): top-1 accuracy in percent."""

CE: dict[str, Any] = {"loss": "cross_entropy", "weight": 1.0}

# -- layers ---------------------------------------------------------------------------------------------------------------------

_STAGES: dict[str, tuple[str, ...]] = {
    "resnet": ("layer1", "layer2", "layer3"),
    "large": ("layer1", "layer2", "layer3", "layer4"),
    "wrn": ("block1", "block2", "block3"),
    "vgg": ("relu1", "relu2", "relu3", "relu4"),
    "mobilenet": ("blocks.1", "blocks.2", "blocks.4", "blocks.6"),
    "shufflenet": ("layer1", "layer2", "layer3"),
}


def _stages(model: str) -> tuple[str, ...]:
    if model in ("resnet18", "resnet34", "resnet50"):
        return _STAGES["large"]
    return next(stages for family, stages in _STAGES.items() if model.startswith(family))


def _embedding(model: str) -> str:
    """What the classifier reads."""
    return "pool4" if model.startswith("vgg") else "avgpool"


@dataclass(frozen=True)
class Pair:
    """models: names of teacher and student. base: the recipe without an objective. layers: by kind, those of (student, teacher) that losses compare.
    own: the terms of methods that differ from pair to pair."""

    title: str
    models: tuple[str, str]
    methods: tuple[str, ...]
    base: Mapping[str, Any]
    figures: Figures
    source: str
    layers: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    own: Mapping[str, Terms] = field(default_factory=dict)


# -- methods --------------------------------------------------------------------------------------------------------------------


def _of_layers(loss: str, kind: str, **more: Any) -> Callable[[Pair], Terms]:
    """As RepDistiller runs a loss of layers: at the authors' weight beside cross entropy, without kd."""

    def terms(pair: Pair) -> Terms:
        ours, theirs = pair.layers[kind]
        return [{"loss": loss, "weight": "paper", "student": ours, "teacher": theirs, **more}, CE]

    return terms


def _plain(*terms: dict[str, Any]) -> Callable[[Pair], Terms]:
    return lambda pair: [dict(term) for term in terms]


def _dkd(beta: float, temperature: float, until: float) -> Terms:
    """The authors raise its weight over the first epochs (``until`` of all), epoch by epoch; here step by step."""
    weight = {"start": 0.0, "end": 1.0, "until": until}
    return [{"loss": "dkd", "weight": weight, "alpha": 1.0, "beta": beta, "temperature": temperature}, CE]


def _review(pair: Pair) -> Terms:
    """The authors weigh it by 0.6 to 8, pair by pair, and raise the weight over 20 epochs; here it goes to 1."""
    ours, theirs = pair.layers["all"]
    weight = {"start": 0.0, "end": 1.0, "until": 0.0833}
    return [{"loss": "review", "weight": weight, "student": ours, "teacher": theirs}, CE]


def _rkd(pair: Pair) -> Terms:
    ours, theirs = pair.layers["embedding"]
    return [{"loss": loss, "weight": "paper", "student": ours, "teacher": theirs} for loss in ("rkd_distance", "rkd_angle")] + [CE]


def _triple(pair: Pair) -> Terms:
    """DistilBERT's three, with the labels of the task in place of masked words."""
    ours, theirs = pair.layers["last"]
    return [
        {"loss": "kd", "weight": 5.0, "temperature": 2.0},
        {"loss": "cosine", "weight": 1.0, "student": ours, "teacher": theirs, "projector": "none"},
        {**CE, "weight": 2.0},
    ]


def _patient(pair: Pair) -> Terms:
    ours, theirs = pair.layers["states"]
    last = {"student": ours[:-1], "teacher": theirs[:-1]}  # the paper leaves out the last layer
    return [{"loss": "patient", "weight": 100.0, **last}, {"loss": "kd", "weight": 0.7, "temperature": 10.0}, {**CE, "weight": 0.3}]


def _minilm(loss: str) -> Callable[[Pair], Terms]:
    def terms(pair: Pair) -> Terms:
        ours, theirs = pair.layers["last"]
        return [{"loss": loss, "weight": 1.0, "student": ours, "teacher": theirs, "heads": 12 if loss == "minilm" else 48}, CE]

    return terms


METHODS: dict[str, Callable[[Pair], Terms]] = {
    "kd": _plain({"loss": "kd", "weight": 0.9, "temperature": 4.0}, {**CE, "weight": 0.1}),
    "hint": _of_layers("hint", "second", projector="convreg"),
    "attention_transfer": _of_layers("attention_transfer", "stages"),
    "similarity_preserving": _of_layers("similarity_preserving", "last"),
    "correlation": _of_layers("correlation", "embedding"),
    "vid": _of_layers("vid", "stages"),
    "rkd": _rkd,
    "pkt": _of_layers("pkt", "embedding"),
    "nst": _of_layers("nst", "stages"),
    "crd": _of_layers("crd", "embedding"),
    "review": _review,
    "dkd": lambda pair: _dkd(8.0, 4.0, 0.0833),
    "dist": _plain({"loss": "dist", "weight": 1.0, "beta": 2.0, "gamma": 2.0, "temperature": 4.0}, CE),
    "wsld": _plain({"loss": "wsld", "weight": "paper", "temperature": 2.0}, CE),
    "nkd": _plain({"loss": "nkd", "weight": 1.0, "gamma": 1.5, "temperature": 1.0}, CE),
    "kd-standardised": _plain({"loss": "kd", "weight": 9.0, "temperature": 2.0, "standardize": True}, {**CE, "weight": 0.1}),
    "mse_logits": _plain({"loss": "mse_logits", "weight": "paper"}, {**CE, "weight": 0.1}),
    "triple": _triple,
    "patient": _patient,
    "tinybert": lambda pair: [],  # two stages, each with terms of its own
    "minilm": _minilm("minilm"),
    "minilm_v2": _minilm("minilm_v2"),
}
"""How each method is run on a pair."""

# -- CIFAR-100 ------------------------------------------------------------------------------------------------------------------

_REPDISTILLER = "Tian et al. 2020 (CRD), arXiv 1910.10699, tables 1 and 2; dkd: Zhao et al. 2022, arXiv 2203.08679, and MDistiller"
_ORDER = (
    "teacher",
    "student",
    "kd",
    "hint",
    "attention_transfer",
    "similarity_preserving",
    "correlation",
    "vid",
    "rkd",
    "pkt",
    "nst",
    "crd",
)
# teacher, student, dkd's beta, the figures in that order, and dkd's
_CIFAR: tuple[tuple[str, str, float, tuple[float, ...], float | None], ...] = (
    ("wrn_40_2", "wrn_16_2", 6.0, (75.61, 73.26, 74.92, 73.58, 74.08, 73.83, 73.56, 74.11, 73.35, 74.54, 73.68, 75.48), 76.23),
    ("wrn_40_2", "wrn_40_1", 6.0, (75.61, 71.98, 73.54, 72.24, 72.77, 72.43, 72.21, 73.30, 72.22, 73.45, 72.24, 74.14), 74.81),
    ("resnet56", "resnet20", 2.0, (72.34, 69.06, 70.66, 69.21, 70.55, 69.67, 69.63, 70.38, 69.61, 70.34, 69.60, 71.16), 71.97),
    ("resnet110", "resnet20", 2.0, (74.31, 69.06, 70.67, 68.99, 70.22, 70.04, 69.48, 70.16, 69.25, 70.25, 69.53, 71.46), None),
    ("resnet110", "resnet32", 2.0, (74.31, 71.14, 73.08, 71.06, 72.31, 72.69, 71.48, 72.61, 71.82, 72.61, 71.96, 73.48), 74.11),
    ("resnet32x4", "resnet8x4", 8.0, (79.42, 72.50, 73.33, 73.50, 73.44, 72.94, 72.97, 73.09, 71.90, 73.64, 73.30, 75.51), 76.32),
    ("vgg13", "vgg8", 6.0, (74.64, 70.36, 72.98, 71.02, 71.43, 72.68, 70.71, 71.23, 71.48, 72.88, 71.53, 73.94), 74.68),
    ("vgg13", "mobilenet_v2", 6.0, (74.64, 64.60, 67.37, 64.14, 59.40, 66.30, 64.86, 65.56, 64.52, 67.13, 58.16, 69.73), 69.71),
    ("resnet50", "mobilenet_v2", 8.0, (79.34, 64.60, 67.35, 63.16, 58.58, 68.08, 65.43, 67.57, 64.43, 66.52, 64.96, 69.11), 70.35),
    ("resnet50", "vgg8", 8.0, (79.34, 70.36, 73.81, 70.69, 71.84, 73.34, 70.25, 70.30, 71.50, 73.01, 71.28, 74.30), None),
    ("resnet32x4", "shufflenet_v1", 8.0, (79.42, 70.50, 74.07, 73.59, 71.73, 73.48, 71.14, 73.38, 72.28, 74.10, 74.12, 75.11), 76.45),
    ("resnet32x4", "shufflenet_v2", 8.0, (79.42, 71.82, 74.45, 73.54, 72.73, 74.56, 71.29, 73.40, 73.21, 74.69, 74.68, 75.65), 77.07),
    ("wrn_40_2", "shufflenet_v1", 8.0, (75.61, 70.50, 74.83, 73.73, 73.32, 74.52, 71.38, 73.61, 72.21, 73.89, 74.89, 76.05), 76.70),
)
_ON_IMAGES = (*_ORDER[2:], "review", "dkd", "dist", "wsld", "nkd", "kd-standardised", "mse_logits")


def _cifar(teacher: str, student: str, beta: float, figures: tuple[float, ...], dkd: float | None) -> Pair:
    ours, theirs = _stages(student), _stages(teacher)
    count = min(len(ours), len(theirs))
    small = student.startswith(("mobilenet", "shufflenet"))
    base = {
        "task": "image-classification",
        "teacher": {"model": f"cifar:{teacher}", "train": {"epochs": 240, "lr": 0.05}},
        "student": {"model": f"cifar:{student}"},
        "data": {"source": "npz:cifar100.npz", "valid_fraction": 0.02, "augment": {"crop": 4, "flip": True}},
        "train": {
            "epochs": 240,
            "batch_size": 64,
            "optimizer": "sgd",
            "lr": 0.01 if small else 0.05,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 5e-4,
            "schedule": "step",
            "milestones": [0.625, 0.75, 0.875],
            "warmup": 0.0,
            "clip_norm": None,
            "precision": "float32",
        },
        "teacher_cache": {"views": "live"},
    }
    layers = {
        "all": ([*ours[:count], _embedding(student)], [*theirs[:count], _embedding(teacher)]),
        "stages": (list(ours[:count]), list(theirs[:count])),
        "second": (ours[1], theirs[1]),
        "last": (ours[-1], theirs[-1]),
        "embedding": (_embedding(student), _embedding(teacher)),
    }
    known = dict(zip(_ORDER, figures, strict=True)) | ({} if dkd is None else {"dkd": dkd})
    return Pair(
        "CIFAR-100",
        (f"cifar:{teacher}", f"cifar:{student}"),
        _ON_IMAGES,
        base,
        known,
        _REPDISTILLER,
        layers,
        {"dkd": _dkd(beta, 4.0, 0.0833)},
    )


# -- ImageNet -------------------------------------------------------------------------------------------------------------------


def _imagenet(teacher: str, student: str, figures: Figures, layers: Mapping[str, tuple[Any, Any]], *further: str) -> Pair:
    base = {
        "task": "image-classification",
        "teacher": {"model": teacher},
        "student": {"model": student, "options": {"resolution": 224}},
        "data": {"source": "imagefolder:imagenet", "valid_fraction": 0.01, "augment": {"resized_crop": [0.08, 1.0], "flip": True}},
        "train": {
            "epochs": 100,
            "batch_size": 512,
            "optimizer": "sgd",
            "lr": 0.2,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 1e-4,
            "schedule": "step",
            "milestones": [0.3, 0.6, 0.9],
            "warmup": 0.0,
            "clip_norm": None,
            "precision": "float32",
        },
        "teacher_cache": {"views": "live"},
    }
    source = (
        "Zhao et al. 2022, arXiv 2203.08679, and their MDistiller; dist: Huang et al. 2022, arXiv 2205.10536; the others: their authors"
    )
    own = {"kd": [{"loss": "kd", "weight": 0.5, "temperature": 1.0}, {**CE, "weight": 0.5}], "dkd": _dkd(0.5, 1.0, 0.01)}
    return Pair("ImageNet", (teacher, student), ("kd", "dkd", "dist", *further), base, figures, source, layers, own)


_RESNETS = {"stages": ([f"layer{i}" for i in range(1, 5)],) * 2, "embedding": ("avgpool", "global_pool")}

# -- GLUE -----------------------------------------------------------------------------------------------------------------------

_TASKS = {
    "sst2": ("sentence", None),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
}
_MINILM = "Wang et al. 2020 (MiniLM), arXiv 2002.10957, and its repository; the student was distilled beforehand, on unlabelled texts"
_DISTILBERT = "Sanh et al. 2019 (DistilBERT), arXiv 1910.01108, table 1; the student was distilled beforehand, on unlabelled texts"
_TINYBERT = "Jiao et al. 2020 (TinyBERT), arXiv 1909.10351; its figures are those of the test server, so none is shown"
_GLUE: dict[str, tuple[str, str, int, tuple[str, ...], str, dict[str, tuple[float, float]]]] = {
    # student: its name, the stack of its layers, how many there are, methods, source, (teacher, student) by task
    "distilbert": (
        "distilbert",
        "distilbert.transformer.layer",
        6,
        ("kd", "triple", "patient"),
        _DISTILBERT,
        {"sst2": (92.7, 91.3), "qnli": (91.8, 89.2), "rte": (69.3, 59.9), "mnli": (86.7, 82.2)},
    ),
    "minilm": (
        "hf:nreimers/MiniLM-L6-H384-uncased",
        "bert.encoder.layer",
        6,
        ("kd", "minilm", "minilm_v2"),
        _MINILM,
        {"sst2": (93.2, 91.5), "qnli": (91.7, 90.5), "rte": (68.6, 68.8), "mnli": (84.5, 83.3)},
    ),
    "tinybert": ("hf:huawei-noah/TinyBERT_General_6L_768D", "bert.encoder.layer", 6, ("kd", "tinybert"), _TINYBERT, {}),
}


def _glue(task: str, which: str) -> Pair:
    student, stack, count, methods, source, reported = _GLUE[which]
    text, pair = _TASKS[task]
    ours = [f"{stack}.{i}" for i in range(count)]
    theirs = [f"bert.encoder.layer.{(i + 1) * 12 // count - 1}" for i in range(count)]
    base = {
        "task": "text-classification",
        "teacher": {"model": "bert-base", "train": {"epochs": 3, "lr": 3e-5}},
        "student": {"model": student},
        "data": {
            "source": f"jsonl:glue/{task}/train.jsonl",
            "test": f"glue/{task}/dev.jsonl",
            "valid_fraction": 0.02,
            "text": text,
            **({} if pair is None else {"text_pair": pair}),
            "max_length": 128,
        },
        "train": {
            "epochs": 3,
            "batch_size": 32,
            "optimizer": "adamw",
            "lr": 3e-5,
            "weight_decay": 0.01,
            "schedule": "linear",
            "warmup": 0.1,
            "precision": "float32",
        },
    }
    figures = dict(zip(("teacher", "reported"), reported[task], strict=True)) if task in reported else {}
    layers = {"states": (ours, theirs), "last": (ours[-1], theirs[-1])}
    return Pair(f"GLUE {task}", ("bert-base", student), methods, base, figures, source, layers)


def _tinybert(pair: Pair, recipe: dict[str, Any]) -> None:
    """Layers first, then the answers (section 4.1 of the paper: 20 epochs and 3)."""
    ours, theirs = pair.layers["states"]
    inside = [
        {"loss": "hint", "weight": 1.0, "student": ours, "teacher": theirs, "projector": "linear"},
        {"loss": "tinybert_attention", "weight": 1.0, "student": ours, "teacher": theirs, "heads": 12},
    ]
    answers = [{"loss": "kd", "weight": 1.0, "temperature": 1.0}]
    del recipe["objective"]
    recipe["train"] = {key: value for key, value in recipe["train"].items() if key not in ("epochs", "lr")}
    recipe["train"]["stages"] = [{"epochs": 20, "lr": 5e-5, "objective": inside}, {"epochs": 3, "lr": 3e-5, "objective": answers}]


PAIRS: dict[str, Pair] = {
    **{f"cifar100-{row[0]}-{row[1]}": _cifar(*row) for row in _CIFAR},
    "imagenet-resnet34-resnet18": _imagenet(
        "timm:resnet34.tv_in1k",
        "torchvision:resnet18",
        {"teacher": 73.31, "student": 69.76, "kd": 71.03, "attention_transfer": 70.70, "crd": 71.17, "dkd": 71.70, "dist": 72.07},
        _RESNETS,
        "attention_transfer",
        "crd",
    ),
    "imagenet-resnet50-mobilenet_v1": _imagenet(
        "timm:resnet50.tv_in1k",
        "timm:mobilenetv1_100",
        {"teacher": 76.16, "student": 70.13, "kd": 70.50, "dkd": 72.05, "dist": 73.24},
        {},
    ),
    **{f"glue-{task}-bert-{which}": _glue(task, which) for which in _GLUE for task in _TASKS},
}


def names() -> list[str]:
    """PAIR/METHOD of all of them."""
    return [f"{key}/{method}" for key, pair in PAIRS.items() for method in pair.methods]


def is_published(name: str) -> bool:
    return name in set(names())


def published(name: str) -> dict[str, Any]:
    """The recipe PAIR/METHOD, as a file would hold it: plain values.

    Raises: UsageError where there is none of that name.
    """
    key, _, method = name.partition("/")
    if not is_published(name):
        known = names()
        raise UsageError(Problem("", f"there is no recipe '{name}'; see `limbeck recipes --published`.", nearest(name, known)))
    pair = PAIRS[key]
    recipe = {k: dict(v) if isinstance(v, Mapping) else v for k, v in pair.base.items()}
    recipe["objective"] = pair.own[method] if method in pair.own else METHODS[method](pair)
    if method == "tinybert":
        _tinybert(pair, recipe)
    return recipe
