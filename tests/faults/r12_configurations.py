"""R12: whatever stands in a recipe or on a command line, the exit code is 0 or 2, there is no traceback, and nothing is written.

Recipes and command lines that are right are mutated by a seeded generator: wrong types, numbers without measure, keys that are deleted, doubled or
misspelt, junk of every nesting, unicode, empty texts, folders for files, and edits of the raw bytes. Case ``i`` is a function of (seed, i), so that
any one of them can be looked at alone:  python tests/faults/r12_configurations.py CASE [SEED]
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parents[1]
sys.path[:0] = [p for p in (str(TESTS), str(TESTS.parent / "src")) if p not in sys.path]

PROMISE = "10,000 generated mutations of recipes and command lines: exit 0 or 2, never a traceback, nothing half-written"
SEED, COUNT, BATCH = 12, 10_000, 1000
SECONDS = 300  # of one case, after which it hangs; wide, because other work may have the processor
MEMORY = 4 << 30  # bytes of address space above what the imports take

MODELS = """
from torch import nn

def teacher(num_classes=4, width=12):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, num_classes))

def student(num_classes=4, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, num_classes))
"""

# The names in the recipes that ship with the package, and what is at hand for them here.
AT_HAND = {
    "timm:resnet50": "python:models.py:teacher",
    "timm:mobilenetv3_small_100": "python:models.py:student",
    "torchvision:resnet18": "python:models.py:student",
    "bert-base": "hf:bert",
    "minilm": "hf:bert",
    "npz:cifar10.npz": "npz:data.npz",
    "csv:labelled.csv": "csv:reviews.csv",
}

NUMBERS: list[Any] = [
    0, 1, 2, 3, 7, -1, -(2**31), 10**6, 10**12, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-320,
    1e-9, 1e9, 1e38,
    1e308, float("inf"), float("-inf"), float("nan"),
]  # fmt: skip
TEXTS: list[Any] = [
    "", " ", "\t", "\n", "abc", "no", "yes", "null", "~", "1e999", "0x10", "1_000", "1:30", "-", "--", "--help", "ünïcödé", "名前",
    "\u202eabc", "\ufeff",
    "\u0000", "a\u0000b", "\ud7ff", "😀" * 40, "x" * 5000, "x/" * 600, "../" * 40, ".", "..", "/", "~nobody/x", "photos",
    "photos/train/a/0.png", "/dev/null",
    "/dev/zero", "/proc/self/mem", "data.npz", "reviews.csv", "bert", "models.py", "pipe", "$HOME", "%s %d %n", "{0}", "{x!r:>9}",
    "<script>", "'; --", "a=b",
    "npz:", "npz:photos", "npz:data.npz", "npz:reviews.csv", "npz:/dev/zero", "npz:pipe", "csv:data.npz", "csv:/dev/zero", "csv:pipe",
    "jsonl:reviews.csv",
    "parquet:data.npz", "parquet:photos", "imagefolder:data.npz", "imagefolder:photos", "imagefolder:/dev", "imagefolder:", "hf:",
    "hf:a/b/c", "hf:..", "digits",
    "digits:1", "python:", "python:models.py", "python:models.py:", "python:models.py:nn", "python:models.py:student",
    "python:models.py:__name__",
    "python:os:getcwd", "python:data.npz:x", "python:photos:x", "run:", "run:.", "run:photos", "run:runs/teacher", "timm:",
    "timm:resnet1O", "torchvision:",
    "torchvision:resnet", "onnx:a.onnx", "logits:data.npz", "logits:l.npy", "logits:photos", "teacher.safetensors", "w.pth", "auto",
    "cpu", "cuda", "cuda:99",
    "mps", "float64", "bf16", "fp16", "sgd", "adam", "kd", "cross_entropy", "hint", "onnx", "pt2", "pretrained", "scratch", "live",
    "off", "require", "sparse",
    "standard", "skip", "text", "label", "text-classification", "image-classification",
]  # fmt: skip
JUNK: list[Any] = [
    None, True, False, [], {}, [[]], [None], [1, 2], [0.5, 0.1], ["a", "a"], {"a": 1}, {"": ""}, {"start": 1, "end": 0},
    {"start": "x"}, {"start": 1e308, "end": -1e308},
    {"loss": "kd"}, [{"loss": "kd"}], [{"loss": "kd", "weight": {"start": 0, "end": 0}}], ["kd", "cross_entropy"],
    {"model": "python:models.py:student"},
    {"model": {}}, {"model": ["a"]}, {"source": "digits"}, {"crop": 10**9}, {"crop": 1}, {"mixup": 1e300}, {"randaugment": [10**9,
    30]}, {"layers": [0, 0]},
    {"layers": [10**9]}, {"layers": "x"}, {"width": 10**12}, {"width": -1}, {"width": "x"}, {"width": 0}, {"resolution": 10**6},
    {"resolution": [1, 0]},
    {"num_labels": 10**12}, {"hidden_size": -1}, {"hidden_size": 10**9}, {"max_length": 10**9}, {"epochs": 1, "if_needed": True},
]  # fmt: skip
KEYS = [
    "epochs", "lr", "model", "source", "train", "data", "seed", "objective", "teacher", "student", "options", "weights", "", "x", "名",
    "__class__", "__init__",
    "self", "loss", "weight", "temperature", "corrupt", "train_limit", "labelled_limit", "views", "path", "codec", "mode", "store",
    "placement", "precision",
    "layout", "batch_size", "accumulate", "workers", "device", "ema", "clip_norm", "betas", "momentum", "schedule", "warmup", "track",
    "baseline", "export",
    "augment", "max_length", "text", "label", "text_pair", "valid", "test", "unlabelled", "valid_fraction", "test_fraction", "select",
    "checkpoint_every",
    "log_every", "gradient_checkpointing", "teacher_cache", "task",
]  # fmt: skip
SECTIONS = [
    "",
    "train.",
    "data.",
    "teacher.",
    "student.",
    "teacher_cache.",
    "objective.0.",
    "objective.1.",
    "teacher.train.",
    "student.options.",
    "data.augment.",
]


class Case(NamedTuple):
    """Arguments of the command line, and the bytes of the recipe that they may name."""

    arguments: list[str]
    recipe: bytes | None


class Told(NamedTuple):
    """What came of a case: the exit code, or None with what went wrong in words."""

    code: int | None
    wrong: str
    reached: str


# --- where it happens ---


def furnish(folder: Path) -> None:
    """Data, models and a finished run, so that a mutated recipe that is still right gets as far as the first step."""
    import numpy as np
    from PIL import Image
    from safetensors.torch import save_file

    from models_support import text_folder
    from running import limbeck

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (40, 8, 8, 3), dtype=np.uint8), np.arange(40) % 4
    np.savez(folder / "data.npz", train_x=x, train_y=y, test_x=x[:8] + 1, test_y=y[:8])
    np.save(folder / "l.npy", rng.normal(size=(40, 4)).astype(np.float32))
    rows = "".join(f"w{i % 9} a w{i % 7} {i},{'ab'[i % 2]}\n" for i in range(40))
    (folder / "reviews.csv").write_text("text,label\n" + rows)
    (folder / "unlabelled.csv").write_text("text\n" + "".join(f"w{i % 5} w{i}\n" for i in range(9)))
    (folder / "models.py").write_text(MODELS)
    (folder / "w.pth").write_bytes(b"PK")
    for split, name in ((s, n) for s in ("train", "test") for n in "abcd"):
        at = folder / "photos" / split / name
        at.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(at / f"{i}.png")
    text_folder(folder / "bert", layers=12)
    os.mkfifo(folder / "pipe")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        sys.path_importer_cache.clear()
        options = ["--epochs", "1", "--set", "export=[]", "--set", "train.precision=float32"]
        assert limbeck("train", "--student", "python:models.py:teacher", "--data", "npz:data.npz", "--out", "runs/teacher", *options) == 0
    from safetensors.torch import load_file

    save_file(load_file(folder / "runs/teacher/student/model.safetensors"), folder / "teacher.safetensors")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything that is there; byte code that Python itself keeps is none of ours."""
    found = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f != "__pycache__"]
        for name in [*folders, *files]:
            status = os.lstat(os.path.join(root, name))
            found[os.path.relpath(os.path.join(root, name), folder)] = (
                status.st_size if name in files else 0,
                status.st_mtime_ns if name in files else 0,
            )
    return found


