"""Pictures for notebooks: what a run, a sweep or a pair of models looks like inside. Every function returns a matplotlib figure.

They read what the report reads, by the same code, and draw it in the same colours. Nothing is kept in matplotlib's global state: a figure is shown by
being the last value of a cell, and saved by ``figure.savefig``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor, nn

from limbeck.errors import Problem, UsageError, listed
from limbeck.models import Capture
from limbeck.report import _curves, _read
from limbeck.run import read_json

__all__ = ["attention", "attention_of", "calibration", "feature_maps", "losses", "soft_labels", "sweep", "tradeoff"]

COLOURS = {"teacher": "#4a463f", "baseline": "#bb4d07", "student": "#0a6aa1"}
_MORE = ("#0a6aa1", "#bb4d07", "#12805f", "#a03f86", "#857000", "#4a463f", "#5b54b8", "#8a3b3b")
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    "axes.axisbelow": True,
}

Run = str | Path
Inputs = Mapping[str, Any] | Tensor


class Picture(Figure):
    """A figure that a notebook shows by itself, whether or not pyplot was set up there."""

    def _repr_png_(self) -> bytes:
        kept = io.BytesIO()
        self.savefig(kept, format="png", dpi=110)
        return kept.getvalue()


def losses(run: Run) -> Figure:
    """Loss, its terms, and validation accuracy over the steps of a run; with several seeds their mean, each seed faint behind it."""
    found = _one(run)
    seeds = found.seeds
    left = [c for role in ("student", "baseline") if (c := _curves.losses(seeds, role))]
    middle = _curves.terms(seeds)
    right = [c for role in ("student", "baseline") if (c := _curves.validation(seeds, role, "accuracy"))]
    shown = [
        (title, curves) for title, curves in (("loss", left), ("terms of the student", middle), ("validation accuracy", right)) if curves
    ]
    if not shown:
        raise UsageError(Problem(str(run), "its log holds no training steps."))
    with _figure(len(shown), 1, width=4.6, height=3.2) as (figure, axes):
        for axis, (title, curves) in zip(axes, shown, strict=True):
            for number, curve in enumerate(curves):
                colour = COLOURS.get(curve.style, _MORE[number % len(_MORE)])
                line = _curves.line(curve)
                for xs, ys in line.faint:
                    axis.plot(xs, ys, color=colour, alpha=0.25, linewidth=1)
                axis.plot(*line.bold, color=colour, linewidth=2, label=curve.name, marker="o" if len(line.bold[0]) == 1 else None)
            axis.set(title=title, xlabel="step")
            axis.legend(frameon=False)
    return figure


def sweep(folder: Run, measure: str = "validation") -> Figure:
    """Two settings of a sweep side by side, e.g. temperature and alpha; the chosen combination is framed.

    measure: ``validation`` (what was chosen on), ``student`` (the test split) or ``gap_closed``. Where more than two settings were varied, the two
    with the most values are shown, at the others' best values.
    """
    if not (Path(folder) / "sweep.json").is_file():
        raise UsageError(Problem(str(folder), "holds no finished sweep: it has no sweep.json.", "Go on with it: --resume."))
    table = read_json(Path(folder) / "sweep.json")
    known = ("validation", "student", "gap_closed")
    if measure not in known:
        raise UsageError(Problem("measure", f"got {measure!r}; there are {listed(known)}."))
    vary, key = table["vary"], table["primary_metric"]
    best = next(row for row in table["rows"] if row["name"] == table["best"])
    names = sorted(vary, key=lambda k: -len(vary[k]))[:2]
    across, down = names[0], names[1] if len(names) > 1 else None

    def value(row: Mapping[str, Any]) -> float:
        said = (row["validation"] or {}).get(key) if measure == "validation" else row[measure]
        return float("nan") if said is None else 100 * said

    rows = vary[down] if down else [""]
    grid = np.full((len(rows), len(vary[across])), np.nan)
    for row in table["rows"]:
        if all(row["values"][k] == best["values"][k] for k in vary if k not in names):
            grid[rows.index(row["values"][down]) if down else 0, vary[across].index(row["values"][across])] = value(row)
    with _figure(1, 1, width=1.6 + 1.05 * grid.shape[1], height=1.4 + 0.75 * grid.shape[0]) as (figure, axes):
        axis = axes[0]
        axis.grid(False)
        image = axis.imshow(grid, cmap="Blues", aspect="auto")
        middle = np.nanmean([np.nanmin(grid), np.nanmax(grid)])
        for (i, j), number in np.ndenumerate(grid):
            if np.isfinite(number):
                axis.text(j, i, f"{number:.2f}", ha="center", va="center", color="white" if number > middle else "#222")
        at = vary[across].index(best["values"][across]), rows.index(best["values"][down]) if down else 0
        axis.add_patch(Rectangle((at[0] - 0.5, at[1] - 0.5), 1, 1, fill=False, edgecolor=COLOURS["baseline"], linewidth=3))
        axis.set_xticks(range(grid.shape[1]), vary[across])
        axis.set_yticks(range(grid.shape[0]), rows)
        what = "gap closed" if measure == "gap_closed" else f"{'validation' if measure == 'validation' else 'test'} {key}"
        axis.set(xlabel=across, ylabel=down or "", title=f"{what}, %")
        figure.colorbar(image, ax=axis, fraction=0.05)
    return figure


def calibration(run: Run) -> Figure:
    """Reliability of teacher, baseline and student: how often they were right, against how sure they were (15 bins; Guo et al. 2017)."""
    found = _one(run)
    models = {role: about for role, about in (found.analysis.get("models") or {}).items() if about.get("bins")}
    if not models:
        raise UsageError(Problem(str(run), "has no analysis.json, in which this stands.", "It is written at the end of a run."))
    roles = [role for role in ("teacher", "baseline", "student") if role in models]
    with _figure(len(roles), 1, width=3.2, height=3.2) as (figure, axes):
        for axis, role in zip(axes, roles, strict=True):
            bins = [b for b in models[role]["bins"] if b["count"]]
            middles = [(b["low"] + b["high"]) / 2 for b in bins]
            sizes = np.array([b["count"] for b in bins], dtype=float)
            pale = 0.25 + 0.65 * np.minimum(1.0, sizes / 10)  # a few samples say little
            colours = [(*to_rgb(COLOURS[role]), opacity) for opacity in pale]
            axis.bar(middles, [b["correct"] / b["count"] for b in bins], width=1 / 15 * 0.9, color=colours)
            axis.plot([0, 1], [0, 1], color="#888", linestyle="--", linewidth=1)
            axis.scatter(middles, [b["confidence"] for b in bins], s=90 * sizes / sizes.max() + 4, color="#222", zorder=3)
            error = models[role].get("ece")
            axis.set(
                title=role if error is None else f"{role}: ECE {error:.3f}",
                xlabel="confidence",
                ylabel="share right",
                xlim=(0, 1),
                ylim=(0, 1.02),
            )
    return figure


def tradeoff(run: Run, measure: str = "latency_ms") -> Figure:
    """What each model costs and what it knows: test accuracy against latency (``latency_ms``), ``parameters``, ``bytes`` or ``flops``."""
    found = _one(run)
    known = ("latency_ms", "parameters", "bytes", "flops")
    if measure not in known:
        raise UsageError(Problem("measure", f"got {measure!r}; there are {listed(known)}."))
    key = str(found.metrics["primary_metric"])
    with _figure(1, 1, width=5.2, height=3.6) as (figure, axes):
        axis = axes[0]
        for role in found.roles:
            about = found.model(role)
            cost = (about.get("latency_ms") or {}).get("p50") if measure == "latency_ms" else about.get(measure)
            if cost is None:
                continue
            deviation = (about.get("metrics_std") or {}).get(key)
            marker = {"teacher": "D", "baseline": "s"}.get(role, "o")
            axis.errorbar(
                cost,
                100 * about["metrics"][key],
                yerr=None if deviation is None else 100 * deviation,
                color=COLOURS[role],
                marker=marker,
                markersize=9,
                capsize=4,
            )
            beside = (9, -14) if role == "baseline" else (9, 5)  # it often stands where the student does
            axis.annotate(role, (cost, 100 * about["metrics"][key]), textcoords="offset points", xytext=beside, color=COLOURS[role])
        axis.set_xscale("log")
        axis.margins(0.2)
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0) if high > 5 * low else range(1, 10)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(
            xlabel="latency of one sample, ms (median)" if measure == "latency_ms" else measure, ylabel=f"test {key.replace('_', ' ')}, %"
        )
    return figure


def soft_labels(
    answers: Mapping[str, Any],
    classes: Sequence[str],
    *,
    items: Sequence[int],
    temperature: float = 1.0,
    labels: Sequence[int] | None = None,
    samples: Sequence[Any] | None = None,
    most: int = 8,
) -> Figure:
    """What each model says of single samples: softmax(logits / T), a group of bars a class.

    answers: ``(N, C)`` logits by name, e.g. ``{"teacher": ..., "student": ...}``. items: which rows. labels: ``(N,)``, marked with a star. samples:
    the images ``(H, W)`` or ``(H, W, C)``, or the texts, shown beside. most: classes shown for one sample, those that any model finds likeliest.
    """
    logits = {name: np.asarray(values, dtype=np.float64) for name, values in answers.items()}
    wrong = [
        Problem("answers", f"{n} has the shape {v.shape}, and there are {len(classes)} classes.")
        for n, v in logits.items()
        if v.ndim != 2 or v.shape[1] != len(classes)
    ]
    if wrong or not logits:
        raise UsageError(wrong or [Problem("answers", "no model was given.")])
    soft = {name: torch.from_numpy(values / temperature).softmax(-1).numpy() for name, values in logits.items()}
    pictures = samples is not None and not isinstance(samples[items[0]], str)
    with _figure(2 if pictures else 1, len(items), width=4.2, height=1.9, ratios=[1, 3] if pictures else None) as (figure, axes):
        for number, item in enumerate(items):
            row = axes[number * (2 if pictures else 1) :]
            if pictures:
                assert samples is not None
                row[0].imshow(np.asarray(samples[item]).squeeze(), cmap="gray")
                row[0].axis("off")
            axis = row[1 if pictures else 0]
            likeliest = np.argsort(-np.max([p[item] for p in soft.values()], axis=0), kind="stable")[:most]
            order = np.sort(likeliest)
            for place, (name, p) in enumerate(soft.items()):
                wide = 0.8 / len(soft)
                colour = COLOURS.get(name, _MORE[place % len(_MORE)])
                axis.bar(np.arange(len(order)) + (place - (len(soft) - 1) / 2) * wide, p[item][order], wide, color=colour, label=name)
            named = [f"{classes[c]} *" if labels is not None and labels[item] == c else str(classes[c]) for c in order]
            axis.set_xticks(
                range(len(order)),
                named,
                rotation=30 if max(map(len, named)) > 4 else 0,
                ha="right" if max(map(len, named)) > 4 else "center",
            )
            axis.set_ylim(0, 1)
            text = f": {str(samples[item])[:70]}" if samples is not None and not pictures else ""
            axis.set_title(f"sample {item}{text}" + (f" at T = {temperature:g}" if number == 0 and temperature != 1 else ""), fontsize=9)
        axes[1 if pictures else 0].legend(frameon=False, fontsize=8)
    return figure


def attention_of(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The attention of every layer for one sample: ``(heads, queries, keys)`` each, rows that sum to 1.

    inputs: what the module is called with, batch size 1: a mapping (Hugging Face models) or a tensor. Models of Transformers give their own maps; of
    others (timm) they are computed from the queries and keys of modules with ``qkv`` and ``num_heads``. Raises: UsageError where a model has neither.
    """
    choose: Any = getattr(module, "set_attn_implementation", None)
    if choose is not None:
        before = getattr(module.config, "_attn_implementation", "sdpa")
        try:
            choose("eager")  # fused attention keeps no maps
            with _evaluated(module):
                found = (
                    module(**inputs, output_attentions=True).attentions
                    if isinstance(inputs, Mapping)
                    else module(inputs, output_attentions=True).attentions
                )
        finally:
            choose(before)
        if found:
            return [layer[0].float().cpu() for layer in found]
    blocks = [(name, m) for name, m in module.named_modules() if isinstance(getattr(m, "qkv", None), nn.Linear) and hasattr(m, "num_heads")]
    if not blocks:
        raise UsageError(
            Problem(
                type(module).__name__,
                "has no attention that can be read: it is no model of Transformers, and has no module with qkv and num_heads.",
            )
        )
    with _evaluated(module), Capture(module, [f"{name}.qkv" for name, _ in blocks]) as capture:
        module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
    maps = []
    for name, block in blocks:
        both = capture.features[f"{name}.qkv"][0].float()
        queries, keys, _ = both.reshape(len(both), 3, int(block.num_heads), -1).permute(1, 2, 0, 3)
        for norm, side in (("q_norm", 0), ("k_norm", 1)):
            layer = getattr(block, norm, None)
            if isinstance(layer, nn.Module):
                queries, keys = (layer(queries), keys) if side == 0 else (queries, layer(keys))
        maps.append((queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(-1).detach().cpu())
    return maps


def attention(
    models: Mapping[str, nn.Module],
    inputs: Inputs | Mapping[str, Inputs],
    *,
    tokens: Sequence[str] | None = None,
    layer: int = -1,
    head: int | None = None,
) -> Figure:
    """Attention heat maps of teacher and student on the same sentence or image, side by side.

    models: by name. inputs: of one sample; or one for each model, by the same names. tokens: what stands on the axes, for texts. layer: counted from
    the end where negative. head: None is the mean over heads.
    """
    each = inputs if isinstance(inputs, Mapping) and set(inputs) == set(models) else dict.fromkeys(models, inputs)
    with _figure(len(models), 1, width=4.4, height=4.2) as (figure, axes):
        for axis, (name, module) in zip(axes, models.items(), strict=True):
            layers = attention_of(module, each[name])
            if not -len(layers) <= layer < len(layers):
                raise UsageError(Problem("layer", f"got {layer}, and {name} has {len(layers)} layers."))
            heads = layers[layer]
            if head is not None and not 0 <= head < len(heads):
                raise UsageError(Problem("head", f"got {head}, and {name} has {len(heads)} heads."))
            shown = heads.mean(0) if head is None else heads[head]
            axis.grid(False)
            image = axis.imshow(shown.numpy(), cmap="magma", vmin=0)
            figure.colorbar(image, ax=axis, fraction=0.046, pad=0.04)
            if tokens is not None and len(tokens) == len(shown):
                axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
                axis.set_yticks(range(len(tokens)), tokens, fontsize=8)
            of = "mean over heads" if head is None else f"head {head}"
            axis.set(title=f"{name}, layer {layer % len(layers) + 1} of {len(layers)}, {of}", xlabel="looks at")
    return figure


def feature_maps(
    models: Mapping[str, nn.Module], image: Tensor | Mapping[str, Tensor], layers: Mapping[str, str], *, most: int = 8
) -> Figure:
    """What a layer of each model makes of one image: its channels with the most energy, a row a model.

    image: ``(1, C, H, W)`` as the models want it, or one for each model. layers: the path of a layer, by the names of the models; it gives maps
    ``(1, C, H, W)``.
    """
    each = image if isinstance(image, Mapping) else dict.fromkeys(models, image)
    with _figure(most, len(models), width=1.3, height=1.5) as (figure, axes):
        for row, (name, module) in enumerate(models.items()):
            with _evaluated(module), Capture(module, [layers[name]]) as capture:
                module(each[name])
            found = capture.features[layers[name]][0].float().cpu()
            if found.ndim != 3:
                shape = tuple(capture.features[layers[name]].shape)
                raise UsageError(Problem(layers[name], f"gives {shape}; maps (1, C, H, W) are wanted.", "Name a convolutional layer."))
            order = found.square().mean((1, 2)).argsort(descending=True)[:most]
            for place in range(most):
                axis = axes[row * most + place]
                axis.axis("off")
                if place < len(order):
                    axis.imshow(found[order[place]].numpy(), cmap="viridis")
            axes[row * most].set_title(f"{name}: {layers[name]}", loc="left", fontsize=9)
    return figure


def _one(run: Run) -> _read.Run:
    return _read.read_runs([Path(run)])[0]


def _short(value: float) -> str:
    """A number with the letter of its size.

    >>> [_short(v) for v in (0.07, 500, 2000, 4.5e6)]
    ['0.07', '500', '2 k', '4.5 M']
    """
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


@contextmanager
def _figure(
    columns: int, rows: int, *, width: float, height: float, ratios: list[float] | None = None
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure without pyplot, whose axes come row by row."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure = Picture(figsize=(width * columns, height * rows), layout="constrained")
        made = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"width_ratios": ratios} if ratios else None)
        yield figure, list(made.reshape(-1))


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients, and as it was afterwards."""
    before = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in before.items():
            m.training = training
