"""The Pareto plot of a study as a PNG: speed-up against quality loss."""

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.files import whole_file
from autoprune.search.records import StudyResult
from autoprune.search.study_points import (
    CONTROL,
    DENSE,
    FRONT,
    KINDS,
    PRESET,
    REJECTED,
    SEARCH_FRONT,
    TOP,
    TRIAL,
    StudyPoint,
    study_points,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = {  # marker, size in points, colour, hollow
    REJECTED: ("o", 5, "#9aa4b1", True),
    TRIAL: ("o", 5, "#9aa4b1", False),
    CONTROL: ("s", 8, "#b91c1c", False),
    PRESET: ("D", 11, "#d97706", False),
    SEARCH_FRONT: ("o", 8, "#2563eb", True),
    FRONT: ("o", 8, "#2563eb", False),
    DENSE: ("*", 14, "#111827", False),
}
_SIDES, _DISTANCES = ((1, -1), (1, 1), (-1, -1), (-1, 1), (0, -1), (0, 1)), (9, 22, 36)


def save_pareto_image(result: StudyResult, path: Path) -> Path:
    """Writes the plot as a PNG of 1350 x 825 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = study_points(result)
    for kind in KINDS:
        shown = [point.measured for point in points if point.kind == kind]
        if shown:
            _draw_kind(axes, kind, [measured.speed_up for measured in shown], [measured.loss for measured in shown])
    axes.set_xlabel("speed-up over dense (dense latency / pruned latency)")
    axes.set_ylabel(loss_title(result))
    axes.set_title(study_title(result), loc="left", fontsize=11)
    axes.grid(color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    axes.margins(x=0.08, y=0.12)
    axes.set_ylim(top=TOP * max(point.measured.loss for point in points if point.kind != REJECTED) or None)
    canvas.draw()
    _place_labels(axes, [point for point in points if point.label])
    with whole_file(path) as temporary:
        figure.savefig(temporary)
    return path


def loss_title(result: StudyResult) -> str:
    """Returns what the loss is, as an axis says it."""
    return f"quality loss ({result.loss_text} to dense, same prompt and seed)"


def study_title(result: StudyResult) -> str:
    """Returns backbone, space, trials, batch and device in one line."""
    device = result.device.get("device_name", "this machine")
    return f"{result.backbone} / {result.space}, {len(result.trials)} trials, batch {result.dense.batch}, {device}"


def _draw_kind(axes: "Axes", kind: str, x: list[float], y: list[float]) -> None:
    marker, size, colour, hollow = _STYLES[kind]
    face, edge = ("none", colour) if hollow else (colour, "white")
    axes.scatter(x, y, s=size**2, marker=marker, c=face, edgecolors=edge, label=kind, zorder=3)
    if kind in (SEARCH_FRONT, FRONT):
        axes.plot(x, y, color=colour, linewidth=1.6, zorder=2)


def _place_labels(axes: "Axes", labelled: list[StudyPoint]) -> None:
    """Writes each label at the nearest place beside its point where it covers no label and no labelled point."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer, line = axes.figure.canvas.get_renderer(), {"arrowstyle": "-", "color": "#9aa4b1", "linewidth": 0.6}
    places = [(point.measured.speed_up, point.measured.loss) for point in labelled]
    taken = [Bbox.from_bounds(*(axes.transData.transform(place) - 10), 20, 20) for place in places]
    for point, place in zip(labelled, places, strict=True):
        style = {"fontsize": 9, "va": "center", "color": _STYLES[point.kind][2], "arrowprops": line}
        note = axes.annotate(point.label, place, xytext=(0, 0), textcoords="offset points", **style)
        for distance, (right, up) in product(_DISTANCES, _SIDES):
            note.set_position((distance * right, distance * up))
            note.set_horizontalalignment(("center", "left", "right")[right])
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer)
            if axes.bbox.fully_containsx(box.x1) and axes.bbox.fully_containsx(box.x0) and not box.count_overlaps(taken):
                break
        taken.append(box)
