"""R11: files that somebody made on purpose: refused with a sentence, nothing of them runs, and memory stays bounded.

Every case is the command line in a process of its own, forked from one that has run nothing of it. A canary is a folder that code inside a
hostile file would make; the peak of resident memory is taken from the kernel when the process ends, and compared with that of the same
command on good files.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import random
import re
import resource
import struct
import sys
import tempfile
import tokenize
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "src" / "limbeck"
sys.path[:0] = [p for p in (str(TESTS), str(TESTS.parent / "src")) if p not in sys.path]

PROMISE = "hostile files are refused, a canary is never touched, memory is bounded; no pickle, torch.load, yaml.load, eval outside limbeck convert"
SEED = 11
SPARE = 300 << 20  # bytes of resident memory beyond the same command on good files
LIMIT = 6 << 30  # bytes of address space beyond that: a process that would take the machine ends itself instead

Made = Callable[[Path, random.Random], list[str]]
"""Writes hostile files into a folder, and gives the command line that meets them."""


class Evil:
    """Unpickling it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def canary_of(folder: Path) -> Path:
    return folder / "canary"


def poison(folder: Path, protocol: int = 4) -> bytes:
    return pickle.dumps({"weight": Evil(canary_of(folder))}, protocol=protocol)


def zipped_pickle(folder: Path) -> bytes:
    """A checkpoint as ``torch.save`` writes it, with another pickle inside."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", poison(folder, 2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return out.getvalue()


DISTILL = ["distill", "--teacher", "python:nets.py:teacher", "--student", "python:nets.py:student", "--dry-run", "--data"]
WEIGHTS = [*DISTILL, "npz:pictures.npz", "--set"]
TEXT = ["train", "--student", "hf:bert", "--dry-run", "--data"]


# --- weights ---


def safetensors(header: bytes | dict[str, Any], body: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def _weights(make: Callable[[Path, random.Random], bytes], name: str = "w.safetensors") -> Made:
    def write(folder: Path, rng: random.Random) -> list[str]:
        (folder / name).write_bytes(make(folder, rng))
        return [*WEIGHTS, f"student.weights={name}"]

    return write


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


WEIGHT_FILES: dict[str, Made] = {
    "a pickle named .safetensors": _weights(lambda f, r: poison(f)),
    "an old pickle named .safetensors": _weights(lambda f, r: poison(f, 0)),
    "torch.save named .safetensors": _weights(lambda f, r: zipped_pickle(f)),
    "a pickle named .pth": _weights(lambda f, r: poison(f), "w.pth"),
    "torch.save named .bin": _weights(lambda f, r: zipped_pickle(f), "w.bin"),
    "an empty .safetensors": _weights(lambda f, r: b""),
    "a header of 2^63 bytes": _weights(lambda f, r: safetensors({}, length=2**63)),
    "a header of 2^64 - 1 bytes": _weights(lambda f, r: safetensors({}, length=2**64 - 1)),
    "a header of 100 GB": _weights(lambda f, r: safetensors({}, length=10**11)),
    "a header that is no JSON": _weights(lambda f, r: safetensors(b"{" * 200)),
    "a header nested 100,000 deep": _weights(lambda f, r: safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
    "a header of 90 MB": _weights(lambda f, r: safetensors({"__metadata__": {"a": "x" * (90 << 20)}})),
    "overlapping tensors": _weights(lambda f, r: safetensors({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, bytes(24))),
    "two tensors in one place": _weights(lambda f, r: safetensors({"a": entry(0, 16, [4]), "b": entry(0, 16, [4])}, bytes(16))),
    "a hole between tensors": _weights(lambda f, r: safetensors({"a": entry(0, 16, [4]), "b": entry(32, 48, [4])}, bytes(48))),
    "offsets beyond the end": _weights(lambda f, r: safetensors({"a": entry(0, 10**15, [10**15 // 4])}, bytes(16))),
    "offsets backwards": _weights(lambda f, r: safetensors({"a": entry(16, 0, [4])}, bytes(16))),
    "a shape that overflows": _weights(lambda f, r: safetensors({"a": entry(0, 16, [2**32, 2**32])}, bytes(16))),
    "a shape that is not its size": _weights(lambda f, r: safetensors({"a": entry(0, 16, [400])}, bytes(16))),
    "a type that is none": _weights(lambda f, r: safetensors({"a": entry(0, 16, [4], "EVIL")}, bytes(16))),
    "a tensor twice": _weights(
        lambda f, r: safetensors(
            b'{"a":' + json.dumps(entry(0, 16, [4])).encode() + b',"a":' + json.dumps(entry(0, 16, [4])).encode() + b"}", bytes(16)
        )
    ),
    "two million tensors": _weights(lambda f, r: safetensors({f"t{i}": entry(0, 0, [0]) for i in range(300_000)})),
    "noise named .safetensors": _weights(lambda f, r: r.randbytes(10_000)),
}


# --- arrays ---


def _arrays(**changes: Any) -> Made:
    """``pictures.npz`` with members that are changed: bytes as they are, or arrays with pickles."""

    def write(folder: Path, rng: random.Random) -> list[str]:
        with np.load(folder / "pictures.npz") as whole:
            good = {name: npy(whole[name]) for name in whole.files}
        with zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, value in {**good, **changes}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as f:
                    for piece in value(folder) if callable(value) else [value]:
                        f.write(piece)
        return [*DISTILL, "npz:x.npz"]

    return write


def npy(array: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, allow_pickle=True)
    return out.getvalue()


def npy_header(descr: str, shape: str, order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    text += " " * (63 - (len(text) + 10) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def objects(folder: Path) -> list[bytes]:
    return [npy(np.array([Evil(canary_of(folder))] * 3, dtype=object))]


def _file(name: str, make: Callable[[Path, random.Random], bytes], *arguments: str) -> Made:
    def write(folder: Path, rng: random.Random) -> list[str]:
        (folder / name).write_bytes(make(folder, rng))
        return list(arguments)

    return write


def zeros(count: int, header: bytes) -> Callable[[Path], Any]:
    return lambda folder: (header, *(bytes(1 << 20) for _ in range(count >> 20)))


LOGITS = ["distill", "--teacher", "logits:l.npy", "--student", "python:nets.py:student", "--data", "npz:pictures.npz", "--dry-run"]
TABLE = ["distill", "--teacher", "logits:l.parquet", "--student", "python:nets.py:student", "--data", "npz:pictures.npz", "--dry-run"]

ARRAY_FILES: dict[str, Made] = {
    "an array of objects": _arrays(train_x=objects),
    "labels of objects": _arrays(train_y=objects),
    "classes of objects": _arrays(test_y=objects),
    "a header that would run": _arrays(train_x=npy_header("__import__('os').mkdir('canary')", "(3,)")),
    "a header of another type": _arrays(train_x=npy_header("'|O'", "(3,)") + b"cos\nsystem\n(S'touch canary'\ntR."),
    "a header of a huge shape": _arrays(train_x=npy_header("'|u1'", f"({10**12}, 8, 8)")),
    "a header of a negative shape": _arrays(train_x=npy_header("'|u1'", "(-1, 8, 8)")),
    "a shape that overflows": _arrays(train_x=npy_header("'|u1'", f"({2**62}, {2**62})")),
    "a zip bomb of 1 GB": _arrays(train_x=zeros(1 << 30, npy_header("'|u1'", f"({1 << 24}, 8, 8)"))),
    "a zip bomb beside the arrays": _arrays(unlabelled_x=zeros(1 << 30, npy_header("'|u1'", f"({1 << 24}, 8, 8)"))),
    "a pickle named .npz": _file("x.npz", lambda f, r: poison(f), *DISTILL, "npz:x.npz"),
    "torch.save named .npz": _file("x.npz", lambda f, r: zipped_pickle(f), *DISTILL, "npz:x.npz"),
    "noise named .npz": _file("x.npz", lambda f, r: r.randbytes(10_000), *DISTILL, "npz:x.npz"),
    "a pickle named .npy": _file("l.npy", lambda f, r: poison(f), *LOGITS),
    "logits of objects": _file("l.npy", lambda f, r: objects(f)[0], *LOGITS),
    "logits of a huge shape": _file("l.npy", lambda f, r: npy_header("'<f4'", f"({10**13}, 3)"), *LOGITS),
    "a npz named .npy": _file("l.npy", lambda f, r: (f / "pictures.npz").read_bytes(), *LOGITS),
}


# --- tables ---


def arrow_garbage(kind: str) -> Callable[[Path, random.Random], bytes]:
    def make(folder: Path, rng: random.Random) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"id": [f"{i:032x}" for i in range(48)], "logits": [[0.5, 0.25, 1.0]] * 48})
        out = io.BytesIO()
        pq.write_table(table, out)
        raw = bytearray(out.getvalue())
        if kind == "footer":
            raw[-8:-4] = struct.pack("<I", 2**31 - 1)
        elif kind == "noise":
            for _ in range(40):
                raw[rng.randrange(4, len(raw) - 8)] = rng.randrange(256)
        elif kind == "cut":
            del raw[len(raw) // 2 : -8]
        elif kind == "pages":
            for i in range(4, 200):
                raw[i] = 0xFF
        return bytes(raw)

    return make


def wide(folder: Path, rng: random.Random) -> bytes:
    """A few kB that say 2,000 million rows of one value."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    row = pa.table({"text": pa.array(["x" * 1000]).dictionary_encode().take(pa.array([0] * 4_000_000)), "label": ["a"] * 4_000_000})
    pq.write_table(row, out, compression="zstd", use_dictionary=True, row_group_size=4_000_000)
    return out.getvalue()


