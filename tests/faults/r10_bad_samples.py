"""R10: image files that are not what they seem: the policy is kept, the list of the bad ones is exact, and memory stays flat.

By default every bad file is told at once before anything is written; with ``data.corrupt: skip`` the run goes on without them and lists them in
``skipped.csv``, and the samples, their ids and the splits are those of a folder in which they never were. Files that are unusual and whole (CMYK,
16 bit, one pixel, animated, turned by EXIF, another format than named) are samples like any other.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).parents[1]
sys.path[:0] = [p for p in (str(TESTS), str(TESTS.parent / "src")) if p not in sys.path]

PROMISE = "1 % of 5,000 image files bad or odd in every way: policy kept, exact list, memory flat"
SEED, COUNT = 10, 5000
SPARE = 64 << 20  # bytes of resident memory beyond good files only
CLASSES = ("ant", "bee", "cat", "dog", "eel")

NET = """
from torch import nn

def student(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, num_classes))
"""


def picture(rng: np.random.Generator, label: int, size: tuple[int, int] = (40, 32), channels: int = 3) -> Any:
    from PIL import Image

    pixels = rng.integers(0, 90, (*size, channels), dtype=np.uint8)
    pixels[label * 5 : label * 5 + 4] += 120
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0])


def encoded(image: Any, form: str, **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **how)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def enormous(side: int, bits: int = 8) -> bytes:
    """A PNG of a few hundred kB that has ``side`` x ``side`` grey pixels."""
    squeeze = zlib.compressobj(9)
    row = b"\0" + bytes(side * bits // 8)
    body = b"".join([*(squeeze.compress(row) for _ in range(side)), squeeze.flush()])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, 0, 0, 0, 0))
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


def claimed(side: int) -> bytes:
    """A PNG of a few bytes that says it has ``side`` x ``side`` pixels."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def text_bomb() -> bytes:
    """A picture of one pixel with a comment of 512 MB."""
    squeeze = zlib.compressobj(9)
    comment = b"".join([*(squeeze.compress(bytes(1 << 20)) for _ in range(512)), squeeze.flush()])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)) + chunk(b"zTXt", b"c\0\0" + comment)
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(canary) (w) file closefile showpage\n"

BAD = (
    "truncated",
    "cut at the head",
    "empty",
    "text",
    "noise",
    "postscript",
    "a page",
    "enormous",
    "claims to be enormous",
    "a comment of 512 MB",
    "a broken chunk",
)
ODD = (
    "CMYK",
    "16 bit",
    "16 bit RGB",
    "float",
    "one pixel",
    "animated",
    "palette with transparency",
    "turned",
    "alpha",
    "one bit",
    "PNG named .jpg",
    "long and thin",
)


def make(kind: str, rng: np.random.Generator, label: int, big: dict[str, bytes]) -> bytes:
    """The bytes of one file."""
    from PIL import Image

    image = picture(rng, label)
    whole = encoded(image, "JPEG")
    match kind:
        case "good":
            return whole
        case "truncated":
            return whole[: int(len(whole) * rng.uniform(0.4, 0.9))]
        case "cut at the head":
            return whole[20:]
        case "empty":
            return b""
        case "text":
            return b"this is no image, it is a page that says so " * 5
        case "noise":
            return rng.bytes(3000)
        case "postscript":
            return POSTSCRIPT + rng.bytes(8).hex().encode()
        case "a page":
            return b"<html><body>404 not found</body></html>" + rng.bytes(4).hex().encode()
        case "enormous" | "claims to be enormous" | "a comment of 512 MB":
            return big[kind]
        case "a broken chunk":
            raw = bytearray(encoded(image, "PNG"))
            at = raw.index(b"IDAT") + 30
            raw[at : at + 40] = rng.bytes(40)
            return bytes(raw)
        case "CMYK":
            return encoded(image.convert("CMYK"), "JPEG")
        case "16 bit":
            return encoded(Image.fromarray(rng.integers(0, 65535, (40, 32), dtype=np.uint16)), "PNG")
        case "16 bit RGB":
            rows = b"".join(b"\0" + rng.bytes(32 * 6) for _ in range(40))
            head = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 40, 16, 2, 0, 0, 0))
            return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        case "float":
            return encoded(Image.fromarray(rng.random((40, 32), dtype=np.float32) * 255), "TIFF")
        case "one pixel":
            return encoded(Image.fromarray(rng.integers(0, 255, (1, 1, 3), dtype=np.uint8)), "PNG")
        case "animated":
            frames = [picture(rng, label) for _ in range(40)]
            return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        case "palette with transparency":
            return encoded(image.convert("P"), "PNG", transparency=bytes(range(256)))
        case "turned":
            exif = Image.Exif()
            exif[0x0112] = int(rng.integers(2, 9))
            return encoded(image, "JPEG", exif=exif)
        case "alpha":
            return encoded(picture(rng, label, channels=4), "PNG")
        case "one bit":
            return encoded(image.convert("1"), "PNG")
        case "PNG named .jpg":
            return encoded(image, "PNG")
        case "long and thin":
            return encoded(picture(rng, label, (30, 4000)), "PNG")
    raise AssertionError(kind)