# --- mutations ---


@functools.cache
def shipped() -> list[tuple[str, dict[str, Any]]]:
    """``(command, recipe)`` of every recipe of the package, with what is at hand."""
    import limbeck
    from limbeck._recipe_yaml import read_yaml

    found = []
    for path in sorted((Path(limbeck.__file__).parent / "recipes").glob("*.yaml")):
        plain = at_hand(read_yaml(path))
        found.append(("train" if "teacher" not in plain else "distill", plain))
    return found


def at_hand(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: at_hand(v) for k, v in value.items() if not (k == "weights" and v == "pretrained")}
        return {**kept, "options": {}} if kept.get("model") == "python:models.py:teacher" and "options" in kept else kept
    if isinstance(value, list):
        return [at_hand(v) for v in value]
    return AT_HAND.get(value, value) if isinstance(value, str) else value


def paths_of(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value inside a tree."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in items:
        yield (*at, key)
        yield from paths_of(value, (*at, key))


def junk(rng: random.Random) -> Any:
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(NUMBERS)
    if kind < 0.7:
        return rng.choice(TEXTS)
    if kind < 0.95:
        return rng.choice(JUNK)
    value: Any = rng.choice(TEXTS)
    for _ in range(rng.choice((1, 3, 30, 200))):
        value = [value] if rng.random() < 0.5 else {rng.choice(KEYS): value}
    return value


def mild(rng: random.Random) -> Any:
    """A value that some key may well take."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice((0, 1, 2, 3, 7, 16, 64, 10**6, 10**12, 2**63 - 1, 0.1, 0.5, 0.99, 1.5, 1e-9, 1e9))
    return rng.choice(TEXTS[-50:]) if kind < 0.7 else rng.choice(JUNK)


@functools.cache
def fields() -> dict[str, list[str]]:
    """The keys of every section of a recipe."""
    from limbeck import recipe

    sections = {"train": recipe.Train, "data": recipe.DataSpec, "teacher_cache": recipe.TeacherCache, "teacher": recipe.TeacherSpec}
    sections |= {"student": recipe.ModelSpec, "": recipe.Recipe, "augment": recipe.Augment}
    return {name: list(model.model_fields) for name, model in sections.items()}


def misspelt(rng: random.Random, word: str) -> str:
    if not word:
        return "x"
    at = rng.randrange(len(word))
    return rng.choice(
        (word[:at] + word[at + 1 :], word[:at] + word[at] * 2 + word[at + 1 :], word.upper(), word + " ", "é" + word, word[::-1])
    )


def mutate(rng: random.Random, plain: dict[str, Any]) -> None:
    """One change of a tree, in place."""
    places = list(paths_of(plain))
    if not places:
        plain[rng.choice(KEYS)] = junk(rng)
        return
    path = rng.choice(places)
    holder: Any = plain
    for key in path[:-1]:
        holder = holder[key]
    key, how = path[-1], rng.random()
    if how < 0.4:
        holder[key] = junk(rng)
    elif how < 0.5:
        del holder[key]
    elif how < 0.6 and isinstance(holder, dict):
        holder[misspelt(rng, str(key))] = holder.pop(key)
    elif how < 0.75 and isinstance(holder, dict):
        holder[rng.choice(KEYS)] = junk(rng)
    elif how < 0.85:
        other: Any = plain
        for step in rng.choice(places):
            other = other[step]
        holder[key] = json.loads(json.dumps(other))
    elif how < 0.92:
        holder[key] = [holder[key]] if rng.random() < 0.5 else {rng.choice(KEYS): holder[key]}
    elif isinstance(holder, list):
        holder.append(junk(rng))
    else:
        section = rng.choice(("train", "data", "teacher_cache", "teacher", "student"))
        inner = plain.get(section)
        plain[section] = {**(inner if isinstance(inner, dict) else {}), rng.choice(KEYS): junk(rng)}


def bend(rng: random.Random, plain: dict[str, Any]) -> None:
    """One key that exists takes a value that it may take."""
    section = rng.choice(list(fields()))
    key = rng.choice(fields()[section])
    holder: Any = plain
    for step in {"": (), "augment": ("data", "augment")}.get(section, (section,)):
        if not isinstance(holder.get(step), dict):
            holder[step] = (
                {"source": holder[step]} if step == "data" else {"model": holder[step]} if isinstance(holder.get(step), str) else {}
            )
        holder = holder[step]
    holder[key] = mild(rng)


def scarred(rng: random.Random, raw: bytes) -> bytes:
    """One edit of the bytes of a recipe."""
    how = rng.randrange(12)
    at = rng.randrange(len(raw) + 1)
    lines = raw.split(b"\n")
    place = rng.randrange(len(lines))
    if how == 0:
        return raw[:at]
    if how == 1:
        return raw[:at] + bytes([rng.randrange(256)]) + raw[at:]
    if how == 2:
        return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
    if how == 3:
        return b"\n".join([*lines[: place + 1], lines[place], *lines[place + 1 :]])  # a key twice
    if how == 4:
        return b"\n".join(lines[:place] + lines[place + 1 :])
    if how == 5:
        return raw + b"\n---\n" + raw
    if how == 6:
        return b"\xef\xbb\xbf" + raw if rng.random() < 0.5 else raw.decode().encode(rng.choice(("utf-16", "utf-32", "utf-16-le")))
    if how == 7:
        return (
            raw
            + b"\n"
            + rng.choice(
                (
                    b"a: &a [*a]",
                    b"x: &x {<<: *x}",
                    b"<<: [1]",
                    b"<<: {seed: 1}",
                    b"? [a, b]\n: c",
                    b"!!python/object/apply:os.system [x]: 1",
                )
            )
        )
    if how == 8:
        return raw.replace(b":", rng.choice((b":: ", b" : !!str", b": &a", b": *a", b"\t:", b":|", b": >")), rng.choice((1, -1)))
    if how == 9:
        return raw.replace(b"  ", rng.choice((b"\t", b" ", b"   ")), rng.choice((1, -1)))
    if how == 10:
        bomb = (
            b"a0: &a0 [" + b"x, " * 9 + b"x]\n" + b"".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n".encode() for i in range(1, 9))
        )
        return bomb + raw
    return rng.choice(
        (
            b"",
            b"\n",
            b"#",
            b"-",
            b"[" * 5000,
            b"{" * 100,
            b"- " * 500,
            b"\0" * 20,
            b"x",
            b'"',
            b"1",
            b"null",
            b"%YAML 9.9\n---\n" + raw,
            b"a" * 2_000_000,
        )
    )


def case_of(seed: int, number: int) -> Case:
    """Case ``number``: a function of its seed and number."""
    from limbeck._recipe_yaml import dump

    rng = random.Random(f"{seed}:{number}")
    command, base = rng.choice(shipped())
    plain = json.loads(json.dumps(base))
    kind = rng.random()
    if kind < 0.65:  # a recipe
        how = rng.choice((mutate, mutate, bend, nudge, nudge))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            how(rng, plain)
        raw = written(rng, plain, dump)
        if how is not nudge and rng.random() < 0.25:
            raw = scarred(rng, raw)
        arguments = [rng.choice((command, command, command, "distill", "label")), "r.yaml", "--dry-run"]
        if rng.random() < 0.2:
            arguments += some_options(rng, arguments[0], 1)
        return Case(arguments, raw)
    if kind < 0.9:  # options over a recipe that is right, or none
        named = rng.choice(("distill", "distill", "train", "label", "sweep"))
        arguments = [named] + (["r.yaml"] if rng.random() < 0.6 else ["--student", "python:models.py:student", "--data", "npz:data.npz"])
        arguments += some_options(rng, named, rng.choice((1, 1, 2, 3, 5)))
        arguments += ["--dry-run"] if named != "sweep" else []
        return Case(arguments, written(rng, plain, dump))
    named = rng.choice(
        (
            "evaluate",
            "export",
            "report",
            "cache",
            "losses",
            "models",
            "recipes",
            "convert",
            "demo",
            "",
            "--version",
            "-h",
            rng.choice(TEXTS),
        )
    )
    if named == "demo":  # it has nothing but an output folder, and would run
        return Case(["demo", "--out", rng.choice(("data.npz", "", "photos", "x\u0000y", "data.npz/x"))], None)
    arguments = [named] + (["ls"] if named == "cache" else [])
    arguments += [str(rng.choice(TEXTS)) for _ in range(rng.choice((0, 1, 1, 2)))] + some_options(rng, named, rng.choice((0, 0, 1, 2)))
    if named in ("report", "export", "evaluate", "convert"):  # a run that is right would be written into
        arguments = [a for a in arguments if a not in (".", "..", "/")]
    return Case(arguments, None)


# What a person may well write: most of it is right, some of it is too large for this machine or for the data.
NEAR: dict[str, tuple[Any, ...]] = {
    "seed": (0, 1, 2**63 - 1), "baseline": (True, False), "export": ([], ["onnx"], ["pt2", "torchscript"], "onnx"), "train.epochs": (1,
    10**6, 10**15),
    "train.batch_size": (1, 2, 3, 39, 10**6, 2**62), "train.lr": (1e-300, 1e300, 3), "train.weight_decay": (0, 1e30),
    "train.accumulate": (1, 2, 16),
    "train.warmup": (0, 0.999), "train.ema": (0.5, 0.999999), "train.clip_norm": (1e-30, 1e30), "train.log_every": (1, 10**18),
    "train.schedule": ("one_cycle", "step"), "train.milestones": ([0.5], [0.5, 0.9], [0.9, 0.5], []), "train.decay": (0.1, 1),
    "train.checkpoint_every": (1, 10**18), "train.precision": ("float32", "float64", "bf16"), "train.workers": (0, 1, 10**9),
    "train.select": ("best", "last"),
    "train.layout": ("channels_last",), "train.optimizer": ("sgd", "adam"), "data.seed": (5, 2**63 - 1), "data.valid_fraction": (0.01,
    0.5, 0.99), "data.train_limit": (1, 4, 30, 10**12),
    "data.labelled_limit": (2, 4, 8), "data.corrupt": ("skip",), "data.max_length": (2, 5, 16, 10**9), "data.augment": ("standard",
    {"crop": 1}, {"crop": 10**7}, {"mixup": 0.2}, {"erase": 1},
    {"randaugment": [2, 9]}, {"resized_crop": [0.1, 1]}, {"flip": True}), "teacher_cache.views": (1, 2, 10**9, "live"),
    "teacher_cache.mode": ("auto", "off", "require"),
    "teacher_cache.codec": ("float32", "sparse"), "teacher_cache.path": ("cache", "/dev/null/x", "data.npz"),
    "student.options.width": (1, 10**5, 10**10, "4", -3, 0),
    "student.options.resolution": (1, 8, 10**5, [8, 9]), "teacher.train": ({"epochs": 1}, {"epochs": 1, "if_needed": True}, None),
    "objective.0.temperature": (1e-300, 1e300, 1),
    "objective.0.weight": (1e-300, 1e300, 1, {"start": 1, "end": 0}), "track": ([], ["wandb"], ["mlflow"]),
    "teacher.model": ("run:runs/teacher", "logits:l.npy", "python:models.py:student"),
    "student.model": ("run:runs/teacher", "timm:test_vit", "hf:bert", "python:models.py:teacher"), "data.source": ("digits",
    "npz:data.npz", "csv:reviews.csv", "imagefolder:photos"),
}  # fmt: skip


def nudge(rng: random.Random, plain: dict[str, Any]) -> None:
    """One key that is there or could be gets a value that is right by itself."""
    path = rng.choice(list(NEAR))
    *steps, key = path.split(".")
    holder: Any = plain
    for step in steps:
        inner = (
            holder[int(step)]
            if isinstance(holder, list) and int(step) < len(holder)
            else holder.get(step)
            if isinstance(holder, dict)
            else None
        )
        if isinstance(inner, str):
            inner = {"source": inner} if step == "data" else {"model": inner}
        if inner is None or not isinstance(inner, dict | list):
            inner = {}
        if isinstance(holder, dict):
            holder[step] = inner
        holder = inner
    if isinstance(holder, dict):
        holder[key] = rng.choice(NEAR[path])


def written(rng: random.Random, plain: dict[str, Any], dump: Any) -> bytes:
    """As YAML, or as JSON where YAML cannot hold it."""
    if rng.random() < 0.5:
        with contextlib.suppress(Exception):
            return str(dump(plain)).encode("utf-8", "surrogatepass")
    return json.dumps(plain, indent=1).encode()


@functools.cache
def commands() -> Any:
    import typer

    from limbeck import cli

    return typer.main.get_command(cli.app)


def options_of(command: str) -> list[tuple[str, bool]]:
    """``(name, takes a value)`` of every option that a command has."""
    known = commands().commands.get(command)
    return [] if known is None else [(o, not p.is_flag) for p in known.params if p.param_type_name == "option" for o in p.opts]


def some_options(rng: random.Random, command: str, count: int) -> list[str]:
    """Options of a command with values that may be anything."""
    known = [o for o in options_of(command) if o[0] not in ("--ids", "--dry-run")]
    arguments: list[str] = []
    for _ in range(count):
        if not known or rng.random() < 0.4:
            section = rng.choice([s for s in fields() if s != "augment"])
            known_key = f"{section}.{rng.choice(fields()[section])}".removeprefix(".")
            key = known_key if rng.random() < 0.6 else rng.choice(SECTIONS) + rng.choice(KEYS)
            value = mild(rng) if rng.random() < 0.5 else junk(rng)
            arguments += ["--set", f"{key}={shown(rng, value)}" if rng.random() < 0.9 else key]
            continue
        name, takes = rng.choice(known)
        if rng.random() < 0.1:
            name = misspelt(rng, name)
        arguments.append(name)
        if name == "--vary":
            arguments.append(
                f"{rng.choice(SECTIONS)}{rng.choice(KEYS)}={','.join(shown(rng, junk(rng)) for _ in range(rng.choice((0, 1, 2))))}"
            )
        elif takes and rng.random() < 0.95:
            arguments.append(shown(rng, mild(rng) if rng.random() < 0.5 else junk(rng)))
    # an argument of a process holds no NUL; a call in this process could
    return [a.replace("\u0000", "\\0") for a in arguments]


def shown(rng: random.Random, value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value) if rng.random() < 0.7 else str(value)


# --- one case ---

REACHED = [""]  # how far the case has come: reading, data, models, the first step


class Hang(BaseException):
    """A case that does not end."""


@contextlib.contextmanager
def watched(seconds: int) -> Iterator[None]:
    def rung(number: int, frame: object) -> None:
        raise Hang(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, rung)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(case: Case, folder: Path) -> Told:
    """Run a case in ``folder``, which is the working folder, and compare what is there before and after."""
    from limbeck._cli_run import call

    if case.recipe is not None:
        (folder / "r.yaml").write_bytes(case.recipe)
    before = listing(folder)
    REACHED[0] = "reading"
    out, err = io.StringIO(), io.StringIO()
    code: int | None = None
    wrong = ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with watched(SECONDS):
                code = call(commands(), case.arguments, "limbeck")
        except (Exception, SystemExit, KeyboardInterrupt, Hang) as error:
            last = traceback.extract_tb(error.__traceback__)
            ours = [f for f in last if "limbeck" in f.filename and "/faults/" not in f.filename]
            at = ours[-1] if ours else last[-1]
            wrong = f"{type(error).__name__}: {str(error)[:200]} at {Path(at.filename).name}:{at.lineno}"
    after = listing(folder)
    if not wrong and code not in (0, 2):
        wrong = f"exit code {code}: {err.getvalue()[-300:]}"
    if not wrong and "Traceback (most recent call last)" in err.getvalue():
        wrong = f"a traceback: {err.getvalue()[-300:]}"
    if not wrong and code == 2 and not err.getvalue().strip():
        wrong = "exit code 2 without a word"
    if before != after:
        changed = sorted(k for k in {*before, *after} if before.get(k) != after.get(k))
        wrong = f"{wrong}; files changed: {changed[:5]}".removeprefix("; ")
        for name in changed:
            if name not in before and name.split("/")[0] not in before:
                subprocess.run(["rm", "-rf", "--", name], cwd=folder, check=False)
    return Told(code, wrong, REACHED[0])


@contextlib.contextmanager
def up_to_the_first_step() -> Iterator[None]:
    """Everything is read, built and judged as in a run; what would measure for seconds, or train, is left out."""
    from unittest.mock import patch

    import limbeck._begin
    import limbeck.spine
    import limbeck.sweep

    def noted(target: str, real: Any, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            REACHED[0] = name
            return real(*arguments, **named)

        return patch(target, call)

    with (
        noted("limbeck.spine.make_plan", lambda *a, **k: {}, "the first step"),
        noted("limbeck.sweep.sweep", lambda points, **k: {"rows": [], "vary": list(k["vary"]), "best": None}, "the first step"),
        noted("limbeck._begin.load_data", limbeck._begin.load_data, "data"),
        noted("limbeck._begin.build_model", limbeck._begin.build_model, "models"),
    ):
        yield


def bounded(spare: int) -> None:
    """No more than ``spare`` bytes of address space beyond what this process has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.getrlimit(resource.RLIMIT_AS)[1]))


