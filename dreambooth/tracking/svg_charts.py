"""Draws line charts and parallel coordinates plots as SVG strings, without a plotting library."""

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path

from dreambooth.tracking.journal import read
from dreambooth.utils import atomic_files

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")  # Okabe and Ito 2008
LOSSES = ("loss_instance", "loss_prior", "loss", "validation_loss")  # a run logs only some of these metrics
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 26, 22  # margins of a chart in pixels
Points = Sequence[tuple[float, float]]


def write_loss_curves(run_dir: Path) -> Path | None:
    """Write a chart of the losses to `curves.svg` in the run folder, and return the path of this file.

    Return None if no loss was logged.
    """
    losses = read_history(run_dir / "metrics.jsonl", *LOSSES)
    if not losses:
        return None
    path, text = run_dir / "curves.svg", line_chart("", losses, 640, 300, legend=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with atomic_files.write_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


def read_history(journal: Path, *names: str) -> dict[str, list[tuple[float, float]]]:
    """Return the (step, value) pairs of the metrics `names` in a journal, as one list per metric, sorted by step.

    Omit values that are not finite, and metrics without values.
    """
    history: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for entry, _ in read(journal):
        for name in names:
            value = entry.get("metrics", {}).get(name, math.nan)
            if math.isfinite(value):
                history[name].append((entry["step"], value))
    return {name: sorted(points) for name, points in history.items() if points}


def line_chart(title: str, series: Mapping[str, Points], width: int = 460, height: int = 220,
               legend: bool = False) -> str:
    """Return a chart of metrics over steps: for each metric, a thin line (values) and a thick line (running mean).

    Each metric is a series. Each series is an SVG group whose attribute `data-series` is the number of the series.
    Return an empty string if there are no points.
    """
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    x0, x1 = _value_range([x for x, _ in points])
    y0, y1 = _value_range(_without_outliers([y for _, y in points]))

    def position(x: float, y: float) -> tuple[str, str]:
        across = LEFT + (x - x0) / (x1 - x0) * (width - LEFT - RIGHT)
        down = TOP + (1 - (min(max(y, y0), y1) - y0) / (y1 - y0)) * (height - TOP - BOTTOM)
        return f"{across:.1f}", f"{down:.1f}"

    def path(line: Points, stroke_width: float, opacity: float) -> str:
        d = "M" + "L".join(",".join(position(x, y)) for x, y in line)
        return f'<path d="{d}" fill="none" stroke-width="{stroke_width}" stroke-opacity="{opacity}"/>'

    parts = [_frame(title, width, height), *_grid((x0, x1), (y0, y1), width, height)]
    for i, (name, line) in enumerate(series.items()):
        mean = smooth(line)
        values = path(_downsample(line), 1, 0.25) if mean != list(line) else ""
        dots = ""
        if len(line) < 12:
            dots = "".join(f'<circle cx="{x}" cy="{y}" r="3" stroke="none" fill="{colour(i)}"/>'
                           for x, y in (position(*point) for point in line))
        parts.append(f'<g data-series="{i}" stroke="{colour(i)}"><title>{escape(name)}</title>'
                     f'{values}{path(_downsample(mean), 2, 1)}{dots}</g>')
    if legend:
        parts += [f'<text x="{width - RIGHT - 96 * (len(series) - 1 - i)}" y="16" text-anchor="end" font-weight="600" '
                  f'style="fill:{colour(i)}">{escape(name)}</text>' for i, name in enumerate(series)]
    return "".join(parts) + "</svg>"


def smooth(points: Points, share: float = 0.08) -> list[tuple[float, float]]:
    """Return points with the same steps. Each value is the mean of the values in a window around its step.

    Fewer than 8 points are returned unchanged.

    Args:
        share: window length as a fraction of the number of points.
    """
    reach = max(1, round(len(points) * share / 2))
    if len(points) < 8:
        return list(points)
    windows = ([y for _, y in points[max(0, i - reach):i + reach + 1]] for i in range(len(points)))
    return [(x, sum(window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]


def parallel_coordinates(axes: Mapping[str, Sequence[str | float]], width: int = 1180, height: int = 250) -> str:
    """Return a parallel coordinates plot of a table: one vertical axis per column, one line per row.

    An axis of numbers is linear. It is logarithmic if all numbers are positive and the greatest is more than 20 times
    the least. An axis of strings has equal distances between the strings. Return an empty string if the table has fewer
    than two columns, or no rows.

    Args:
        axes: the column names, and the values of each column.
    """
    rows = len(next(iter(axes.values()), ()))
    if len(axes) < 2 or not rows:
        return ""
    gap = (width - 150) / (len(axes) - 1)
    columns: list[list[float | None]] = []
    parts, labels = [_frame("", width, height)], []
    for column, (name, values) in enumerate(axes.items()):
        x = 75 + column * gap
        heights, ticks = _place_on_axis(values, TOP + 14, height - BOTTOM)
        columns.append(heights)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP + 14}" y2="{height - BOTTOM}" class="axis"/>'
                     f'<text x="{x:.1f}" y="{TOP - 6}" text-anchor="middle" class="name">{escape(name)}</text>')
        side, shift = ("end", -8) if column < len(axes) - 1 else ("start", 8)
        labels += [f'<text class="halo" x="{x + shift:.1f}" y="{y + 4:.1f}" text-anchor="{side}">{escape(text)}</text>'
                   for text, y in ticks.items()]
    for row in range(rows):
        line = [f"{75 + i * gap:.1f},{y:.1f}" for i, heights in enumerate(columns) if (y := heights[row]) is not None]
        parts.append(f'<g data-series="{row}" stroke="{colour(row)}"><path d="M{"L".join(line)}" fill="none" '
                     f'stroke-width="2.5" stroke-linejoin="round"/></g>')
    return "".join([*parts, *labels]) + "</svg>"


def scatter(points: Mapping[int, tuple[float, float]], names: Sequence[str], front: Collection[int],
            titles: tuple[str, str], joined: bool, width: int = 560, height: int = 360) -> str:
    """Return a scatter chart of two objectives. The points of the Pareto front are larger, filled and joined by a line.

    Args:
        points: the two values of each series, by the number of the series.
        names: the name of each series.
        front: the numbers of the series on the front.
        titles: of the two axes. An arrow at the end, up or down, says which values are better.
        joined: whether the line is drawn. A front of more than two objectives is no line in a chart of two.
    """
    x0, x1 = _padded_range([x for x, _ in points.values()])
    y0, y1 = _padded_range([y for _, y in points.values()])

    def position(x: float, y: float) -> tuple[float, float]:
        return (LEFT + (x - x0) / (x1 - x0) * (width - LEFT - RIGHT),
                TOP + (1 - (y - y0) / (y1 - y0)) * (height - TOP - BOTTOM - 16))

    parts = [_frame("", width, height)]
    for i in range(4):
        x, y = position(x0 + i / 3 * (x1 - x0), y0 + i / 3 * (y1 - y0))
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{y0 + i / 3 * (y1 - y0):.3g}</text>'
                     f'<text x="{x:.1f}" y="{height - 22}" text-anchor="{("start", "middle", "middle", "end")[i]}">'
                     f'{x0 + i / 3 * (x1 - x0):.3g}</text>')
    parts.append(f'<text x="{width - RIGHT}" y="{height - 6}" text-anchor="end" class="name">{escape(titles[0])}</text>'
                 f'<text x="{LEFT}" y="16" class="name">{escape(titles[1])}</text>')
    if joined and len(front) > 1:
        line = "L".join("{:.1f},{:.1f}".format(*position(*points[i])) for i in sorted(front, key=points.__getitem__))
        parts.append(f'<path d="M{line}" fill="none" stroke="#888" stroke-width="1.5" stroke-dasharray="5 4"/>')
    for i in sorted(points, key=lambda number: number in front):
        x, y = position(*points[i])
        look = (f'r="7" fill="{colour(i)}" stroke="#1d2129" stroke-width="1.5"' if i in front
                else f'r="4" fill="{colour(i)}" fill-opacity="0.45"')
        parts.append(f'<g data-series="{i}"><title>{escape(names[i])}: {points[i][0]:.4g}, {points[i][1]:.4g}</title>'
                     f'<circle cx="{x:.1f}" cy="{y:.1f}" {look}/></g>')
    return "".join(parts) + "</svg>"