def plan_of(count: int, seed: int, share: float) -> dict[str, str]:
    """``file name -> kind``: half of ``share`` bad, half of it odd, the rest good."""
    rng = random.Random(seed)
    names = []
    for split, part in (("train", 0.8), ("test", 0.2)):
        for i in range(int(count * part)):
            names.append(f"{split}/{CLASSES[i % len(CLASSES)]}/{i:05d}.jpg")
    kinds = dict.fromkeys(names, "good")
    strange = rng.sample(names, max(len(BAD) + len(ODD), int(share * count)))
    turn = [k for pair in zip(BAD * 99, ODD * 99, strict=False) for k in pair]
    kinds.update(zip(strange, turn, strict=False))
    return kinds


def furnish(root: Path, kinds: dict[str, str], seed: int, keep: tuple[str, ...] | None = None) -> None:
    """Write the files; ``keep``: only those kinds."""
    big = {"enormous": enormous(24_000), "claims to be enormous": claimed(60_000), "a comment of 512 MB": text_bomb()}
    if not any(kind in big for kind in kinds.values()):
        big = {}
    for name, kind in kinds.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if keep is None or kind in keep:
            path = root / "photos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make(kind, rng, CLASSES.index(name.split("/")[1]), big))
    (root / "nets.py").write_text(NET)


_MEASURED = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from limbeck.cli import main
try:
    main(sys.argv[2:])
except SystemExit as left:
    code = left.code
