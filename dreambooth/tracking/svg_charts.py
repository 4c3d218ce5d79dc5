"""Curves and parallel coordinates as SVG text: no library, readable by every browser, and part of any page."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from dreambooth.tracking.journal import read
from dreambooth.utils import atomic_files

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")  # Okabe and Ito 2008
LOSSES = ("loss_instance", "loss_prior", "loss")  # of a run without a prior, only some differ
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 26, 22  # pixels around a chart
Points = Sequence[tuple[float, float]]


def history(journal: Path, *names: str) -> dict[str, list[tuple[float, float]]]:
    """name -> (step, value) of every point of these metrics, in order; nothing that is not a number."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for entry, _ in read(journal):
        for name in names:
            value = entry.get("metrics", {}).get(name, math.nan)
            if math.isfinite(value):
                found[name].append((entry["step"], value))
    return {name: sorted(points) for name, points in found.items() if points}


def smoothed(points: Points, share: float = 0.08) -> list[tuple[float, float]]:
    """A centred running mean over a share of the points."""
    reach = max(1, round(len(points) * share / 2))
    if len(points) < 8:
        return list(points)
    windows = ([y for _, y in points[max(0, i - reach):i + reach + 1]] for i in range(len(points)))
    return [(x, sum(window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]


def chart(title: str, series: Mapping[str, Points], width: int = 460, height: int = 220, legend: bool = False) -> str:
    """Lines over steps: thin as measured, thick as a running mean; a series is a group `data-series` of its number."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    (x0, x1), (y0, y1) = _span([x for x, _ in points]), _span(_within([y for _, y in points]))

    def place(x: float, y: float) -> str:
        across = LEFT + (x - x0) / (x1 - x0) * (width - LEFT - RIGHT)
        up = TOP + (1 - (min(max(y, y0), y1) - y0) / (y1 - y0)) * (height - TOP - BOTTOM)
        return f"{across:.1f},{up:.1f}"

    def path(line: Points, wide: float, faint: float) -> str:
        d = "M" + "L".join(place(x, y) for x, y in line)
        return f'<path d="{d}" fill="none" stroke-width="{wide}" stroke-opacity="{faint}"/>'

    parts = [_frame(title, width, height), *_grid((x0, x1), (y0, y1), width, height)]
    for i, (name, line) in enumerate(series.items()):
        even = smoothed(line)
        thin = path(_thinned(line), 1, 0.25) if even != list(line) else ""
        dots = "".join(f'<circle cx="{at[0]}" cy="{at[1]}" r="3" stroke="none" fill="{colour(i)}"/>' for at in (
            place(*point).split(",") for point in line)) if len(line) < 12 else ""
        parts.append(f'<g data-series="{i}" stroke="{colour(i)}"><title>{escape(name)}</title>'
                     f'{thin}{path(_thinned(even), 2, 1)}{dots}</g>')
    if legend:
        parts += [f'<text x="{width - RIGHT - 96 * (len(series) - 1 - i)}" y="16" text-anchor="end" font-weight="600" '
                  f'style="fill:{colour(i)}">{escape(name)}</text>' for i, name in enumerate(series)]
    return "".join(parts) + "</svg>"


def parallel(axes: Mapping[str, Sequence[str | float]], width: int = 1180, height: int = 250) -> str:
    """Parallel coordinates: an axis a column, a line a row; numbers are placed by value, texts side by side."""
    rows = len(next(iter(axes.values()), ()))
    if len(axes) < 2 or not rows:
        return ""
    gap = (width - 150) / (len(axes) - 1)
    at: list[list[float | None]] = []
    parts, texts = [_frame("", width, height)], []
    for column, (name, values) in enumerate(axes.items()):
        x = 75 + column * gap
        heights, marks = _axis(values, TOP + 14, height - BOTTOM)
        at.append(heights)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP + 14}" y2="{height - BOTTOM}" class="axis"/>'
                     f'<text x="{x:.1f}" y="{TOP - 6}" text-anchor="middle" class="name">{escape(name)}</text>')
        side, shift = ("end", -8) if column < len(axes) - 1 else ("start", 8)
        texts += [f'<text class="halo" x="{x + shift:.1f}" y="{y + 4:.1f}" text-anchor="{side}">{escape(text)}</text>'
                  for text, y in marks.items()]
    for row in range(rows):
        line = [f"{75 + i * gap:.1f},{y:.1f}" for i, heights in enumerate(at) if (y := heights[row]) is not None]
        parts.append(f'<g data-series="{row}" stroke="{colour(row)}"><path d="M{"L".join(line)}" fill="none" '
                     f'stroke-width="2.5" stroke-linejoin="round"/></g>')
    return "".join([*parts, *texts]) + "</svg>"


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def write(run_dir: Path) -> Path | None:
    """`curves.svg` of a run, if it has logged a step; left alone if it is the same already."""
    found = history(run_dir / "metrics.jsonl", *LOSSES)
    if not found:
        return None
    path, text = run_dir / "curves.svg", chart("", found, 640, 300, legend=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with atomic_files.whole_file(path) as aside:
            aside.write_text(text, encoding="utf-8")
    return path


def short(value: float) -> str:
    """A number as a person writes it: 0.0915, 1e-4, 800."""
    if 0 < abs(value) < 0.001:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.4g}".replace("e+0", "e")


def tidy(text: str) -> str:
    """A setting as a person writes it: 3e-4 for 0.0003, 1 for 1.0."""
    try:
        return short(float(text))
    except ValueError:
        return text


def _frame(title: str, width: int, height: int) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="system-ui, sans-serif" font-size="11" fill="#555">'
            '<style>.axis{stroke:#bbb}.grid{stroke:#e8e8e8}.name{font-weight:600;fill:#222}'
            '.halo{paint-order:stroke;stroke:#fff;stroke-width:3px}</style>'
            f'<text x="{LEFT}" y="16" class="name" font-size="13">{escape(title)}</text>')


def _grid(xs: tuple[float, float], ys: tuple[float, float], width: int, height: int) -> list[str]:
    parts = []
    for i in range(4):
        y = TOP + i / 3 * (height - TOP - BOTTOM)
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                     f'{float(f"{ys[1] - i / 3 * (ys[1] - ys[0]):.2g}"):g}</text>')
    for i, anchor in enumerate(("start", "middle", "end")):
        x = LEFT + i / 2 * (width - LEFT - RIGHT)
        what = f"step {short(xs[0])}" if i == 0 else f"{xs[0] + i / 2 * (xs[1] - xs[0]):.0f}"
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="{anchor}">{what}</text>')
    return parts


def _axis(values: Sequence[str | float], top: float, bottom: float) -> tuple[list[float | None], dict[str, float]]:
    """Heights of the values, and what is written at which height."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        texts = sorted(set(map(str, values)))
        gap = (bottom - top) / max(1, len(texts) - 1)
        marks = {text: top + i * gap if len(texts) > 1 else (top + bottom) / 2 for i, text in enumerate(texts)}
        return [marks[str(value)] for value in values], marks
    known = [number for number in numbers if math.isfinite(number)]
    low, high = _span(known)
    if min(known, default=0) > 0 and high > 20 * min(known):  # learning rates are tried in powers
        low, high, numbers = math.log(min(known)), math.log(max(known)), [
            math.log(n) if math.isfinite(n) else n for n in numbers]
        known = [number for number in numbers if math.isfinite(number)]
        written = {short(math.exp(number)): number for number in known}
    else:
        written = {short(number): number for number in (known if len(set(known)) < 6 else (min(known), max(known)))}
    place = {number: bottom - (number - low) / (high - low) * (bottom - top) for number in known}
    return [place.get(number) for number in numbers], {text: place[number] for text, number in written.items()}


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def _within(values: Sequence[float]) -> list[float]:
    """Without the greatest hundredth: one outlier must not press every curve to the ground."""
    ordered = sorted(values)
    return ordered[:max(2, math.ceil(len(ordered) * 0.99))]


def _thinned(line: Points, most: int = 400) -> list[tuple[float, float]]:
    stride = max(1, math.ceil(len(line) / most))
    return [*line[::stride], *([line[-1]] if (len(line) - 1) % stride else [])]
