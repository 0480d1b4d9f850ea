"""How to load, run and repeat a run: code with its real paths and names, highlighted."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from markupsafe import Markup, escape

from ._read import Run, section

__all__ = ["Snippet", "highlight", "snippets"]

OWN_OPTIONS = {"layers", "layers_of", "resolution", "max_length"}
"""Options of a model spec that Limbeck reads itself and no library's builder takes."""


@dataclass(frozen=True)
class Snippet:
    title: str
    explanation: str
    language: str
    code: str

    @property
    def html(self) -> Markup:
        return highlight(self.code, self.language)


def highlight(code: str, language: str) -> Markup:
    """Code with spans for Pygments' short classes; plain and escaped where Pygments is absent."""
    try:
        from pygments import highlight as colour  # type: ignore[import-untyped, unused-ignore]
        from pygments.formatters.html import HtmlFormatter  # type: ignore[import-untyped, unused-ignore]
        from pygments.lexers import get_lexer_by_name  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return escape(code)
    return Markup(colour(code, get_lexer_by_name(language), HtmlFormatter(nowrap=True)).rstrip("\n"))


def snippets(run: Run) -> list[Snippet]:
    """What to type next, most wanted first."""
    found = [_load(run)]
    onnx = section(run.metrics, "export", "onnx")
    if onnx:
        found.append(_onnx(run, str(onnx.get("file") or "export/model.onnx")))
    command = "distill" if "teacher" in run.roles else "train"
    repeat = f"limbeck {command} {shlex.quote(str(run.path / 'recipe.yaml'))} --out {shlex.quote(f'{run.path}-again')}"
    others = [name for name in ("onnx", "torchscript", "pt2") if name not in section(run.metrics, "export")]
    if others:
        found.append(
            Snippet(
                "Export it to another format",
                "The file is compared with the trained weights on real test samples before it gets its name.",
                "bash",
                f"limbeck export {shlex.quote(str(run.path))} --format {others[0]}",
            )
        )
    if run.recipe_text:
        explanation = "recipe.yaml is complete: it also holds the choices that were made by measuring, so the run repeats as it was."
        found.append(Snippet("Repeat this run", explanation, "bash", repeat))
    return found


def _load(run: Run) -> Snippet:
    """Five lines of the student's own library, or two of Limbeck's where no library builds the same architecture."""
    student = run.path / "student"
    spec = section(run.student, "spec") or section(run.recipe, "student")
    build = section(run.student, "build")
    name = str(spec.get("model") or "")
    kind, _, target = name.partition(":")
    kind = str(run.student.get("kind") or kind)
    options = section(spec, "options")
    cut = bool(build["cuts"] if "cuts" in build else {"layers", "layers_of"} & options.keys())
    given = section(build, "arguments") if build else {k: v for k, v in options.items() if k not in OWN_OPTIONS}
    prepared = section(run.student, "preprocessing")
    classes = run.student.get("num_classes") or len(run.student.get("classes") or run.analysis.get("classes") or ())
    weights = f'load_model(model, "{_path(student / "model.safetensors")}")'
    explanation = "Plain library code: the student does not need Limbeck."

    if (student / "config.json").is_file():
        return Snippet("Load the student", explanation, "python", _hugging_face(student, prepared))
    if kind == "torchvision" and not cut:
        call = _call("get_model", str(build.get("name") or target), {**given, "num_classes": classes})
        lines = ["from safetensors.torch import load_model", "from torchvision.models import get_model", "", f"model = {call}", weights]
    elif kind == "timm" and not cut:
        channels = {"in_chans": prepared["channels"]} if prepared.get("channels", 3) != 3 else {}
        call = _call("timm.create_model", str(build.get("name") or target), {**channels, **given, "num_classes": classes})
        lines = ["import timm", "from safetensors.torch import load_model", "", f"model = {call}", weights]
    elif kind == "python" and not cut and (build or target.count(":")):
        place, _, function = target.rpartition(":")
        place = str(build.get("file") or build.get("module") or place)
        arguments = given if build else {"num_classes": classes, **given}
        lines = [*_own_code(student, place, str(build.get("callable") or function), arguments), weights]
    elif kind == "module":
        lines = ["from safetensors.torch import load_model", "", "model = ...  # your own module, built as for the run", weights]
    else:
        lines = ["from limbeck.models import load_saved", "", f'model = load_saved("{_path(student)}").module']
        explanation = "No library builds this architecture by name, so Limbeck does; its weights are plain safetensors."
    ready = _normalise(prepared)
    return Snippet(
        "Load the student", explanation, "python", "\n".join([*(["import torch"] if ready else []), *lines, "model.eval()", *ready])
    )