peak = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
Path(sys.argv[1]).write_text(json.dumps({"code": code, "peak": 1024 * peak}))
"""


def limbeck(root: Path, *arguments: str) -> tuple[int, int, str]:
    """``(exit code, peak of resident bytes, what was said)`` of a command line in a process of its own."""
    environment = {
        **os.environ, "PYTHONPATH": str(TESTS.parent / "src"), "OMP_NUM_THREADS": "1", "LIMBECK_HOME": str(root / "home"),
        "LIMBECK_CACHE": str(root / "teachers"),
    }  # fmt: skip
    told = root / "told.json"
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(told), *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    found = json.loads(told.read_text()) if told.is_file() else {"code": done.returncode, "peak": 0}
    told.unlink(missing_ok=True)
    return found["code"], found["peak"], done.stderr + done.stdout


TRAIN = ("train", "--student", "python:nets.py:student", "--data", "imagefolder:photos", "--epochs", "1", "--batch-size", "64",
"--set", "export=[]", "--set",
         "train.precision=float32", "--set", "train.workers=0", "--set", "student.options.resolution=32")  # fmt: skip


def ids_of(root: Path) -> dict[str, list[Any]]:
    """Ids and labels of every split, and the fingerprint, as the data layer has them."""
    from limbeck.data import load_data
    from limbeck.recipe import DataSpec

    os.environ["LIMBECK_HOME"] = str(root / "home")
    data = load_data(DataSpec(source="imagefolder:photos", corrupt="skip"), "image-classification", root)
    found: dict[str, list[Any]] = {
        s.name: sorted(zip(s.ids.tolist(), s.labels.tolist(), strict=True)) for s in (data.train, data.valid, data.test)
    }
    found["fingerprint"] = [data.fingerprint]
    return found


def run(count: int | None = None, seed: int = SEED, share: float = 0.01) -> dict[str, Any]:
    """``count`` files of which ``share`` are strange; whole trainings beside a folder of good and odd ones only."""
    import xxhash

    count = COUNT if count is None else count
    kinds = plan_of(count, seed, share)
    bad = {name for name, kind in kinds.items() if kind in BAD}
    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="r10-") as place:
        root, clean, plain = Path(place) / "all", Path(place) / "clean", Path(place) / "plain"
        furnish(root, kinds, seed)
        furnish(clean, kinds, seed, ("good", *ODD))
        furnish(plain, kinds, seed, ("good",))
        before = sorted(str(p) for p in root.rglob("*"))

        code, refused_peak, said = limbeck(root, *TRAIN, "--out", "run")
        named = {name for name in kinds if f"photos/{name}: cannot be read as an image" in " ".join(said.split())}
        if code != 2 or "Traceback" in said:
            wrong["refused by default"] = f"exit code {code}: {said[-500:]}"
        if named != bad:
            wrong["all are named at once"] = (
                f"not named: {sorted(bad - named)[:5]}; named: {sorted((n, kinds[n]) for n in named - bad)[:5]}"
            )
        if sorted(str(p) for p in root.rglob("*") if p.relative_to(root).parts[0] != "home" and "__pycache__" not in p.parts) != before:
            wrong["nothing is written"] = "files changed"

        shutil.rmtree(root / "home", ignore_errors=True)
        code, peak, said = limbeck(root, *TRAIN, "--set", "data.corrupt=skip", "--out", "run")
        if code != 0:
            wrong["skipped when asked"] = f"exit code {code}: {said[-800:]}"
        _, good_peak, _ = limbeck(clean, *TRAIN, "--out", "run")
        _, plain_peak, _ = limbeck(plain, *TRAIN, "--out", "run")
        for what, found in (("skipping", peak), ("refusing", refused_peak)):
            if found > plain_peak + SPARE:
                wrong[f"memory is flat while {what}"] = f"{found >> 20} MiB, and {plain_peak >> 20} on good files"
        listed_file = root / "run" / "skipped.csv"
        rows = list(csv.DictReader(listed_file.open())) if listed_file.is_file() else []
        told = [str(Path(r["sample"]).relative_to(root / "photos")) for r in rows]
        if sorted(told) != sorted(bad) or not all(r["why"] for r in rows):
            wrong["the list is exact"] = f"{len(told)} listed, {len(bad)} bad; {sorted(set(told) ^ bad)[:5]}"

        with_bad, without = ids_of(root), ids_of(clean)
        if with_bad != without:
            wrong["ids and splits are those of the good ones"] = str([k for k in without if with_bad.get(k) != without[k]])
        digests = Counter(xxhash.xxh3_128_hexdigest((root / "photos" / n).read_bytes()) for n in kinds if n not in bad)
        ours = Counter(f"{high:016x}{low:016x}" for s in ("train", "valid", "test") for (high, low), _ in with_bad[s])
        if digests != ours:
            wrong["every good and every odd file is a sample"] = f"{sum(ours.values())} samples, {sum(digests.values())} files"
        if (root / "canary").exists():
            wrong["nothing in a file runs"] = "the canary was touched"
    promises = 8
    details = {
        "files": len(kinds), "bad": len(bad), "odd and kept": sum(k in ODD for k in kinds.values()),
        "kinds": dict(sorted(Counter(k for k in kinds.values() if k != "good").items())),
        "peak MiB": {"good files": plain_peak >> 20, "good and odd": good_peak >> 20, "with bad ones, skipped": peak >> 20,
        "with bad ones, refused": refused_peak >> 20},
        "promises looked at": promises, "failed": wrong,
    }  # fmt: skip
    tried = len(bad) + sum(k in ODD for k in kinds.values())
    off = {n for n in bad if n not in told or n not in named} | (set(told) - bad)
    return {
        "id": "R10",
        "promise": PROMISE,
        "tried": tried,
        "held": tried - len(off) if not wrong else min(tried - len(off), tried - len(wrong)),
        "details": details,
        "seed": seed,
    }


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]) if len(sys.argv) > 1 else None), indent=2))
