"""The recipes of papers, as ``limbeck recipes`` and docs/published.md show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from limbeck.published import METHODS, PAIRS, Pair, published

__all__ = ["COLUMNS", "page", "rows", "text"]

COLUMNS = ("pair", "teacher", "student", "methods, with the top-1 accuracy that was reported, %")


def rows() -> list[tuple[str, str, str, str]]:
    """One a pair."""
    return [
        (
            key,
            _figure(pair, "teacher"),
            _figure(pair, "student"),
            ", ".join(_with(pair, method) for method in pair.methods),
        )
        for key, pair in PAIRS.items()
    ]


def text(name: str) -> str:
    """The file of a recipe. Raises UsageError where there is none of that name."""
    recipe = published(name)
    key, _, method = name.partition("/")
    pair = PAIRS[key]
    told = [
        f"{role} {pair.figures[at]:.2f}"
        for role, at in (("teacher", "teacher"), ("student alone", "student"), (method, method))
        if at in pair.figures
    ]
    if "reported" in pair.figures:
        told.append(f"student as published {pair.figures['reported']:.1f}")
    lines = [f"# {pair.title}: {pair.models[0]} -> {pair.models[1]}, {method}.", f"# {pair.source}."]
    if told:
        lines.append(f"# Reported accuracy, %: {', '.join(told)}.")
    return "\n".join([*lines, *_lines(recipe)]) + "\n"


def _lines(value: Any, indent: str = "") -> list[str]:
    """YAML with what fits on a line on one line."""
    found: list[str] = []
    for key, part in value.items() if isinstance(value, dict) else (("-", part) for part in value):
        head = f"{indent}{key} " if key == "-" else f"{indent}{key}: "
        line = head + _flow(part)
        below = isinstance(part, list) and any(isinstance(x, dict) for x in part)
        if not isinstance(part, dict | list) or (not below and len(line) <= 120):
            found.append(line)
        elif key == "-":
            first, *rest = _lines(part, indent + "  ")
            found += [f"{indent}- {first.strip()}", *rest]
        else:
            found += [f"{indent}{key}:", *_lines(part, indent + "  ")]
    return found


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _flow(value: Any) -> str:
    """On one line, as YAML 1.2 and PyYAML read it alike."""
    text = str(yaml.dump(value, Dumper=_Plain, default_flow_style=True, sort_keys=False, width=float("inf")))
    return text.removesuffix("...\n").rstrip("\n")


def _figure(pair: Pair, at: str) -> str:
    return f"{pair.figures[at]:.2f}" if at in pair.figures else ""


def _with(pair: Pair, method: str) -> str:
    return f"{method} {pair.figures[method]:.2f}" if method in pair.figures else method


def page() -> str:
    """docs/published.md."""
    parts = [_HEAD]
    for title, wanted in (("CIFAR-100", "CIFAR-100"), ("ImageNet", "ImageNet")):
        pairs = {key: pair for key, pair in PAIRS.items() if pair.title == wanted}
        found = [m for m in METHODS if any(m in pair.methods for pair in pairs.values())]
        with_figures = [m for m in found if any(m in pair.figures for pair in pairs.values())]
        parts.append(f"## {title}\n\nTop-1 accuracy as reported, %. {_sources(pairs)}\n")
        parts.append(
            _table(
                ("pair", "teacher", "student", *with_figures),
                [(f"`{k}`", *(_figure(p, m) for m in ("teacher", "student", *with_figures))) for k, p in pairs.items()],
            )
        )
        bare = [m for m in found if m not in with_figures]
        if bare:
            parts.append(f"Also there, without a figure of their papers for these pairs: {', '.join(f'`{m}`' for m in bare)}.\n")
    glue = {key: pair for key, pair in PAIRS.items() if pair.title.startswith("GLUE")}
    parts.append(
        f"## GLUE\n\nAccuracy on the development set as reported, %, of the teacher and of the student after plain fine-tuning. {_sources(glue)}\n"
    )
    lines = [(f"`{k}`", _figure(p, "teacher"), _figure(p, "reported"), ", ".join(p.methods)) for k, p in glue.items()]
    parts.append(_table(("pair", "teacher", "student", "methods"), lines))
    return "\n".join(parts)


def _sources(pairs: dict[str, Pair]) -> str:
    return "Sources: " + "; ".join(dict.fromkeys(pair.source for pair in pairs.values())) + "."


def _table(head: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines)) + "\n"


_HEAD = """# Recipes of papers

A recipe PAIR/METHOD is one row of a table in a paper. One command trains the teacher (where its weights are not published with a library),
the student and the student without the teacher, and ends with the figures beside each other:

```sh
limbeck distill cifar100-resnet32x4-resnet8x4/dkd --data npz:cifar100.npz --seeds 3
```

`limbeck recipes PAIR/METHOD` prints it as a file, `limbeck recipes --published` lists them. With a teacher that is trained already:
`--teacher run:DIR`, and `--set teacher.train=null`. Every step asks the teacher for a view of its own, as in the papers; `--set
teacher_cache.views=16` pays for 16 views once ([teacher-cache.md](teacher-cache.md)). Nothing on this page was measured with Limbeck: no
machine with the data and a GPU was at hand. What the tests hold is that every method and every model trains on data of the right shape.

**What cannot be the same.** The papers report the best or the last epoch on the test split. Here some training rows are kept for validation
(2 %, of ImageNet 1 %), the last epoch is reported, and test rows are seen once. Their ImageNet figures are of the validation split, which
is `test/` or `val/` here.

**The data.** CIFAR-100 as an `npz`: `train_x, train_y, test_x, test_y`.

```python
import numpy as np
from torchvision.datasets import CIFAR100

train, test = (CIFAR100("data", train=part, download=True) for part in (True, False))
np.savez("cifar100.npz", train_x=train.data, train_y=train.targets, test_x=test.data, test_y=test.targets)
```

ImageNet as folders: `imagenet/train/CLASS/*.JPEG`, `imagenet/val/CLASS/*.JPEG`. A GLUE task as JSON Lines:

```python
from datasets import load_dataset

task = load_dataset("nyu-mll/glue", "sst2")
for part, name in (("train", "train"), ("validation", "dev")):
    task[part].remove_columns("idx").to_json(f"glue/sst2/{name}.jsonl")
```

**The models** `cifar:NAME` are the papers' networks for 32 x 32 images, with the shapes and parameter names of RepDistiller, so that its
checkpoints load: `limbeck convert ckpt_epoch_240.pth teacher.safetensors --key model`, then `--teacher cifar:resnet32x4 --set
teacher.weights=teacher.safetensors --set teacher.train=null`.
"""
