"""A comparison as pictures: loss against speed-up with every policy named, and what each policy makes of the same prompts."""

import math
import textwrap
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autoprune.files import whole_file
from autoprune.moving_pictures import picture, save_sheets, shown_frames
from autoprune.search.comparison_records import ComparedPolicy, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox
    from PIL.Image import Image

_STYLES = {  # marker, size in points, colour
    "preset": ("D", 7, "#d97706"),
    "control": ("s", 6, "#b91c1c"),
    "file": ("o", 7, "#2563eb"),
    "dense": ("*", 14, "#111827"),
}
_RINGS = (14, 20, 30, 44, 60, 80, 105, 135, 170, 210, 260)  # distances of a label from its point, in pixels
_AWAY = 25  # pixels that a label rather moves than to cover a bar or to lie nearer to another point
_ANGLES = tuple(2 * math.pi * step / 16 for step in range(16))
_SIDE, _GAP, _TEXT, _FONT = 160, 8, 190, 14


def save_comparison_plot(comparison: Comparison, path: Path) -> Path:
    """Writes loss against speed-up as a PNG; bars are the spread of the speed-up and the interval of the mean loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (kind, inferred), rows in _groups(comparison.policies).items():
        marker, size, colour = _STYLES[kind]
        axes.errorbar(
            [row.measurement.speed_up for row in rows],
            [row.measurement.loss for row in rows],
            xerr=[row.speed_up_spread for row in rows],
            yerr=np.array([_arms(row) for row in rows]).T,
            fmt=marker,
            markersize=size,
            color=colour,
            markerfacecolor="white" if inferred else colour,
            elinewidth=1,
            ecolor="#c3cad4",
            label=kind + ", parts inferred" * inferred,
        )
    axes.set_xlabel("speed-up over dense (bar: half the interquartile range over rounds)")
    axes.set_ylabel("quality loss (1 - SSIM to dense; bar: 95 % interval of the mean)")
    measured = comparison.policies[0].measurement
    conditions = f"{measured.prompts} prompts, batch {measured.batch}, {comparison.device['device_name']}"
    axes.set_title(f"{comparison.backbone}, {conditions}", loc="left", fontsize=11)
    axes.grid(color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1, y=0.1)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    canvas.draw()
    _write_labels(axes, comparison.policies)
    with whole_file(path) as temporary:
        figure.savefig(temporary)
    return path


def place_boxes(
    points: np.ndarray, sizes: np.ndarray, *, taken: Sequence["Bbox"], crossed: Sequence["Bbox"], frame: "Bbox"
) -> list["Bbox"]:
    """Returns for each point [n, 2] a box of its size [n, 2] beside it, inside `frame`, off all others and `taken`.

    It rather covers boxes of `crossed`, or lies nearer to another point than to its own, than to go far away. Where no
    place is free, it is the one with the fewest overlaps.
    """
    placed: list[Bbox] = []
    for number, (point, size) in enumerate(zip(points, sizes, strict=True)):
        others = np.delete(points, number, axis=0)
        places = [(distance, _beside(point, size, distance, angle)) for distance, angle in product(_RINGS, _ANGLES)]

        def cost(place: tuple[float, "Bbox"], others: np.ndarray = others) -> float:
            distance, box = place
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            hard = 10 * outside + box.count_overlaps([*taken, *placed])
            gaps = np.maximum(np.maximum(box.min - others, others - box.max), 0)
            nearer = np.count_nonzero(np.hypot(*gaps.T) < distance)
            return 1000 * hard + _AWAY * (box.count_overlaps(crossed) + nearer) + distance

        placed.append(min(places, key=cost)[1])
    return placed


def _beside(point: np.ndarray, size: np.ndarray, distance: float, angle: float) -> "Bbox":
    from matplotlib.transforms import Bbox

    (x, y), (width, height) = point, size
    left = x + math.cos(angle) * (distance + width / 2) - width / 2
    low = y + math.sin(angle) * (distance + height / 2) - height / 2
    return Bbox.from_bounds(left, low, width, height)


def save_comparison_pictures(comparison: Comparison, path: Path) -> Path:
    """Writes a grid as a PNG, of videos as an animated WebP: a row a prompt, a column a policy, dense first, each under its
    name. Returns the path of what was written."""
    from PIL import Image

    height, width = comparison.pictures[next(iter(comparison.pictures))].shape[-2:]
    side = (_SIDE, round(_SIDE * height / width))
    empty, top = _empty_sheet(comparison, side)
    videos = [shown_frames(images, comparison.frame_rate) for images in comparison.pictures.values()]
    sheets = []
    for columns in zip(*(frames for frames, _ in videos), strict=True):
        sheets.append(empty.copy())
        for column, row in product(range(len(columns)), range(len(comparison.texts))):
            shown = picture(columns[column][row]).resize(side, Image.Resampling.LANCZOS)
            sheets[-1].paste(shown, (_left(column), top + row * (side[1] + _GAP)))
    return save_sheets(path, sheets, rate=videos[0][1], lossless=False)  # resized frames of many policies


def _empty_sheet(comparison: Comparison, side: tuple[int, int]) -> tuple["Image", int]:
    """Returns the sheet without its pictures, and where their first row begins."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT)
    heads = [_wrapped_name(name, font) for name in comparison.pictures]
    top = 2 * _GAP + (_FONT + 5) * max(head.count("\n") + 1 for head in heads)
    sheet = Image.new("RGB", (_left(len(heads)) + _GAP, top + len(comparison.texts) * (side[1] + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        draw.multiline_text((_left(column), _GAP), head, fill="black", font=font, spacing=4)
    for row, text in enumerate(comparison.texts):
        place = (_GAP, top + row * (side[1] + _GAP) + 4)
        shown = textwrap.fill(text, 22, max_lines=max(1, side[1] // (_FONT + 7)), placeholder=" ...")
        draw.multiline_text(place, shown, fill="#374151", font=font, spacing=4)
    return sheet, top


def _left(column: int) -> int:
    return _TEXT + column * (_SIDE + _GAP)


def _groups(rows: Sequence[ComparedPolicy]) -> dict[tuple[str, bool], list[ComparedPolicy]]:
    groups: dict[tuple[str, bool], list[ComparedPolicy]] = {}
    for row in rows:
        groups.setdefault((row.candidate.kind, row.candidate.inferred), []).append(row)
    return groups


def _arms(row: ComparedPolicy) -> tuple[float, float]:
    """Returns how far the interval of the loss reaches below and above it."""
    loss, (low, high) = row.measurement.loss, row.measurement.loss_interval
    return max(0.0, loss - low), max(0.0, high - loss)


def _write_labels(axes: "Axes", rows: Sequence[ComparedPolicy]) -> None:
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer, pixels = axes.figure.canvas.get_renderer(), "figure pixels"
    points = axes.transData.transform([(row.measurement.speed_up, row.measurement.loss) for row in rows])
    style, line = {"fontsize": 9, "ha": "center", "va": "center"}, {"arrowstyle": "-", "color": "#9aa4b1", "linewidth": 0.6}
    notes = []
    for row, point in zip(rows, points, strict=True):
        colour = _STYLES[row.candidate.kind][2]
        notes.append(axes.annotate(row.candidate.name, point, point, pixels, pixels, line, color=colour, **style))
        notes[-1].set_path_effects([withStroke(linewidth=3, foreground="white")])
    boxes = [Text.get_window_extent(note, renderer) for note in notes]
    sizes = np.array([(box.width + 4, box.height + 4) for box in boxes])
    markers = [Bbox.from_bounds(x - 13, y - 13, 26, 26) for x, y in points]
    bars = [bar for row in rows for bar in _bars(axes, row)]
    boxes = place_boxes(points, sizes, taken=markers, crossed=bars, frame=axes.bbox)
    for note, box in zip(notes, boxes, strict=True):
        note.set_position(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))


def _bars(axes: "Axes", row: ComparedPolicy) -> list["Bbox"]:
    """Returns the boxes of a point's two bars, in pixels."""
    from matplotlib.transforms import Bbox

    right, up, (below, above) = row.measurement.speed_up, row.measurement.loss, _arms(row)
    ends = [(right - row.speed_up_spread, up - below), (right, up), (right + row.speed_up_spread, up + above)]
    (left, low), (x, y), (right, high) = axes.transData.transform(ends)
    return [Bbox([(left, y - 1), (right, y + 1)]), Bbox([(x - 1, low), (x + 1, high)])]


def _wrapped_name(name: str, font: object) -> str:
    """Returns a name in lines that fit a column, broken after hyphens where possible."""
    letters = max(4, int(_SIDE / (font.getlength("n" * 10) / 10)))
    return textwrap.fill(name, letters, break_on_hyphens=True)