def _hugging_face(student: Path, prepared: dict[str, Any]) -> str:
    folder = _path(student)
    if prepared.get("kind") == "image":
        return "\n".join(
            [
                "import torch",
                "from transformers import AutoModelForImageClassification",
                "",
                f'model = AutoModelForImageClassification.from_pretrained("{folder}").eval()',
                *_normalise(prepared, ".logits"),
            ]
        )
    length = int(prepared.get("max_length") or 128)
    return "\n".join(
        [
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
            f'model = AutoModelForSequenceClassification.from_pretrained("{folder}").eval()',
            f'inputs = tokenizer(["a sentence"], truncation=True, max_length={length}, padding=True, return_tensors="pt")',
            "logits = model(**inputs).logits",
            "print(model.config.id2label[logits.argmax(-1).item()])",
        ]
    )


def _own_code(student: Path, place: str, function: str, arguments: dict[str, Any]) -> list[str]:
    """A callable of a file (a copy of which lies beside the weights) or of an installed module."""
    given = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
    load = "from safetensors.torch import load_model"
    if not place.endswith(".py"):
        return [load, f"from {place} import {function}", "", f"model = {function}({given})"]
    file = student / PurePath(place.replace("\\", "/")).name
    return ["import runpy", load, "", f'{function} = runpy.run_path("{_path(file)}")["{function}"]', f"model = {function}({given})"]


def _normalise(prepared: dict[str, Any], after: str = "") -> list[str]:
    """Lines that turn an image into what the model was trained on."""
    if prepared.get("kind") != "image":
        return []
    mean, std = (_numbers(prepared.get(k) or ()) for k in ("mean", "std"))
    height, width = prepared.get("height"), prepared.get("width")
    at = f" at {height} x {width}" if height and width else ""
    return [
        "",
        f"# images: (B, {prepared.get('channels', 3)}, H, W) uint8{at}",
        f"mean, std = torch.tensor([{mean}]), torch.tensor([{std}])",
        f"logits = model((images / 255 - mean[:, None, None]) / std[:, None, None]){after}",
    ]


def _onnx(run: Run, file: str) -> Snippet:
    text = section(run.student, "preprocessing").get("kind") == "text" or str(run.metrics.get("task", "")).startswith("text")
    path = _path(run.path / file)
    lines = [
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("{path}")',
        "print(session.get_modelmeta().custom_metadata_map)",
    ]
    if text:
        lines += [
            "names = [i.name for i in session.get_inputs()]",
            'tokens = tokenizer(["a sentence"], return_tensors="np")',
            'logits = session.run(None, {name: tokens[name].astype("int64") for name in names})[0]',
        ]
    else:
        lines += ["logits = session.run(None, {session.get_inputs()[0].name: images})[0]  # float32, normalised, any batch size"]
    return Snippet(
        "Run the exported file",
        "ONNX Runtime needs neither PyTorch nor Limbeck. Class names and the preparation of inputs are in the file's own metadata.",
        "python",
        "\n".join(lines),
    )


def _call(function: str, name: str, arguments: dict[str, Any]) -> str:
    given = "".join(f", {k}={v!r}" for k, v in arguments.items())
    return f'{function}("{name}"{given})'


def _numbers(values: Any) -> str:
    return ", ".join(f"{float(v):.5g}" for v in values)


def _path(path: Path) -> str:
    return path.as_posix().replace('"', '\\"')
