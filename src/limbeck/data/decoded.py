"""Decoded images of a folder, kept in a file, so that an image is decoded once and not once an epoch."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from limbeck.data.ids import Ids
from limbeck.pixels import pillow

__all__ = ["BUDGET", "Decoded"]

Pixels = npt.NDArray[np.uint8]

BUDGET = 2 << 30
"""Bytes that all such files of a user may take together."""

_IN_USE = 86_400.0  # seconds: a file that was opened within a day may be somebody's
_SUM = 16  # bytes of a checksum


class Decoded:
    """The pixels of images of one size, by row; for a person it is only a faster decoder.

    The file has one slot a row: a 128-bit checksum over the sample's id and its pixels, then the pixels. Nothing else says whether a slot is
    filled, so any number of processes may fill it at once and be killed at any moment. A slot whose checksum does not match (never written,
    damaged, of other content) is as good as empty. The name is a function of the ids, the size and the decoder's version: a file that
    changed has another id, and is read from another file.

    It is not used where there is no room: the files of all folders take at most ``BUDGET`` bytes together and half of the free space. What was
    not opened for a day is removed for a newer one, the oldest first.
    """

    def __init__(self, home: Path, folder: Path, ids: Ids, size: tuple[int, int], channels: int) -> None:
        self.shape = (*size, channels)
        self._slot = _SUM + int(np.prod(self.shape))
        self._bytes = self._slot * len(ids)
        key = xxhash.xxh3_128(np.ascontiguousarray(ids).tobytes())
        key.update(f"1 {self.shape} {pillow().__version__}".encode())
        self._folder = xxhash.xxh3_64_hexdigest(str(folder.resolve()).encode())
        self.path = home / "decoded" / f"{self._folder}-{key.hexdigest()}.u8"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_file"}

    @cached_property
    def _file(self) -> FileIO | None:
        """Opened at the first row, in each process; None where there can be no such file."""
        if not hasattr(os, "pread"):
            return None
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists() and not self._room():
                return None
            file = FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
            if os.fstat(file.fileno()).st_size != self._bytes:
                file.truncate(self._bytes)  # sparse: it grows as it is filled
            os.utime(self.path)
            return file
        return None

    def _room(self) -> bool:
        """Make room for this file: its own predecessors go first, then what was not used for long."""
        here = self.path.parent
        for old in here.glob(f"{self._folder}-*.u8"):
            old.unlink(missing_ok=True)
        others = sorted((p.stat().st_mtime, p.stat().st_size, p) for p in here.glob("*.u8"))
        taken = sum(size for _, size, _ in others)
        for opened, size, path in others:
            if taken + self._bytes > BUDGET and opened < time.time() - _IN_USE:
                path.unlink(missing_ok=True)
                taken -= size
        return taken + self._bytes <= BUDGET and 2 * self._bytes <= shutil.disk_usage(here).free

    def read(self, row: int, of: npt.NDArray[np.uint64]) -> Pixels | None:
        """``(H, W, Ch)``, read-only, of the row whose id is ``of``; None where it is not there."""
        if self._file is None:
            return None
        try:
            slot = os.pread(self._file.fileno(), self._slot, row * self._slot)
        except OSError:
            return None
        if len(slot) != self._slot or slot[:_SUM] != _checksum(of, memoryview(slot)[_SUM:]):
            return None
        return np.frombuffer(slot, np.uint8, offset=_SUM).reshape(self.shape)

    def write(self, row: int, of: npt.NDArray[np.uint64], pixels: Pixels) -> None:
        """Keep one row; a full disk is nobody's problem here."""
        if self._file is None or pixels.shape != self.shape:
            return
        content = pixels.tobytes()
        with contextlib.suppress(OSError):
            os.pwrite(self._file.fileno(), _checksum(of, content) + content, row * self._slot)


def _checksum(of: npt.NDArray[np.uint64], content: bytes | memoryview) -> bytes:
    digest = xxhash.xxh3_128(of.tobytes())
    digest.update(content)
    return digest.digest()
