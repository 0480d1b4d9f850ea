"""Numbers as a person reads them. What is unknown is an en dash."""

from __future__ import annotations

import math

__all__ = ["UNKNOWN", "clip", "count", "fixed", "ms", "percent", "points", "seconds", "si", "size", "times"]

UNKNOWN = "–"
GAP = "\u202f"  # a narrow no-break space keeps a number and its unit on one line


def percent(x: float | None, digits: int = 1) -> str:
    return UNKNOWN if x is None else f"{100 * x:.{digits}f}{GAP}%".replace("-", "−")


def points(x: float | None, digits: int = 1) -> str:
    """A difference of two shares, in percentage points, with its sign."""
    return UNKNOWN if x is None else f"{100 * x:+.{digits}f}".replace("-", "−")


def fixed(x: float | None, digits: int = 3) -> str:
    return UNKNOWN if x is None else f"{x:.{digits}f}".replace("-", "−")


def count(x: float | None) -> str:
    return UNKNOWN if x is None else f"{x:,.0f}"


def si(x: float | None, unit: str = "") -> str:
    """Three digits with a decimal prefix: ``11.2 M``."""
    if x is None:
        return UNKNOWN
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= factor * 0.9995:
            return f"{_digits(x / factor)}{GAP}{prefix}{unit}"
    return f"{_digits(x)}{GAP}{unit}" if unit else _digits(x)


def size(x: float | None) -> str:
    return si(x, "B")


def ms(x: float | None) -> str:
    return UNKNOWN if x is None else f"{_digits(x)}{GAP}ms"


def seconds(x: float | None) -> str:
    if x is None:
        return UNKNOWN
    if x < 99.5:
        return f"{_digits(x)}{GAP}s"
    minutes, rest = divmod(round(x), 60)
    if minutes < 60:
        return f"{minutes}{GAP}min {rest:02d}{GAP}s"
    return f"{minutes // 60}{GAP}h {minutes % 60:02d}{GAP}min"


def times(x: float | None) -> str:
    return UNKNOWN if x is None else f"{_digits(x)}×"


def clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _digits(x: float) -> str:
    if x == 0 or not math.isfinite(x):
        return f"{x:.0f}"
    places = max(0, 2 - math.floor(math.log10(abs(x)) + 1e-9))
    return f"{x:,.{min(places, 4)}f}" if abs(x) < 100 else f"{x:,.0f}"
