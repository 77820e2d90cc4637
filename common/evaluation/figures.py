"""The few kinds of figure that reproductions share. Matplotlib without pyplot, so nothing global is left behind."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.evaluation.bootstrap import Interval
from common.io import atomic_write_bytes
from common.sampling.images import to_pil

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers differ too, for print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")  # one more than colours, so that pairs repeat late
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "svg.hashsalt": "figures",
}
DPI = 150


def bar_with_intervals(groups: Mapping[str, Mapping[str, Interval]], ylabel: str) -> Figure:
    """Bars with 95% intervals: one group for each key (a metric, a prompt), one bar in it for each method.

    Args: groups: group -> method -> interval; methods keep their colour through all groups.
    """
    methods = list(dict.fromkeys(method for bars in groups.values() for method in bars))
    if not methods:
        raise ValueError("there is no bar to draw")
    with matplotlib.rc_context(_STYLE):
        width_in = max(3.4, 0.9 + 0.45 * len(groups) * (len(methods) + 1))
        columns = _legend_columns(methods, width_in)
        figure, axes = _new_figure(width_in, 2.6 + 0.18 * -(-len(methods) // columns))
        width = 0.8 / len(methods)
        for k, method in enumerate(methods):
            shift = (k - (len(methods) - 1) / 2) * width
            places = [i + shift for i, bars in enumerate(groups.values()) if method in bars]
            intervals = [bars[method] for bars in groups.values() if method in bars]
            means = [interval.mean for interval in intervals]
            color = COLORS[k % len(COLORS)]
            axes.bar(places, means, 0.9 * width, color=color, label=method, edgecolor="black", linewidth=0.5)
            axes.errorbar(places, means, yerr=_errors(intervals), fmt="none", ecolor="black", elinewidth=1, capsize=3)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(axis="y", alpha=0.3)
        axes.set_ylabel(ylabel)
        if len(methods) > 1:
            figure.legend(loc="outside upper center", ncols=columns, frameon=False)
    return figure


def scatter_methods(points: Mapping[str, tuple[Interval, Interval]], xlabel: str, ylabel: str) -> Figure:
    """One point for each method with its intervals along both axes, named in a legend that is as high as it needs.

    Args: points: method -> (x, y), such as (CLIP-T, DINO).
    """
    if not points:
        raise ValueError("there is no point to draw")
    columns = _legend_columns(list(points), 4.6)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new_figure(4.6, 3.4 + 0.18 * (-(-len(points) // columns) - 1))
        for k, (method, (x, y)) in enumerate(points.items()):
            color, marker = COLORS[k % len(COLORS)], MARKERS[k % len(MARKERS)]
            bars = {"xerr": _errors([x]), "yerr": _errors([y]), "elinewidth": 1, "capsize": 2, "alpha": 0.6}
            axes.errorbar(x.mean, y.mean, **bars, fmt="none", ecolor=color)
            style = {"color": color, "marker": marker, "markersize": 8, "zorder": 3}
            style |= {"markeredgecolor": "white", "markeredgewidth": 0.6}
            axes.plot(x.mean, y.mean, **style, linestyle="none", label=method)
        axes.margins(0.12)
        axes.grid(alpha=0.3)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        figure.legend(loc="outside upper center", ncols=columns, frameon=False)
    return figure


def lines_with_intervals(
    lines: Mapping[str, Mapping[float, Interval]], xlabel: str, ylabel: str, *, log_x: bool = False
) -> Figure:
    """Means over a setting, such as a scale or a rank, with their 95% intervals as bars.

    Args:
        lines: name -> setting -> interval.
        log_x: a logarithmic axis, with a tick at each setting.
    """
    if not any(lines.values()):
        raise ValueError("there is no point to draw")
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new_figure(4.2, 2.8)
        for k, (name, points) in enumerate(lines.items()):
            color, marker, intervals = COLORS[k % len(COLORS)], MARKERS[k % len(MARKERS)], list(points.values())
            means = [interval.mean for interval in intervals]
            style = {"color": color, "marker": marker, "markersize": 5, "elinewidth": 1, "capsize": 2}
            axes.errorbar(list(points), means, yerr=_errors(intervals), label=name, **style)
        if log_x:
            axes.set_xscale("log")
            axes.minorticks_off()
            ticks = sorted({x for points in lines.values() for x in points})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.grid(alpha=0.3)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if len(lines) > 1:
            figure.legend(loc="outside upper center", ncols=min(len(lines), 3), frameon=False)
    return figure


def labelled_image_rows(
    rows: Mapping[str, Tensor], columns: Sequence[str] = (), *, upscale: int = 2, font_px: int = 14
) -> Image.Image:
    """Rows of images with the row's name at the left and, if given, column names above; short rows leave a gap.

    Args:
        rows: name -> (N,3,H,W) in [-1,1]; all images of the figure have one size.
        columns: one name for each place of the longest row; long ones are wrapped.
        upscale: whole factor, nearest neighbour.
    """
    images = {name: to_pil(tensor) for name, tensor in rows.items()}
    sizes = {image.size for row in images.values() for image in row}
    count = max((len(row) for row in images.values()), default=0)
    if len(sizes) != 1:
        raise ValueError(f"a figure needs images, all of one size; got the sizes {sorted(sizes)}")
    if columns and len(columns) != count:
        raise ValueError(f"{len(columns)} column names for {count} columns")
    width, height = (side * upscale for side in sizes.pop())
    font, gap = ImageFont.load_default(size=font_px), 4
    headings = [_wrapped(name, font, width) for name in columns]
    names = {name: _wrapped(name, font, 140) for name in images}
    left = int(max(font.getlength(line) for lines in names.values() for line in lines.split("\n"))) + 3 * gap
    line_px = round(1.35 * font_px)
    top = gap + line_px * max((text.count("\n") + 1 for text in headings), default=0)
    size = (left + count * (width + gap), top + len(images) * (height + gap))
    figure = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(figure)
    for i, text in enumerate(headings):
        draw.text((left + i * (width + gap), gap / 2), text, fill="black", font=font)
    for j, (name, row) in enumerate(images.items()):
        y = top + j * (height + gap)
        draw.text((gap, y + height / 2), names[name], fill="black", font=font, anchor="lm")
        for i, image in enumerate(row):
            figure.paste(image.resize((width, height), Image.Resampling.NEAREST), (left + i * (width + gap), y))
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG at 150 dots per inch, whole or not at all."""
    atomic_write_bytes(path, figure_bytes(figure, "png"))


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as "png" or "svg"; the same figure gives the same bytes."""
    buffer = BytesIO()
    date = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=date)
    return buffer.getvalue()


def _new_figure(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _legend_columns(names: Sequence[str], width_in: float) -> int:
    """As many columns, at most 4, as fit a legend of 9 point letters that is filled column by column."""
    for columns in (4, 3, 2):
        rows = -(-len(names) // columns)
        longest = [max(map(len, names[i : i + rows])) for i in range(0, len(names), rows)]
        if columns <= len(names) and sum(0.45 + 0.07 * length for length in longest) <= width_in:
            return columns
    return 1


def _errors(intervals: Sequence[Interval]) -> list[list[float]]:
    """Distances from the means down and up, as matplotlib wants them."""
    down = [max(0.0, interval.mean - interval.low) for interval in intervals]
    return [down, [max(0.0, interval.high - interval.mean) for interval in intervals]]


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    """Lines broken between words; a single word may stick out."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(joined) > width_px:
            lines.append(word)
        else:
            lines[-1] = joined
    return "\n".join(lines)
