"""Charts as inline SVG whose colours are classes of the page's style sheet, so that they follow light, dark and print.

Every chart carries a title and a description for screen readers; the numbers themselves stand in a table beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup

__all__ = ["Bubble", "Line", "Point", "bubbles", "calibration", "lines", "scatter"]

WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 30, 42
SLICES = 48

Values = Sequence[float]
Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """A named curve: ``bold`` is what to read, ``faint`` what it was made of (raw values, or single seeds). ``style`` is a CSS class."""

    name: str
    style: str
    bold: tuple[Values, Values]
    faint: Sequence[tuple[Values, Values]] = field(default=())


@dataclass(frozen=True)
class Point:
    name: str
    style: str
    x: float
    y: float
    error: float | None = None
    label: str | None = None


@dataclass(frozen=True)
class Bubble:
    """A dot whose area is ``size``, in any unit; ``front``: joined with the others that have it."""

    name: str
    style: str
    x: float
    y: float
    size: float
    tip: str
    front: bool = False


@dataclass(frozen=True)
class _Scale:
    """From values to pixels, linear or logarithmic, with round ticks."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        a, b, v = (math.log10(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (v - a) / (b - a) * (self.stop - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
                found = [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p <= self.high]
                if len(found) >= 3:
                    return found[:: math.ceil(len(found) / 7)]
            return found
        step = _round_step((self.high - self.low) / about)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * 0.999)