def colour(number: int) -> str:
    """Return the colour of the series with this number."""
    return COLOURS[number % len(COLOURS)]


def format_number(value: float) -> str:
    """Format a number in a short form, with at most four significant digits, such as 0.0915, 1e-4 or 800."""
    if 0 < abs(value) < 0.001:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.4g}".replace("e+0", "e")


def format_setting(text: str) -> str:
    """Format a setting with `format_number` if it is a number: 3e-4 for 0.0003. Return other settings unchanged."""
    try:
        return format_number(float(text))
    except ValueError:
        return text


def _frame(title: str, width: int, height: int) -> str:
    """Return the start of an SVG image: the opening tag, the styles and the title."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="system-ui, sans-serif" font-size="11" fill="#555">'
            '<style>.axis{stroke:#bbb}.grid{stroke:#e8e8e8}.name{font-weight:600;fill:#222}'
            '.halo{paint-order:stroke;stroke:#fff;stroke-width:3px}</style>'
            f'<text x="{LEFT}" y="16" class="name" font-size="13">{escape(title)}</text>')


def _grid(xs: tuple[float, float], ys: tuple[float, float], width: int, height: int) -> list[str]:
    """Return the SVG elements of a grid: horizontal lines with value labels, and three step labels below the chart."""
    parts = []
    for i in range(4):
        y = TOP + i / 3 * (height - TOP - BOTTOM)
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                     f'{float(f"{ys[1] - i / 3 * (ys[1] - ys[0]):.2g}"):g}</text>')
    for i, anchor in enumerate(("start", "middle", "end")):
        x = LEFT + i / 2 * (width - LEFT - RIGHT)
        label = f"step {format_number(xs[0])}" if i == 0 else f"{xs[0] + i / 2 * (xs[1] - xs[0]):.0f}"
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="{anchor}">{label}</text>')
    return parts


def _place_on_axis(values: Sequence[str | float], top: float,
                   bottom: float) -> tuple[list[float | None], dict[str, float]]:
    """Return the y coordinate of each value on a vertical axis, and the y coordinate of each tick by its label.

    The y coordinate of a number that is not finite is None.
    """
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        texts = sorted(set(map(str, values)))
        gap = (bottom - top) / max(1, len(texts) - 1)
        ticks = {text: top + i * gap if len(texts) > 1 else (top + bottom) / 2 for i, text in enumerate(texts)}
        return [ticks[str(value)] for value in values], ticks
    finite = [number for number in numbers if math.isfinite(number)]
    low, high = _value_range(finite)
    if min(finite, default=0) > 0 and high > 20 * min(finite):  # log scale, for settings such as the learning rate
        low, high, numbers = math.log(min(finite)), math.log(max(finite)), [
            math.log(n) if math.isfinite(n) else n for n in numbers]
        finite = [number for number in numbers if math.isfinite(number)]
        labels = {format_number(math.exp(number)): number for number in finite}
    else:
        labels = {format_number(number): number
                  for number in (finite if len(set(finite)) < 6 else (min(finite), max(finite)))}
    heights = {number: bottom - (number - low) / (high - low) * (bottom - top) for number in finite}
    return [heights.get(number) for number in numbers], {text: heights[number] for text, number in labels.items()}


def _value_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the (least, greatest) value. Widen the range if both are equal; return (0, 1) if there are no values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def _padded_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of the values, wider by 6 % on both sides, so that no point lies on the border of a chart."""
    low, high = _value_range(values)
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _without_outliers(values: Sequence[float]) -> list[float]:
    """Return the sorted values without the greatest 1 %, because one outlier on the axis would flatten every curve."""
    ordered = sorted(values)
    return ordered[:max(2, math.ceil(len(ordered) * 0.99))]


def _downsample(line: Points, most: int = 400) -> list[tuple[float, float]]:
    """Return at most `most` evenly spaced points of a line, and also the last point if it is not among them."""
    stride = max(1, math.ceil(len(line) / most))
    return [*line[::stride], *([line[-1]] if (len(line) - 1) % stride else [])]
