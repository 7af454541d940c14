"""Curves and points as SVG text; no plotting library needed."""

from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 620, 340, 60, 200, 20, 50  # pixels; the legend is on the right
ROW = 15  # of the legend


class Series(NamedTuple):
    """One line of the legend."""

    name: str
    points: list[tuple[float, float]]  # y from 0 to 1
    marks: tuple[str, ...] = ()  # a word beside each point


def colour(index: int) -> str:
    """Neighbours in the legend are far apart on the colour wheel."""
    return f"hsl({index * 137.5 % 360:.0f},70%,{(42, 58)[index // 8 % 2]}%)"


def chart(series: list[Series], ticks: dict[float, str], caption: str) -> str:
    """Values between 0 and 1 over an axis from the first tick to the last; points of a series are joined."""
    first, last = min(ticks), max(ticks)
    height = max(HEIGHT, TOP + ROW * len(series) + 10)
    right, floor = WIDTH - RIGHT, height - BOTTOM

    def x(value: float) -> float:
        return LEFT + (value - first) / ((last - first) or 1) * (right - LEFT)

    def y(value: float) -> float:
        return TOP + (1 - value) * (floor - TOP)

    frame = f'xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
    parts = [f'<svg {frame} font-family="sans-serif" font-size="12">']
    parts.append(f'<rect width="{WIDTH}" height="{height}" fill="white"/>')
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    for value, word in ticks.items():
        parts.append(f'<text x="{x(value):.1f}" y="{floor + 18}" text-anchor="middle">{escape(word)}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{height - 10}" text-anchor="middle">{escape(caption)}</text>')
    for row, one in enumerate(series):
        paint = colour(row)
        points = [(x(a), y(b)) for a, b in one.points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{paint}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{paint}"/>' for a, b in points]
        for (a, b), word in zip(points, one.marks, strict=False):
            parts.append(f'<text x="{a + 5:.1f}" y="{b - 5:.1f}" font-size="9" fill="{paint}">{escape(word)}</text>')
        legend = f'x="{right + 15}" y="{TOP + 5 + ROW * row}" fill="{paint}"'
        parts.append(f"<text {legend}>{escape(one.name)}</text>")
    return "\n".join([*parts, "</svg>\n"])