TABLE_FILES: dict[str, Made] = {
    **{f"Parquet with a bad {kind}": _file("l.parquet", arrow_garbage(kind), *TABLE) for kind in ("footer", "noise", "cut", "pages")},
    "a pickle named .parquet": _file("l.parquet", lambda f, r: poison(f), *TABLE),
    "noise named .parquet": _file("d.parquet", lambda f, r: r.randbytes(10_000), *TEXT, "parquet:d.parquet"),
    "a Parquet bomb": _file("d.parquet", wide, *TEXT, "parquet:d.parquet"),
    "CSV with a field of 64 MB": _file(
        "d.csv", lambda f, r: b"text,label\n" + b"x" * (64 << 20) + b",a\n" + b"y,b\n" * 30, *TEXT, "csv:d.csv"
    ),
    "CSV with an open quote": _file("d.csv", lambda f, r: b'text,label\n"x,a\n' + b"y,b\n" * 100_000, *TEXT, "csv:d.csv"),
    "CSV of a million columns": _file("d.csv", lambda f, r: b",".join(b"c%d" % i for i in range(1_000_000)) + b"\n", *TEXT, "csv:d.csv"),
    "CSV with NULs": _file("d.csv", lambda f, r: b"text,label\n" + b"\0" * 100_000 + b"\n", *TEXT, "csv:d.csv"),
    "a pickle named .csv": _file("d.csv", lambda f, r: poison(f), *TEXT, "csv:d.csv"),
    "JSON nested 100,000 deep": _file(
        "d.jsonl", lambda f, r: b'{"text":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", *TEXT, "jsonl:d.jsonl"
    ),
    "JSON with a number of a million digits": _file(
        "d.jsonl", lambda f, r: b'{"text": "a", "label": ' + b"9" * 1_000_000 + b"}\n", *TEXT, "jsonl:d.jsonl"
    ),
    "noise named .jsonl": _file("d.jsonl", lambda f, r: r.randbytes(10_000), *TEXT, "jsonl:d.jsonl"),
}


