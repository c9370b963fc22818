"""Small charts as inline SVG, coloured by the page's style sheet so that they follow the light and dark schemes.

Drawn by hand rather than by a plotting library: a chart is 1 to 6 kB, its text is text, and its strings are escaped
here. Each is drawn for a card about 360 CSS pixels wide, so that its letters stay readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from markupsafe import Markup

from pipelines.report.wording import clean, number

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 37
MAX_POINTS = 300


@dataclass(frozen=True)
class Series:
    """One line: x and y of equal length, its name, and whether it is only there for comparison."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False


def _svg(label: str, body: list[str], width: float = WIDTH, height: float = HEIGHT) -> Markup:
    """The element; it grows to half again its size at most, so that its letters stay those of a caption."""
    head = f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{1.5 * width:g}px" role="img"'
    # Every string in `body` has been through `escape` in `_text`, the rest are numbers and our own class names.
    return Markup(f'{head} aria-label="{escape(clean(label))}">{"".join(body)}</svg>')  # noqa: S704


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(clean(text, 60))}</text>'


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers that span [low, high], about `wanted` of them."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / wanted
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 2.5, 5, 10) if base * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _tick_label(value: float) -> str:
    """A round number as short as it can be said: 0.05, 7.5e-4, 20k."""
    size = abs(value)
    for limit, scale, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / scale:g}{unit}"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def _grid(ys: list[float], x_label: str) -> list[str]:
    """Horizontal lines with their labels, and the name of the x axis."""
    parts = []
    for y in ys:
        py = _place(y, ys[0], ys[-1], HEIGHT - BOTTOM, TOP)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}" class="grid"/>')
        parts.append(_text(LEFT - 6, py + 3.5, _tick_label(y), "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label, kind="axis"))
    return parts


def _x_label(px: float, text: str) -> str:
    """A label below the x axis; one at the right edge ends there instead of running out of the picture."""
    return _text(px, HEIGHT - BOTTOM + 16, text, "end" if px > WIDTH - RIGHT - 8 else "middle")


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    return start + (value - low) / ((high - low) or 1.0) * (end - start)


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` points: means of equal runs of finite points."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    good = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[good], ys[good]
    if len(xs) <= MAX_POINTS:
        return xs, ys
    edges = np.linspace(0, len(xs), MAX_POINTS + 1).astype(int)[:-1]
    sizes = np.diff(np.append(edges, len(xs)))
    return np.add.reduceat(xs, edges) / sizes, np.add.reduceat(ys, edges) / sizes


def lines(label: str, series: list[Series], x_label: str = "step", zero: bool = False) -> Markup:
    """A line chart; '' if no series has a finite point.

    Args:
        label: what a screen reader says of it.
        zero: whether the y axis must begin at 0.
    """
    thinned = [(s, *thin(s.x, s.y)) for s in series]
    thinned = [each for each in thinned if len(each[1])]
    if not thinned:
        return Markup("")
    all_x, all_y = np.concatenate([t[1] for t in thinned]), np.concatenate([t[2] for t in thinned])
    low = min(0.0, float(all_y.min())) if zero else float(all_y.min())
    ys = ticks(low, float(all_y.max()))
    x0, x1 = float(all_x.min()), float(all_x.max())
    parts = _grid(ys, x_label)
    for x in [tick for tick in ticks(x0, x1) if x0 <= tick <= x1] or [x0]:
        parts.append(_x_label(_place(x, x0, x1, LEFT, WIDTH - RIGHT), _tick_label(x)))
    for one, xs, yv in thinned:
        kind = "faint" if one.faint else "main"
        points = " ".join(
            f"{_place(a, x0, x1, LEFT, WIDTH - RIGHT):.1f},{_place(b, ys[0], ys[-1], HEIGHT - BOTTOM, TOP):.1f}"
            for a, b in zip(xs, yv, strict=True)
        )
        if len(xs) == 1:
            px, py = points.split(",")
            parts.append(f'<circle cx="{px}" cy="{py}" r="3" class="dot {kind}"/>')
        else:
            parts.append(
                f'<polyline points="{points}" class="line {kind}"><title>{escape(clean(one.name))}</title></polyline>'
            )
    return _svg(label, parts)


def histogram(label: str, before: np.ndarray, after: np.ndarray, edges: np.ndarray, names: list[str] | None = None,
              x_label: str = "") -> Markup:  # fmt: skip
    """Two histograms over the same bins, the kept in front of all.

    Args:
        before: counts a bin of everything that came in [bins].
        after: counts a bin of what was kept [bins].
        edges: edges of the bins [bins + 1]; equal steps on the page whatever their widths.
        names: a label for each edge (or each bin, if there is one less); default: the edges as numbers.
    """
    if not before.sum():
        return Markup("")
    bins = len(before)
    ys = ticks(0.0, float(max(before.max(), after.max())), 3)
    parts = _grid(ys, x_label)
    step = (WIDTH - RIGHT - LEFT) / bins
    for k in range(bins):
        for counts, kind in ((before, "before"), (after, "after")):
            top = _place(float(counts[k]), 0, ys[-1], HEIGHT - BOTTOM, TOP)
            if counts[k]:
                parts.append(
                    f'<rect x="{LEFT + k * step + 0.5:.1f}" y="{top:.1f}" width="{max(step - 1, 0.6):.1f}" '
                    f'height="{HEIGHT - BOTTOM - top:.1f}" class="{kind}"/>'
                )
    labels = names or [_tick_label(float(e)) for e in edges]
    on_bins = len(labels) == bins
    every = max(1, math.ceil(sum(len(x) + 2 for x in labels) * 6.2 / (WIDTH - LEFT - RIGHT)))
    for k in range(0, len(labels), every):
        parts.append(_x_label(LEFT + (k + (0.5 if on_bins else 0)) * step, labels[k]))
    return _svg(label, parts)


def heat_map(label: str, rows: list[str], columns: list[str], values: list[list[float | None]], row_name: str,
             column_name: str, best: tuple[int, int] | None, digits: int = 3) -> Markup:  # fmt: skip
    """A grid of values from light to strong colour, each written in its cell; None is an empty cell."""
    found = [v for row in values for v in row if v is not None and math.isfinite(v)]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    longest = max(len(r) for r in rows)
    left = 18 + max(30.0, longest * 7.0)
    cell_w = max(58.0, (WIDTH - left - 4) / len(columns))
    cell_h = 40.0
    width, height = left + cell_w * len(columns) + 4, cell_h * len(rows) + 42
    parts = []
    for i, name in enumerate(rows):
        y = i * cell_h + 4
        parts.append(_text(left - 6, y + cell_h / 2 + 4, name, "end"))
        for j in range(len(columns)):
            value = values[i][j]
            x = left + j * cell_w
            size = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell_w - 2:.1f}" height="{cell_h - 2:.1f}" rx="4"'
            if value is None or not math.isfinite(value):
                parts.append(f'<rect {size} class="hollow"/>')
                parts.append(_text(x + cell_w / 2, y + cell_h / 2 + 4, "-", kind="cell"))
                continue
            share = (value - low) / (high - low) if high > low else 1.0
            star = " best" if best == (i, j) else ""
            parts.append(f'<rect {size} class="heat{star}" style="fill-opacity:{0.12 + 0.88 * share:.3f}"/>')
            tone = "cell strong" if share > 0.75 else "cell"
            parts.append(_text(x + cell_w / 2, y + cell_h / 2 + 4, number(value, digits), kind=tone))
    for j, name in enumerate(columns):
        parts.append(_text(left + (j + 0.5) * cell_w, height - 24, name))
    parts.append(_text(left + cell_w * len(columns) / 2, height - 6, column_name, kind="axis"))
    middle = 4 + cell_h * len(rows) / 2
    parts.append(
        f'<text transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle" class="axis">'
        f"{escape(clean(row_name, 60))}</text>"
    )
    return _svg(label, parts, width, height)
