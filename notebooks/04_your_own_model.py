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
# # Your own model, your own data
#
# Any `nn.Module` that gives logits can teach or learn, and any tensors or `torch.utils.data.Dataset` of `(x, y)` will do. Here: two moons of points.

# %%
import json

import numpy as np
import onnxruntime
import torch
from sklearn.datasets import make_moons
from torch import nn

import limbeck
from limbeck import plots

x, y = make_moons(1200, noise=0.25, random_state=0)
x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
train, test = (x[:800], y[:800]), (x[800:], y[800:])


class Mine(nn.Module):
    """Anything with a forward that takes a batch and returns logits."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, 2)

    def forward(self, points):
        return self.head(self.body(points))


# %%
names = ["left", "right"]
common = {"train": train, "test": test, "classes": names, "lr": 1e-2, "progress": "none"}
teacher = limbeck.train(student=Mine(64), epochs=30, export=[], out="runs/notebook-mine-teacher", **common)
result = limbeck.distill(
    teacher=teacher.student, student=lambda: Mine(3), seeds=3, epochs=30, temperature=2.0, alpha=0.8, out="runs/notebook-mine", **common
)
print(result.verdict)

# %% [markdown]
# A layer can be compared too: `hint` brings a layer of the student to one of the teacher by a learned projection, which is left behind.

# %%
hinted = limbeck.distill(
    teacher=teacher.student,
    student=lambda: Mine(3),
    objective=[
        {"loss": "kd", "weight": 0.8, "temperature": 2.0},
        {"loss": "hint", "weight": 0.1, "student": "body", "teacher": "body"},
        {"loss": "cross_entropy", "weight": 0.2},
    ],
    seeds=3,
    epochs=30,
    export=[],
    out="runs/notebook-mine-hint",
    **common,
)
print(hinted.verdict)
plots.tradeoff(result.folder, "parameters")

# %% [markdown]
# The ONNX file needs neither PyTorch nor Limbeck; its classes are in its metadata.

# %%
session = onnxruntime.InferenceSession(result.folder / "export/model.onnx", providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
logits = session.run(["logits"], {session.get_inputs()[0].name: np.array([[0.0, 1.0], [1.0, -0.5]], dtype=np.float32)})[0]
[classes[i] for i in logits.argmax(1)]
