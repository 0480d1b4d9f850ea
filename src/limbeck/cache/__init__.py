"""A teacher that has already spoken: its answers on disk, keyed by sample content and view, checked before they are used."""

from __future__ import annotations

from limbeck.cache._codec import Sparse, Stored
from limbeck.cache._directory import Place, create, default_root, directories, nearest_other, recall, refuse_orphans
from limbeck.cache._fill import Request, fill, missing, tidy
from limbeck.cache._manage import listing, remove, verify
from limbeck.cache._manifest import FIGURES, CacheDamaged, Manifest, read_figures, read_manifest, read_sealed, seal
from limbeck.cache._store import Reader, row_bytes
from limbeck.cache._table import TableTeacher, write_ids
from limbeck.cache._teacher import CachedTeacher, compare

__all__ = [
    "FIGURES",
    "CacheDamaged",
    "CachedTeacher",
    "Manifest",
    "Place",
    "Reader",
    "Request",
    "Sparse",
    "Stored",
    "TableTeacher",
    "compare",
    "create",
    "default_root",
    "directories",
    "fill",
    "listing",
    "missing",
    "nearest_other",
    "read_figures",
    "read_manifest",
    "read_sealed",
    "recall",
    "refuse_orphans",
    "remove",
    "row_bytes",
    "seal",
    "tidy",
    "verify",
    "write_ids",
]