# --- recipes ---


def _recipe(text: str) -> Made:
    return _file("r.yaml", lambda f, r: text.encode(), "distill", "r.yaml", "--dry-run")


RECIPE_FILES: dict[str, Made] = {
    "a tag that runs": _recipe("teacher: !!python/object/apply:os.mkdir [canary]\n"),
    "a tag that builds": _recipe("teacher: !!python/object/new:os.mkdir [canary]\n"),
    "a tag of a name": _recipe("teacher: !!python/name:os.mkdir\n"),
    "a tag with a prefix": _recipe("%TAG ! tag:yaml.org,2002:python/\n---\nteacher: !object/apply:os.mkdir [canary]\n"),
    "a bomb of aliases": _recipe(
        "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    ),
    "a bomb of merges": _recipe(
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    ),
    "an alias inside itself": _recipe("a: &a [*a]\n"),
    "a merge of itself": _recipe("a: &a {<<: *a}\n"),
    "duplicate keys": _recipe("student: python:nets.py:student\nstudent: python:nets.py:teacher\n"),
    "nested a million deep": _recipe("[" * 900_000),
    "a megabyte of one word": _recipe("x" * 999_999),
    "two million bytes": _recipe("x: " + "y" * 2_000_000),
    "a pickle named .yaml": _file("r.yaml", lambda f, r: poison(f, 0), "distill", "r.yaml", "--dry-run"),
    "a number of a million digits": _recipe("seed: " + "9" * 900_000 + "\n"),
    "a file without an end": lambda folder, rng: ["distill", "/dev/zero", "--dry-run"],
    "random bytes without an end": lambda folder, rng: ["distill", "/dev/urandom", "--dry-run"],
}


# --- folders of the hub ---


def _hub(change: Callable[[Path], None], *, code: bool = True) -> Made:
    def write(folder: Path, rng: random.Random) -> list[str]:
        if code:
            lines = f"import os\nos.mkdir({str(canary_of(folder))!r})\nclass C: pass\n"
            for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "setup.py", "__init__.py"):
                (folder / "bert" / name).write_text(lines)
        change(folder / "bert")
        return [*TEXT, "csv:reviews.csv"]

    return write


