# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Look inside a run
#
# Which temperature, which alpha? How sure are teacher and student, and are they right to be? This notebook makes a small sweep and looks at it.

# %%
import subprocess
import sys
from pathlib import Path

import torch

import limbeck
from limbeck import plots

work = Path("runs/notebook-inside")
work.mkdir(parents=True, exist_ok=True)
(work / "models.py").write_text(
    """
from torch import nn


def net(width, classes):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(8 * width, classes),
    )


def teacher(num_classes=10):
    return net(48, num_classes)


def student(num_classes=10):
    return net(4, num_classes)
"""
)
(work / "teacher.yaml").write_text("""
task: image-classification
student: {model: "python:models.py:teacher"}
data: {source: digits}
train: {epochs: 15, lr: 3.0e-3, precision: float32, workers: 0}
export: []
""")
(work / "student.yaml").write_text("""
task: image-classification
teacher: {model: "run:teacher"}
student: {model: "python:models.py:student"}
data: {source: digits, labelled_limit: 100}
objective:
  - {loss: kd, weight: 0.7, temperature: 4.0}
  - {loss: cross_entropy, weight: 0.3}
train: {epochs: 12, lr: 1.0e-2, precision: float32, workers: 0}
teacher_cache: {views: 1}
export: []
""")


def run(*arguments):
    """The command line, as in a terminal."""
    done = subprocess.run([sys.executable, "-m", "limbeck", *map(str, arguments)], capture_output=True, text=True)
    print(done.stdout or done.stderr)
    done.check_returncode()


# %%
if not (work / "teacher/metrics.json").exists():
    run("train", work / "teacher.yaml", "--out", work / "teacher")
if not (work / "sweep/report.html").exists():
    run("sweep", work / "student.yaml", "--vary", "temp=1,2,4,8", "--vary", "alpha=0.3,0.6,0.9", "--out", work / "sweep")

# %% [markdown]
# Temperature and alpha side by side, by validation accuracy, which chooses. All combinations learned from one pass of the teacher.

# %%
plots.sweep(work / "sweep")

# %% [markdown]
# Loss, its terms, and validation over the training of the best combination, beside its baseline.

# %%
best = work / "sweep"
plots.losses(best)

# %% [markdown]
# ## Soft labels
#
# What the teacher says of single samples is more than a label: a 3 that could be an 8 is worth something to the student. A temperature makes the
# small probabilities visible; the star marks the true class.

# %%
from sklearn.datasets import load_digits  # noqa: E402

x, y = load_digits(return_X_y=True)
images = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8)
teacher, student = limbeck.load(work / "teacher"), limbeck.load(best)
prepared = (images / 16 - (images / 16).mean()) / (images / 16).std()
with torch.no_grad():
    answers = {"teacher": teacher(prepared).numpy(), "student": student(prepared).numpy()}
unsure = answers["teacher"].max(1) - torch.tensor(answers["teacher"]).topk(2).values[:, 1].numpy()
items = unsure.argsort()[:4].tolist()
plots.soft_labels(answers, [str(c) for c in range(10)], items=items, temperature=2.0, labels=y, samples=images.numpy())

# %% [markdown]
# ## Calibration
#
# Bars: how often a model was right. Dots: how sure it was, larger where there are more samples. On the dashed line the two agree.

# %%
plots.calibration(best)