def work(seed: int, numbers: list[int], report: Any) -> None:
    """Cases in this process, in a folder of their own; ``report(number, told)`` after each."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="r12-") as name, contextlib.chdir(name):
        folder = Path(name)
        os.environ.update(
            HF_HUB_OFFLINE="1", LIMBECK_CACHE=str(folder / "teachers"), LIMBECK_HOME=str(folder.parent / f"{folder.name}-home")
        )
        (folder / "teachers").mkdir()
        furnish(folder)
        with up_to_the_first_step():
            bounded(MEMORY)
            for number in numbers:
                report(number, attempt(case_of(seed, number), folder))
    subprocess.run(["rm", "-rf", str(folder.parent / f"{folder.name}-home")], check=False)


def _child(seed: int, start: int, count: int) -> None:
    """The same in a process of its own: a line a case on the descriptor that was standard output."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    work(seed, list(range(start, start + count)), lambda number, told: lines.write(json.dumps([number, *told]) + "\n"))


def run(count: int | None = None, seed: int = SEED) -> dict[str, Any]:
    """``count`` cases, in processes of ``BATCH``: a crash of one costs the case that it was at."""
    count = COUNT if count is None else count
    codes: Counter[str] = Counter()
    reached: Counter[str] = Counter()
    failed: dict[int, str] = {}
    tried, start, began = 0, 0, time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent / "src"), "TOKENIZERS_PARALLELISM": "false"}
    while start < count:
        size = min(BATCH, count - start)
        command = [sys.executable, __file__, "--child", str(seed), str(start), str(size)]
        rows = 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as done:
            assert done.stdout is not None
            for line in done.stdout:
                number, code, wrong, far = json.loads(line)
                rows, tried = rows + 1, tried + 1
                reached[far] += 1
                codes[str(code)] += not wrong
                if wrong:
                    failed[number] = wrong
                    print(f"R12: case {number}: {wrong}", file=sys.stderr, flush=True)
        start += rows
        if rows < size:
            failed[start] = f"the process died with {done.returncode}"
            tried, start = tried + 1, start + 1
        print(f"R12: {tried:,} of {count:,}, {len(failed)} failed, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    details = {
        "exit codes": dict(sorted(codes.items())),
        "came as far as": dict(sorted(reached.items())),
        "failed": {str(k): v for k, v in failed.items()},
    }
    return {"id": "R12", "promise": PROMISE, "tried": tried, "held": tried - len(failed), "details": details, "seed": seed}


def _one(number: int, seed: int) -> None:
    case = case_of(seed, number)
    print("limbeck", shlex.join(case.arguments))
    print(case.recipe[:3000].decode("utf-8", "replace") if case.recipe is not None else "")
    work(seed, [number], lambda _, told: print(told, file=sys.__stdout__))


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        _child(*map(int, sys.argv[2:5]))
    elif sys.argv[1] == "--count":
        print(json.dumps(run(int(sys.argv[2])), indent=2))
    else:
        _one(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else SEED)
