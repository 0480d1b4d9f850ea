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
# # Distil in ten lines
#
# A teacher that is good and too big, a student that is small, and data. What comes out: the trained student, the same student trained *without* the
# teacher, an ONNX file that was checked against it, and a verdict. The data are 8 x 8 pictures of digits that come with scikit-learn; only 100 of the
# training pictures keep their labels for the student.

# %%
from torch import nn

import limbeck
from limbeck import plots


def net(width, classes=10):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(8 * width, classes),
    )  # fmt: skip


# %%
teacher = limbeck.train(student=net(48), data="digits", epochs=15, lr=3e-3, export=[], progress="none", out="runs/notebook-teacher")
result = limbeck.distill(
    teacher=teacher.student,
    student=lambda: net(4),
    data={"source": "digits", "labelled_limit": 100},
    temperature=4.0,
    alpha=0.9,
    epochs=30,
    lr=1e-2,
    seeds=3,
    progress="none",
    out="runs/notebook-student",
)
print(result.verdict)

# %% [markdown]
# What each model costs, and what it knows. The baseline is the same student, with the same initial weights and steps, that never saw the teacher.

# %%
plots.tradeoff(result.folder)

# %%
plots.losses(result.folder)

# %% [markdown]
# The student is a plain PyTorch module, and stands alone in `runs/notebook-student/student` and `export/model.onnx`. `report.html` has everything on
# one page.

# %%
sorted(
    str(p.relative_to(result.folder))
    for p in result.folder.rglob("*")
    if p.suffix in (".safetensors", ".onnx", ".html") and "seed-" not in str(p)
)
