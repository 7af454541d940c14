"""Pictures of results, drawn by matplotlib as SVG: curves over an axis, bars in groups, and heat maps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

from megatron_taipan.errors import writing
from megatron_taipan.evaluation.lengths import length_name
from megatron_taipan.evaluation.results import Row

# The same results give the same file: no date, and identifiers that do not change from run to run.
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "megatron_taipan", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


MANY = 10  # curves; as many colours as matplotlib's cycle has


class Curve(NamedTuple):
    """A line of the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "-"  # matplotlib's, such as "o-" or "--"
    words: Sequence[str] = ()  # beside each point; none: no words


def write_curves(
    path: Path, curves: list[Curve], *, x: str, y: str, title: str = "", log_x: bool = False, log_y: bool = False,
    marks: dict[str, float] | None = None, ticks: dict[float, str] | None = None,
    y_range: tuple[float, float] | None = None,
) -> None:  # fmt: skip
    """Curves over one axis. The legend of more than MANY curves is beside them, and no two of these share a colour.

    Args:
        x, y: the axes' names, with units.
        marks: vertical lines by name, such as {"training length": 4096}.
        ticks: words at values of x, in place of numbers; y_range: ends of the y axis. None: what matplotlib chooses.

    Raises:
        UserError: the file cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        many = len(curves) > MANY
        figure = Figure(figsize=(9, max(4, 0.2 * len(curves))) if many else (7, 4), layout="constrained")
        axes = figure.add_subplot()
        if many:
            axes.set_prop_cycle(color=[distinct_colour(index) for index in range(len(curves))])
        for curve in curves:
            [line] = axes.plot(curve.x, curve.y, curve.style, label=curve.name)
            for at_x, at_y, word in zip(curve.x, curve.y, curve.words, strict=False):
                axes.annotate(
                    word, (at_x, at_y), (4, 4), textcoords="offset points", fontsize=7, color=line.get_color()
                )
        for name, at in (marks or {}).items():
            axes.axvline(at, color="grey", linestyle=":", label=name)
        if log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: length_name(round(value)))
        if log_y:
            axes.set_yscale("log")
        if ticks:
            axes.set_xticks(list(ticks), list(ticks.values()))
        if y_range:
            axes.set_ylim(*y_range)
        axes.set(xlabel=x, ylabel=y, title=title)
        legend: dict[str, Any] = {"frameon": False}
        if many:
            legend |= {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "fontsize": 8}
        axes.legend(**legend)
        save(figure, path)


def distinct_colour(index: int) -> tuple[float, float, float]:
    """Colours without end; those next to each other are far apart on the colour wheel."""
    return tuple(hsv_to_rgb((index * 137.5 / 360 % 1, 0.75, (0.65, 0.85)[index // 8 % 2])).tolist())


def curves_of(rows: list[Row], x: str, y: str, line: str = "model") -> list[Curve]:
    """A curve with points for each value of column `line`, of the rows that have a value in column `y`."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row[y] is not None:
            points.setdefault(str(row[line]), []).append((row[x], row[y]))
    return [Curve(name, [a for a, _ in some], [b for _, b in some], "o-") for name, some in points.items()]


def write_bars(
    path: Path, rows: list[Row], *, group: str, value: str, x: str, y: str, bar: str = "model",
    y_range: tuple[float, float] | None = None,
) -> None:  # fmt: skip
    """A group of bars for each value of column `group`, in the order of the rows, with one for each value of `bar`.

    Args:
        value: the column of the heights. A word stands where there is no bar to see: "0", or "–" without a value.
        x, y: the axes' names, with units.

    Raises:
        UserError: the file cannot be written.
    """
    groups, bars = (list(dict.fromkeys(str(row[column]) for row in rows)) for column in (group, bar))
    heights = {(str(row[group]), str(row[bar])): row[value] for row in rows if row[value] is not None}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(7.0, 1.5 + 0.3 * len(groups) * (len(bars) + 1)), 4), layout="constrained")
        axes = figure.add_subplot()
        width = 0.8 / len(bars)
        for number, name in enumerate(bars):
            at = {i: heights[one, name] for i, one in enumerate(groups) if (one, name) in heights}
            offset = (number - (len(bars) - 1) / 2) * width
            axes.bar(
                [i + offset for i in at], list(at.values()), width, label=name,
                color=distinct_colour(number) if len(bars) > MANY else None,
            )  # fmt: skip
            for i, one in enumerate(groups):
                if not heights.get((one, name)):
                    word = "0" if (one, name) in heights else "–"
                    axes.annotate(word, (i + offset, 0), (0, 2), textcoords="offset points", ha="center", fontsize=7)
        axes.set_xticks(range(len(groups)), groups, rotation=30 if len(groups) > 4 else 0)
        if y_range:
            axes.set_ylim(*y_range)
        axes.set(xlabel=x, ylabel=y)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
        save(figure, path)


def write_heat_map(
    path: Path, values: Sequence[Sequence[float]], *, rows: Sequence[str], columns: Sequence[str], x: str, y: str,
    title: str = "", low: float = 0.0, high: float = 1.0,
) -> None:  # fmt: skip
    """A heat map with each value written in its field.

    Args:
        values: [rows][columns], coloured from `low` to `high`.

    Raises:
        UserError: the file cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        size = max(5.0, 1.5 + 0.8 * len(columns)), max(2.5, 1.5 + 0.5 * len(rows))  # inches; room for the title
        figure = Figure(figsize=size, layout="constrained")
        axes: Axes = figure.add_subplot()
        image = axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        for r, line in enumerate(values):
            for c, value in enumerate(line):
                shade = "white" if value < (low + high) / 2 else "black"
                axes.text(c, r, f"{value:.2g}", ha="center", va="center", color=shade)
        axes.set(xlabel=x, ylabel=y, title=title)
        figure.colorbar(image)
        save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as SVG, in a folder that may not exist yet."""
    with writing(path), matplotlib.rc_context(STYLE):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
