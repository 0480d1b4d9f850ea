"""An ONNX file as a folder that can be copied away, and is whole or not there.

    model.onnx        the network; its metadata have all of the next two again
    labels.json       class names in the order of the logits
    preprocess.json   how a raw sample becomes the input: size, interpolation, normalisation, or the length of texts
    tokenizer.json    of text students: for the package tokenizers, cut at the student's length
    README.md         a few lines of plain Python from a raw sample to labels with probabilities, and the figures
    manifest.json     source, versions, inputs and outputs, parity, figures, the sha256 of every other file; sealed by its own hash

``write_artifact`` makes one; :mod:`limbeck.serve` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.run import canonical, commit_folder, disk_errors, file_sha256, finite, seal

__all__ = ["MANIFEST", "script", "write_artifact"]

FORMAT = 1
MANIFEST = "manifest.json"

_END = """
logits = session.run(["logits"], feeds)[0][0].astype(np.float64)
p = np.exp(logits - logits.max())
p /= p.sum()
for i in p.argsort()[::-1][:5]:
    print(f"{labels[i]}\\t{p[i]:.6f}")
"""

_SCRIPTS = {
    "image": """\
import json, sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps

labels = json.load(open("labels.json", encoding="utf-8"))
how = json.load(open("preprocess.json", encoding="utf-8"))
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
_, channels, height, width = session.get_inputs()[0].shape

image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")
by = Image.Resampling[how["interpolation"].upper()]
if how["resize_shorter"]:  # the shorter side to this many pixels, then the middle of the image
    w, h, s = *image.size, how["resize_shorter"]
    image = image.resize((int(s * w / h), s) if h <= w else (s, int(s * h / w)), by)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    if left >= 0 and top >= 0:
        image = image.crop((left, top, left + width, top + height))
image = image.resize((width, height), by).convert("L" if channels == 1 else "RGB")
x = np.asarray(image, np.float32).reshape(height, width, channels) / 255
x = (x - np.float32(how["mean"])) / np.float32(how["std"])
feeds = {session.get_inputs()[0].name: x.transpose(2, 0, 1)[None]}
""",
    "text": """\
import json, sys
import numpy as np, onnxruntime
from tokenizers import Tokenizer

labels = json.load(open("labels.json", encoding="utf-8"))
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])

found = Tokenizer.from_file("tokenizer.json").encode(*sys.argv[1:3])  # a text, or a pair of texts
columns = {"input_ids": found.ids, "token_type_ids": found.type_ids, "attention_mask": found.attention_mask}
feeds = {i.name: np.array([columns[i.name]], np.int64) for i in session.get_inputs()}
""",
    "tensor": """\
import json, sys
import numpy as np, onnxruntime

labels = json.load(open("labels.json", encoding="utf-8"))
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])

feeds = {session.get_inputs()[0].name: np.load(sys.argv[1])[None].astype(np.float32)}  # one sample, without a batch axis
""",
}

_CALLS = {
    "image": ("python answer.py photo.jpg", "onnxruntime numpy pillow", "Images of 8 bits a channel."),
    "text": ('python answer.py "a text"', "onnxruntime numpy tokenizers", "Two texts are a pair."),
    "tensor": ("python answer.py sample.npy", "onnxruntime numpy", "The array is taken as it is."),
}


def script(kind: str) -> str:
    """The Python that an artifact's README.md has. kind: ``image``, ``text`` or ``tensor``."""
    return _SCRIPTS[kind] + _END


def write_artifact(work: Path, final: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Make of ``work``, which holds a finished ``model.onnx`` alone, the artifact ``final`` (an older one is replaced); the manifest's body.

    record: what the manifest says beside ``artifact`` (the version of this layout) and ``files``.

    Raises: DiskFull.
    """
    import onnx

    facts = {p.key: p.value for p in onnx.load(str(work / "model.onnx"), load_external_data=False).metadata_props}
    with disk_errors(final):
        _text(work / "labels.json", json.dumps(json.loads(facts["classes"]), ensure_ascii=False, indent=1))
        _text(work / "preprocess.json", json.dumps(json.loads(facts["preprocessing"]), ensure_ascii=False, indent=1))
        if "tokenizer" in facts:
            _text(work / "tokenizer.json", facts["tokenizer"])
        _text(work / "README.md", _readme(final.name, facts, record))
        body = {"artifact": FORMAT, **finite(record), "files": {p.name: file_sha256(p) for p in sorted(work.iterdir())}}
        _text(work / MANIFEST, seal(json.loads(canonical(body))))
    commit_folder(work, final)
    return body


def _text(path: Path, text: str) -> None:
    path.write_bytes(text.encode())


def _readme(name: str, facts: Mapping[str, str], record: Mapping[str, Any]) -> str:
    kind = str(json.loads(facts["preprocessing"])["kind"])
    call, packages, note = _CALLS[kind]
    lines = [
        f"# {name}",
        "",
        f"A network for {facts['task'].replace('-', ' ')}, {len(json.loads(facts['classes']))} classes, in ONNX. {record['about']}",
        "",
    ]
    if kind != "text" or "tokenizer" in facts:
        lines += [
            f"It needs `pip install {packages}`, and neither PyTorch nor Limbeck. In this folder, as `answer.py`:",
            "",
            "```python",
            script(kind).rstrip("\n"),
            "```",
            "",
            f"`{call}` prints the best classes with their probability. {note}",
        ]
    else:
        lines += [
            "Its tokenizer has no `tokenizer.json`, so raw texts cannot be read here: `inputs` in `manifest.json` says what the network takes."
        ]
    return "\n".join([*lines, "", *_figures(record), "", "`manifest.json` has all figures, and the sha256 of every file.", ""])


def _figures(record: Mapping[str, Any]) -> list[str]:
    latency, test, peak = record["latency_ms"], record["test"], record["peak_rss_bytes"]
    return [
        "| measured | |",
        "|---|---:|",
        f"| accuracy, {test['items']:,} test samples | {100 * test['metrics']['accuracy']:.2f} % |",
        f"| one sample, one CPU thread: half of all calls, 95 % of them | {latency['p50']:.3g} ms, {latency['p95']:.3g} ms |",
        f"| samples a second in batches of {record['throughput']['batch_size']} | {record['throughput']['items_per_second']:,.0f} |",
        f"| bytes of `model.onnx` | {record['bytes']:,} |",
        f"| peak memory of a process that loads and asks it | {'not known' if peak is None else f'{peak / 2**20:,.0f} MiB'} |",
    ]