def _fit(values: Values, start: float, stop: float, *, log: bool = False, pad: float = 0.08, least: float = 0.0) -> _Scale:
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** pad, 1.15)
        return _Scale(low / room, high * room, start, stop, log=True)
    room = max((high - low) * pad, (least - (high - low)) / 2, abs(high) * 1e-3, 1e-9)
    return _Scale(low - room, high + room, start, stop)


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An SVG element; children and attributes are escaped, ``class_`` and ``stroke_width`` become ``class`` and ``stroke-width``."""
    inside = Markup("").join(children)
    given = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), f"{value:.4g}" if isinstance(value, float) else value)
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{inside}</{name}>")


def _chart(title: str, summary: str, *children: str, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    return tag(
        "svg",
        tag("title", title),
        tag("desc", summary),
        *children,
        viewBox=f"0 0 {width} {height}",
        role="img",
        class_="chart",
    )


def _axes(x: _Scale, y: _Scale, x_label: str, y_label: str, x_format: Format, y_format: Format) -> Markup:
    base, parts = y.start, []
    for value in y.ticks():
        at = y(value)
        parts += [
            tag("line", x1=x.start, x2=x.stop, y1=at, y2=at, class_="grid"),
            tag("text", _tidy(y_format(value)), x=x.start - 7, y=at + 4, class_="tick end"),
        ]
    for value in x.ticks():
        parts.append(tag("text", _tidy(x_format(value)), x=x(value), y=base + 17, class_="tick mid"))
        parts.append(tag("line", x1=x(value), x2=x(value), y1=base, y2=base + 4, class_="axis"))
    parts.append(tag("line", x1=x.start, x2=x.stop, y1=base, y2=base, class_="axis"))
    parts.append(tag("text", x_label, x=(x.start + x.stop) / 2, y=base + 36, class_="label mid"))
    parts.append(tag("text", y_label, x=0, y=y.stop - 17, class_="label"))
    return Markup("").join(parts)


def _tidy(text: str) -> str:
    """A tick without trailing zeros: ``10.0 %`` is ``10 %``."""
    return re.sub(r"(\.\d*?)0+(?=\D*$)", lambda found: found[1].rstrip("."), text)


def _path(x: _Scale, y: _Scale, xs: Values, ys: Values, style: str) -> Markup:
    dots = [(x(a), y(b)) for a, b in zip(xs, ys, strict=True)]
    if len(dots) == 1:
        return tag("circle", cx=dots[0][0], cy=dots[0][1], r=2.5, class_=f"{style} dot")
    return tag("path", d="M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in dots), class_=style)


def lines(curves: Sequence[Line], *, title: str, x_label: str, y_label: str, y_format: Format, x_format: Format = "{:,g}".format) -> Markup:
    """Curves over a common axis; the vertical one is logarithmic where the values span more than a factor of 30."""
    every = [pair for curve in curves for pair in (curve.bold, *curve.faint) if len(pair[0])]
    xs, ys = [v for pair in every for v in pair[0]], [v for pair in every for v in pair[1]]
    log = min(ys) > 0 and max(ys) / min(ys) > 30
    x = _Scale(min(xs), max(max(xs), min(xs) + 1), LEFT, WIDTH - RIGHT)
    y = _fit(ys, HEIGHT - BOTTOM, TOP, log=log, pad=0.05)
    drawn = [_path(x, y, *pair, f"line faint {c.style}") for c in curves for pair in c.faint if len(pair[0])]
    drawn += [_path(x, y, *c.bold, f"line {c.style}") for c in curves if len(c.bold[0])]
    summary = "; ".join(f"{c.name}: from {y_format(c.bold[1][0])} to {y_format(c.bold[1][-1])}" for c in curves if len(c.bold[0]))
    return _chart(
        title, summary, _axes(x, y, x_label, y_label, x_format, y_format), *drawn, _readout(curves, x, x_label, x_format, y_format)
    )


def _readout(curves: Sequence[Line], x: _Scale, x_label: str, x_format: Format, y_format: Format) -> Markup:
    """Invisible slices that show the nearest values of all curves under the pointer."""
    stops = sorted({v for curve in curves for v in curve.bold[0]})
    stops = stops[:: math.ceil(len(stops) / SLICES)] if stops else []
    edges = [x.start, *((x(a) + x(b)) / 2 for a, b in pairwise(stops)), x.stop]
    slices = []
    for value, (left, right) in zip(stops, pairwise(edges), strict=True):
        said = [f"{x_label} {x_format(value)}"]
        for curve in curves:
            if len(curve.bold[0]):
                near = min(range(len(curve.bold[0])), key=lambda i: abs(curve.bold[0][i] - value))
                said.append(f"{curve.name}: {y_format(curve.bold[1][near])}")
        slices.append(
            tag("rect", x=left, y=TOP, width=max(right - left, 0.5), height=HEIGHT - BOTTOM - TOP, class_="slice", data_tip="\n".join(said))
        )
    return Markup("").join(slices)


def marker(style: str, x: float, y: float, tip: str | None = None) -> Markup:
    """One shape a role, so that no reading depends on colour: teacher diamond, baseline square, others circle."""
    common = {"class_": f"mark {style}", "data_tip": tip}
    if style == "teacher":
        return tag("path", d=f"M{x:.1f} {y - 7.5:.1f}l7.5 7.5l-7.5 7.5l-7.5 -7.5z", **common)
    if style == "baseline":
        return tag("rect", x=x - 5.5, y=y - 5.5, width=11, height=11, rx=1, **common)
    return tag("circle", cx=x, cy=y, r=6, **common)


def scatter(points: Sequence[Point], *, title: str, x_label: str, y_label: str, x_format: Format, y_format: Format) -> Markup:
    """Labelled points; the horizontal axis is logarithmic where it spans more than a factor of 6."""
    xs = [p.x for p in points]
    spread = [v for p in points for v in (p.y - (p.error or 0), p.y + (p.error or 0))]
    log = min(xs) > 0 and max(xs) / min(xs) > 6
    x = _fit(xs, LEFT, WIDTH - RIGHT, log=log, pad=0.16, least=0.0 if log else max(xs) * 0.3)
    y = _fit(spread, HEIGHT - BOTTOM, TOP, pad=0.16, least=0.01)
    parts = []
    for p in points:
        if p.error:
            up, down = y(p.y + p.error), y(p.y - p.error)
            parts.append(
                tag("path", d=f"M{x(p.x):.1f} {up:.1f}V{down:.1f}m-4 0h8M{x(p.x) - 4:.1f} {up:.1f}h8", class_=f"whisker {p.style}")
            )
        tip = f"{p.name}\n{y_label} {y_format(p.y)}{f' ± {y_format(p.error)}' if p.error else ''}\n{x_label} {x_format(p.x)}"
        parts.append(marker(p.style, x(p.x), y(p.y), tip))
    placed: list[tuple[float, float, float]] = []
    for p in sorted(points, key=lambda p: -p.y):
        text = p.label or p.name
        wide = 6.6 * len(text)
        right = x(p.x) + 13 + wide < WIDTH
        left_edge = x(p.x) + 11 if right else x(p.x) - 11 - wide
        at = y(p.y) + 4
        while any(abs(at - other) < 14 and left_edge < stop and start < left_edge + wide for start, stop, other in placed):
            at += 2
        placed.append((left_edge, left_edge + wide, at))
        parts.append(tag("text", text, x=x(p.x) + (11 if right else -11), y=at, class_=f"name {p.style}{'' if right else ' end'}"))
    summary = "; ".join(f"{p.name}: {y_label} {y_format(p.y)}, {x_label} {x_format(p.x)}" for p in points)
    return _chart(title, summary, _axes(x, y, x_label, y_label, x_format, y_format), *parts)


def bubbles(dots: Sequence[Bubble], *, title: str, x_label: str, y_label: str, x_format: Format, y_format: Format) -> Markup:
    """Dots with an area over two axes; the horizontal axis is logarithmic where it spans more than a factor of 6. Those on the front are the corners
    of a stair: to the left of it and above there is nothing."""
    width, height, largest, least = 620, 380, 24.0, 3.5
    xs, ys, biggest = [d.x for d in dots], [d.y for d in dots], max(d.size for d in dots)
    log = min(xs) > 0 and max(xs) / min(xs) > 6
    x = _fit(xs, LEFT + 6, width - 40, log=log, pad=0.14, least=0.0 if log else max(xs) * 0.3)
    y = _fit(ys, height - BOTTOM, TOP, pad=0.28, least=0.01)
    front = sorted((d for d in dots if d.front), key=lambda d: d.x)
    corners = [(x(front[0].x), y.start)] if front else []
    for before, d in pairwise([*front[:1], *front]):
        corners += [(x(d.x), y(before.y)), (x(d.x), y(d.y))]
    corners += [(x.stop, y(front[-1].y))] if front else []
    stair = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in corners)
    drawn = [tag("path", d=f"{stair}V{y.start:.1f}Z", class_="beaten"), tag("path", d=stair, class_="front")] if front else []
    steps = [(min(a, c) - 2, min(b, e) - 2, max(a, c) + 2, max(b, e) + 2) for (a, b), (c, e) in pairwise(corners)]
    rounds = [(x(d.x), y(d.y), max(largest * math.sqrt(d.size / biggest), least)) for d in dots]
    order = sorted(range(len(dots)), key=lambda i: -rounds[i][2])  # small ones on top
    for i in order:
        cx, cy, radius = rounds[i]
        drawn.append(tag("circle", cx=cx, cy=cy, r=radius, class_=f"bubble {dots[i].style}", data_tip=dots[i].tip))
        drawn.append(tag("circle", cx=cx, cy=cy, r=1.8, class_=f"heart {dots[i].style}"))
    placed: list[_Box] = []
    names = [_named(dots[i], rounds[i], rounds, steps, placed, width, height - BOTTOM) for i in reversed(order)]
    summary = "; ".join(d.tip.replace("\n", ", ") for d in dots)
    axes = _axes(x, y, x_label, y_label, x_format, y_format)
    return _chart(title, summary, axes, *drawn, *names, width=width, height=height)


_Box = tuple[float, float, float, float]
_Round = tuple[float, float, float]


def _named(
    dot: Bubble, own: _Round, rounds: Sequence[_Round], steps: Sequence[_Box], placed: list[_Box], width: float, floor: float
) -> Markup:
    """A dot's name where it covers least of other names, dots and the stair's steps, near or with a line to it; it is added to ``placed``."""
    cx, cy, radius = own
    wide, tall = 7.2 * len(dot.name), 14.0
    near = radius + 5
    spots = [(cx + near, cy - tall / 2), (cx - near - wide, cy - tall / 2), (cx - wide / 2, cy - near - tall), (cx - wide / 2, cy + near)]
    for step in range(1, 7):
        for side in (-1, 1):
            level = cy - tall / 2 + side * (near + 4 + step * (tall + 3))
            spots += [(cx + shift * wide / 2 - wide / 2, level) for shift in (0, -1, 1)]

    def cost(number: int) -> float:
        left, top = spots[number]
        box = (left, top, left + wide, top + tall)
        outside = max(0.0, LEFT + 8 - left) + max(0.0, left + wide - width) + max(0.0, TOP - 14 - top) + max(0.0, top + tall - floor)
        covered = sum(_shared(box, other) for other in placed) * 3
        covered += sum(_shared(box, step) for step in steps) * 2
        covered += sum(_shared(box, (a - r, b - r, a + r, b + r)) for a, b, r in rounds)
        return covered + 60 * outside + 1.5 * number

    best = min(range(len(spots)), key=cost)
    left, top = spots[best]
    placed.append((left, top, left + wide, top + tall))
    text = tag("text", dot.name, x=left + wide / 2, y=top + tall - 3.5, class_=f"name mid {dot.style}")
    if best < 4:
        return text
    ends = top + tall if top < cy else top
    edge = cy - radius if top < cy else cy + radius
    leader = tag("path", d=f"M{cx:.1f} {edge:.1f}L{min(max(cx, left), left + wide):.1f} {ends:.1f}", class_=f"leader {dot.style}")
    return Markup("").join([leader, text])


def _shared(a: _Box, b: _Box) -> float:
    """The area that two boxes (left, top, right, bottom) have in common."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def calibration(bins: Sequence[tuple[float, float, int, int, float | None]], *, title: str, style: str) -> Markup:
    """A reliability diagram over a histogram. bins: low, high, count, correct, mean confidence."""
    width, height, foot = 300, 330, 62
    x = _Scale(0, 1, 40, width - 8)
    y = _Scale(0, 1, height - BOTTOM - foot, TOP)
    total = max(sum(b[2] for b in bins), 1)
    tallest = max((b[2] for b in bins), default=0) or 1
    floor = height - BOTTOM
    parts = [
        *(tag("line", x1=x.start, x2=x.stop, y1=y(v), y2=y(v), class_="grid") for v in (0.25, 0.5, 0.75, 1.0)),
        *(tag("text", f"{v:.0%}", x=x.start - 6, y=y(v) + 4, class_="tick end") for v in (0.0, 0.5, 1.0)),
    ]
    for low, high, count, correct, confidence in bins:
        if not count or confidence is None:
            continue
        left, wide = x(low) + 0.75, x(high) - x(low) - 1.5
        actual = correct / count
        tip = f"confidence {low:.0%} to {high:.0%}\nclaimed {confidence:.1%}, right {actual:.1%}\n{count:,} of {total:,} items"
        parts.append(tag("rect", x=left, y=y(actual), width=wide, height=y.start - y(actual), class_=f"bar {style}"))
        top, bottom = sorted((y(actual), y(confidence)))
        parts.append(tag("rect", x=left, y=top, width=wide, height=bottom - top, class_="over" if confidence > actual else "under"))
        parts.append(tag("line", x1=left, x2=left + wide, y1=y(confidence), y2=y(confidence), class_="claim"))
        tall = count / tallest * (foot - 16)
        right_part = tall * actual
        parts.append(tag("rect", x=left, y=floor - tall, width=wide, height=max(tall - right_part, 0.4), class_=f"bar pale {style}"))
        parts.append(tag("rect", x=left, y=floor - right_part, width=wide, height=max(right_part, 0.0), class_=f"bar {style}"))
        parts.append(tag("rect", x=left, y=TOP, width=wide, height=floor - TOP, class_="slice", data_tip=tip))
    parts += [
        tag("line", x1=x(0), y1=y(0), x2=x(1), y2=y(1), class_="ideal"),
        tag("line", x1=x.start, x2=x.stop, y1=y.start, y2=y.start, class_="axis"),
        tag("line", x1=x.start, x2=x.stop, y1=floor, y2=floor, class_="axis"),
        *(tag("text", f"{v:.0%}", x=x(v) - (6 if v == 1 else 0), y=floor + 16, class_="tick mid") for v in (0.0, 0.5, 1.0)),
        tag("text", "confidence", x=(x.start + x.stop) / 2, y=floor + 33, class_="label mid"),
        tag("text", "right", x=0, y=TOP - 17, class_="label"),
        tag("text", "items", x=x.start - 6, y=floor - 2, class_="tick end"),
    ]
    summary = "; ".join(f"confidence {b[0]:.0%} to {b[1]:.0%}: {b[2]} items, {b[3] / b[2]:.0%} right" for b in bins if b[2])
    return _chart(title, summary, *parts, width=width, height=height)