def edit(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**found, **values}))


AUTO = {
    "AutoConfig": "configuration_evil.C",
    "AutoModel": "modeling_evil.C",
    "AutoModelForSequenceClassification": "modeling_evil.C",
    "AutoTokenizer": ["tokenization_evil.C", "tokenization_evil.C"],
}


def _pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(zipped_pickle(folder.parent))


def _pickled_too(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(poison(folder.parent))
    (folder / "training_args.bin").write_bytes(poison(folder.parent))
    (folder / "model.safetensors").write_bytes(poison(folder.parent))


def _outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.bin")
    index = {"metadata": {}, "weight_map": {"classifier.weight": "../outside.bin", "classifier.bias": "/etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


HUB_FOLDERS: dict[str, tuple[Made, bool]] = {
    # the second: a good student remains where what is hostile is left out, so that the command may go on
    "auto_map of an unknown type": (_hub(lambda f: edit(f, "config.json", auto_map=AUTO, model_type="evil", architectures=["C"])), False),
    "auto_map of a known type": (_hub(lambda f: edit(f, "config.json", auto_map=AUTO)), True),
    "auto_map of the tokenizer": (_hub(lambda f: edit(f, "tokenizer_config.json", auto_map=AUTO, tokenizer_class="C")), True),
    "trust_remote_code in the files": (
        _hub(
            lambda f: (
                edit(f, "config.json", auto_map=AUTO, trust_remote_code=True),
                edit(f, "tokenizer_config.json", trust_remote_code=True),
            )[0]
        ),
        True,
    ),
    "weights as a pickle only": (_hub(_pickled_only, code=False), False),
    "a pickle named model.safetensors": (_hub(_pickled_too, code=False), False),
    "an index to files outside": (_hub(_outside, code=False), False),
    "a tokenizer of noise": (_hub(lambda f: (f / "tokenizer.json").write_bytes(os.urandom(10_000)) and None, code=False), False),
    "a tokenizer nested 100,000 deep": (_hub(lambda f: (f / "tokenizer.json").write_text("[" * 100_000) and None, code=False), False),
    "a config of 10^12 layers": (_hub(lambda f: edit(f, "config.json", num_hidden_layers=10**12), code=False), False),
    "a config with a vocabulary of 10^12": (_hub(lambda f: edit(f, "config.json", vocab_size=10**12), code=False), False),
    "a config that is a list": (_hub(lambda f: (f / "config.json").write_text("[1]") and None, code=False), False),
    "a config nested 100,000 deep": (_hub(lambda f: (f / "config.json").write_text("[" * 100_000) and None, code=False), False),
}


# --- runs and their checkpoints ---


def _run(change: Callable[[Path], None], *arguments: str) -> Made:
    """A finished run as the teacher, with something in it replaced."""

    def write(folder: Path, rng: random.Random) -> list[str]:
        change(folder / "run")
        return list(arguments) or [
            "distill",
            "--teacher",
            "run:run",
            "--student",
            "python:nets.py:student",
            "--data",
            "npz:pictures.npz",
            "--dry-run",
        ]

    return write


def _resealed(name: str, make: Callable[[Path], bytes]) -> Callable[[Path], None]:
    """The file replaced and its hash in ``model.json`` set right, as somebody would who wants it to be believed."""

    def change(run: Path) -> None:
        import hashlib

        raw = make(run)
        (run / "student" / name).write_bytes(raw)
        about = json.loads((run / "student" / "model.json").read_text())
        about["files"][name] = hashlib.sha256(raw).hexdigest()
        (run / "student" / "model.json").write_text(json.dumps(about))

    return change


def _about(**values: Any) -> Callable[[Path], None]:
    return lambda run: edit(run / "student", "model.json", **values)


RUNS: dict[str, Made] = {
    "a pickle as the run's weights": _run(lambda run: (run / "student" / "model.safetensors").write_bytes(poison(run.parent)) and None),
    "a resealed pickle as the run's weights": _run(_resealed("model.safetensors", lambda run: poison(run.parent))),
    "a resealed torch.save as the run's weights": _run(_resealed("model.safetensors", lambda run: zipped_pickle(run.parent))),
    "a run that names a file outside": _run(_about(files={"../../../etc/passwd": "0" * 64})),
    "a run of a type that is none": _run(_about(dtype="load")),
    "a run of a kind that is none": _run(_about(kind="os")),
    "a run with a class that is a function": _run(_about(kind="hf", build={"class": "utils"})),
    "a run with preprocessing of a wrong kind": _run(_about(preprocessing={"kind": "text", "tokenizer": "/", "inputs": []})),
    "a run with preprocessing of wrong keys": _run(_about(preprocessing={"kind": "image", "x": 1})),
    "a run with a list of files": _run(_about(files=[1, 2])),
    "a run with classes of a wrong type": _run(_about(classes=7)),
    "a run whose model.json is nested deep": _run(lambda run: (run / "student" / "model.json").write_text("[" * 100_000) and None),
    "a run whose model.json is noise": _run(lambda run: (run / "student" / "model.json").write_bytes(os.urandom(5000)) and None),
    "a report of a run whose metrics are a list": _run(lambda run: (run / "metrics.json").write_text("[]") and None, "report", "run"),
    "a report of a run whose metrics are noise": _run(
        lambda run: (run / "metrics.json").write_bytes(os.urandom(500)) and None, "report", "run"
    ),
    "an evaluation of a run whose recipe is a tag": _run(
        lambda run: (run / "recipe.yaml").write_text("teacher: !!python/object/apply:os.mkdir [canary]\n") and None, "evaluate", "run"
    ),
}


def _checkpoint(change: Callable[[Path, Path], None]) -> Made:
    """A run stopped in the middle, whose newest checkpoint is replaced: the one before it is taken, and it says so."""

    def write(folder: Path, rng: random.Random) -> list[str]:
        import torch

        from limbeck import checkpoint

        at = folder / "state"
        checkpoint.save(at, 1, {"student": {"w": torch.ones(3)}})
        checkpoint.save(at, 2, {"student": {"w": torch.zeros(3)}})
        change(at / "step-00000002", folder)
        return ["CHECKPOINT", str(at)]

    return write


def _sealed_checkpoint(name: str, make: Callable[[Path], bytes]) -> Made:
    def change(step: Path, folder: Path) -> None:
        import hashlib

        raw = make(folder)
        (step / name).write_bytes(raw)
        manifest = json.loads((step / "manifest.json").read_text())
        manifest["files"][name] = hashlib.sha256(raw).hexdigest()
        (step / "manifest.json").write_text(json.dumps(manifest))

    return _checkpoint(change)


CHECKPOINTS: dict[str, Made] = {
    "a pickle as a checkpoint": _checkpoint(lambda step, f: (step / "state.safetensors").write_bytes(poison(f)) and None),
    "a sealed pickle as a checkpoint": _sealed_checkpoint("state.safetensors", poison),
    "a sealed torch.save as a checkpoint": _sealed_checkpoint("state.safetensors", zipped_pickle),
    "a sealed checkpoint with a giant header": _sealed_checkpoint("state.safetensors", lambda f: safetensors({}, length=2**62)),
    "a sealed skeleton that names what is not there": _sealed_checkpoint("state.json", lambda f: b'{"dict": [["a", {"tensor": "/x"}]]}'),
    "a sealed skeleton of a wrong form": _sealed_checkpoint("state.json", lambda f: b'{"os": 1, "b": 2}'),
    "a sealed skeleton that is a number": _sealed_checkpoint("state.json", lambda f: b'{"dict": 3}'),
    "a sealed skeleton nested 100,000 deep": _sealed_checkpoint("state.json", lambda f: b'{"list":[' * 100_000),
    "a manifest that is a list": _checkpoint(lambda step, f: (step / "manifest.json").write_text("[]") and None),
    "a manifest nested 100,000 deep": _checkpoint(lambda step, f: (step / "manifest.json").write_text("[" * 100_000) and None),
    "a manifest of noise": _checkpoint(lambda step, f: (step / "manifest.json").write_bytes(os.urandom(900)) and None),
    "a manifest of a text as step": _checkpoint(lambda step, f: edit(step, "manifest.json", step="two")),
}

CASES: dict[str, tuple[Made, bool]] = {
    **{name: (made, False) for group in (WEIGHT_FILES, ARRAY_FILES, TABLE_FILES, RECIPE_FILES, RUNS) for name, made in group.items()},
    **{name: (made, True) for name, made in CHECKPOINTS.items()},
    **HUB_FOLDERS,
    "CSV with NULs": (TABLE_FILES["CSV with NULs"], False),
}
# Large, but nothing is wrong with it: memory alone is judged.
MAY_GO_ON = {"CSV with a field of 64 MB", "CSV with an open quote", "Parquet with a bad noise"}


# --- in a process of its own ---


def _child(folder: str, arguments: list[str]) -> None:
    os.chdir(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, used + LIMIT))
    if arguments[0] == "CHECKPOINT":
        from limbeck import checkpoint

        said: list[str] = []
        found = checkpoint.load_newest(Path(arguments[1]), said.append)
        assert found is not None
        assert found[0] == 1, found
        assert float(found[1]["student"]["w"].sum()) == 3.0
        print(" ".join(said), file=sys.stderr)
        sys.exit(0)
    from limbeck.cli import main

    main(arguments)


def attempt(folder: Path, arguments: list[str]) -> tuple[int, str, int]:
    """``(exit code, what it said, peak resident bytes)`` of a command line in a process of its own, forked from this one."""
    for module in ("limbeck.spine", "limbeck.cli", "transformers", "pyarrow.parquet", "safetensors.torch", "limbeck.report"):
        importlib.import_module(module)
    said = folder / "said.txt"
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code: Any = 1
        try:
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.environ.update(HF_HUB_OFFLINE="1", LIMBECK_CACHE=str(folder / "teachers"), LIMBECK_HOME=str(folder / "home"))
            _child(str(folder), arguments)
        except SystemExit as left:
            code = left.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), said.read_text(encoding="utf-8", errors="replace"), usage.ru_maxrss * 1024


def furnish(folder: Path) -> None:
    """Good files, for every kind of hostile one to stand among."""
    import contextlib

    from models_support import text_folder
    from running import limbeck, make_folder

    make_folder(folder)
    (folder / "reviews.csv").write_text("text,label\n" + "".join(f"w{i % 9} a,{'ab'[i % 2]}\n" for i in range(40)))
    text_folder(folder / "bert")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        options = ["--epochs", "1", "--set", "export=[]", "--set", "train.precision=float32"]
        assert limbeck("train", "--student", "python:nets.py:teacher", "--data", "npz:pictures.npz", "--out", "run", *options) == 0


def judge(name: str, made: Made, goes_on: bool, stock: Path, rng: random.Random, usual: int) -> tuple[str, int]:
    """What did not hold of a case, or an empty text; and its peak of memory."""
    import shutil

    with tempfile.TemporaryDirectory(prefix="r11-") as place:
        folder = Path(place) / "x"
        shutil.copytree(stock, folder)
        arguments = made(folder, rng)
        before = {p for p in folder.rglob("*") if "__pycache__" not in p.parts}
        code, said, peak = attempt(folder, arguments)
        wrong = []
        if canary_of(folder).exists():
            wrong.append("THE CANARY WAS TOUCHED")
        if "Traceback" in said:
            wrong.append(f"a traceback: {' '.join(said.split())[-400:]}")
        if code != 2 and not ((goes_on or name in MAY_GO_ON) and code == 0):
            wrong.append(f"exit code {code}: {' '.join(said.split())[-300:]}")
        if code == 2 and not said.strip():
            wrong.append("no sentence")
        if len(said) > 20_000:
            wrong.append(f"{len(said):,} characters were said")
        own = sum(p.stat().st_size for p in before if p.is_file())
        if peak > usual + SPARE + 4 * own:
            wrong.append(f"{peak >> 20:,} MiB of memory, and {usual >> 20:,} on good files")
        left = {p for p in folder.rglob("*") if "__pycache__" not in p.parts} - before - {folder / "said.txt"}
        left = {p for p in left if p.relative_to(folder).parts[0] not in ("home", "teachers")}
        if left:
            wrong.append(f"left behind: {sorted(str(p.relative_to(folder)) for p in left)[:5]}")
        return "; ".join(wrong), peak


def forbidden(text: str) -> list[str]:
    """What a source does that only ``limbeck convert`` may: comments and texts left out."""
    kinds = (tokenize.COMMENT, tokenize.STRING, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
    kinds += tuple(getattr(tokenize, n) for n in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END") if hasattr(tokenize, n))
    words = [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in kinds]
    code = " ".join(words)
    patterns = {
        "pickle": r"(?<![\w.] )\b(import|from) (c?[pP]ickle|dill|cloudpickle|joblib|shelve|marshal)\b|\bpickle \.",
        "torch.load": r"\btorch \. load\b|\bfrom torch import [^\n]*\bload\b|\btorch \. serialization\b",
        "yaml.load": r"\byaml \. (load|load_all|full_load|unsafe_load|unsafe_load_all|full_load_all|UnsafeLoader|FullLoader|Loader)\b",
        "eval": r"(?<!\. )(?<!def )\b(eval|exec|compile) \(",
        "allow_pickle": r"allow_pickle = (?!False)",
        "trust_remote_code": r"trust_remote_code = (?!False)",
        "np.load": r"\bnp \. load \((?!.{0,80}allow_pickle = False)",
    }
    return [name for name, pattern in patterns.items() if re.search(pattern, code)]


def in_the_source() -> dict[str, list[str]]:
    found = {
        str(p.relative_to(SOURCE)): forbidden(p.read_text(encoding="utf-8")) for p in sorted(SOURCE.rglob("*.py")) if p.name != "convert.py"
    }
    return {name: what for name, what in found.items() if what}


def run(count: int | None = None, seed: int = SEED, only: str = "") -> dict[str, Any]:
    """Every case (or ``count`` of them), each in a process of its own."""
    rng = random.Random(seed)
    names = [n for n in CASES if only in n]
    if count is not None:
        names = rng.sample(names, min(count, len(names)))
    failed: dict[str, str] = {}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="r11-") as place:
        stock = Path(place) / "stock"
        furnish(stock)
        plain = [
            ["distill", "--teacher", "run:run", "--student", "python:nets.py:student", "--data", "npz:pictures.npz", "--dry-run"],
            [*TEXT, "csv:reviews.csv"],
        ]
        usual = 0
        for arguments in plain:
            code, said, peak = attempt(stock, arguments)
            assert code == 0, said
            usual = max(usual, peak)
        for number, name in enumerate(names):
            made, goes_on = CASES[name]
            wrong, peaks[name] = judge(name, made, goes_on, stock, random.Random(f"{seed}:{name}"), usual)
            if wrong:
                failed[name] = wrong
            print(f"R11: {number + 1} of {len(names)}: {name}: {wrong or 'held'} ({peaks[name] >> 20} MiB)", file=sys.stderr, flush=True)
    source = in_the_source()
    if source:
        failed["the source"] = str(source)
    details = {
        "most memory, MiB": max(peaks.values(), default=0) >> 20, "good files, MiB": usual >> 20,
        "sources read": len(list(SOURCE.rglob("*.py"))), "failed": failed
    }  # fmt: skip
    tried = len(names) + 1
    return {"id": "R11", "promise": PROMISE, "tried": tried, "held": tried - len(failed), "details": details, "seed": seed}


if __name__ == "__main__":
    print(json.dumps(run(only=sys.argv[1] if len(sys.argv) > 1 else ""), indent=2))
