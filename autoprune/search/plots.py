"""The Pareto plot of a study, as a PNG to look at and an HTML page to explore: speed-up against quality loss."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.policy import Policy
from autoprune.policy_text import schedule_lines
from autoprune.search.records import FrontMember, Measurement, StudyResult, TrialRecord
from autoprune.search.tables import drop_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_REJECTED, _TRIAL, _CONTROL = "trial stopped or outside the constraints", "trial", "control"
_FRONT, _PRESET, _DENSE = "front (held-out prompts)", "preset (hand-picked schedule)", "dense"
_STYLES = {  # marker, size in points, colour, hollow
    _REJECTED: ("o", 5, "#9aa4b1", True),
    _TRIAL: ("o", 5, "#9aa4b1", False),
    _CONTROL: ("s", 8, "#b91c1c", False),
    _PRESET: ("D", 11, "#d97706", False),
    _FRONT: ("o", 8, "#2563eb", False),
    _DENSE: ("*", 14, "#111827", False),
}
_SYMBOLS = {"o": "circle", "s": "square", "D": "diamond", "*": "star"}
TOP = 1.2  # times the largest loss that counts; what was stopped or refused above that is on the page only
_SIDES, _DISTANCES = ((1, -1), (1, 1), (-1, -1), (-1, 1), (0, -1), (0, 1)), (9, 22, 36)


@dataclass(frozen=True)
class _Series:
    """Points of one kind: `x` speed-ups, `y` losses, `labels` for print ("" for none), `hovers` for the page."""

    name: str
    x: list[float]
    y: list[float]
    labels: list[str]
    hovers: list[str]

    def points(self) -> Iterator[tuple[float, float, str]]:
        """Yields (x, y, label)."""
        return zip(self.x, self.y, self.labels, strict=True)


def save_pareto_image(result: StudyResult, path: Path) -> Path:
    """Writes the plot as a PNG of 1350 x 825 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    every = _every_series(result)
    for series in every:
        marker, size, colour, hollow = _STYLES[series.name]
        face, edge = ("none", colour) if hollow else (colour, "white")
        axes.scatter(series.x, series.y, s=size**2, marker=marker, c=face, edgecolors=edge, label=series.name, zorder=3)
        if series.name == _FRONT:
            axes.plot(series.x, series.y, color=colour, linewidth=1.6, zorder=2)
    axes.set_xlabel("speed-up over dense (dense latency / pruned latency)")
    axes.set_ylabel(_loss(result))
    axes.set_title(_title(result), loc="left", fontsize=11)
    axes.grid(color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    axes.margins(x=0.08, y=0.12)
    axes.set_ylim(top=TOP * max(loss for series in every if series.name != _REJECTED for loss in series.y) or None)
    canvas.draw()
    _place_labels(axes, every)
    figure.savefig(path)
    return path


def save_pareto_page(result: StudyResult, path: Path) -> Path:
    """Writes the plot as one HTML page that needs no network; hovering over a point shows its schedule."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for series in _every_series(result):
        marker, size, colour, hollow = _STYLES[series.name]
        figure.add_scatter(
            x=series.x,
            y=series.y,
            name=series.name,
            mode="+".join(["lines"] * (series.name == _FRONT) + ["markers"] + ["text"] * any(series.labels)),
            marker={"symbol": _SYMBOLS[marker] + "-open" * hollow, "size": size + 2, "color": colour},
            text=series.labels,
            textposition="bottom right",
            hovertext=series.hovers,
            hoverinfo="text",
        )
    figure.update_layout(
        title=_title(result), template="plotly_white", hoverlabel={"align": "left"}, legend={"orientation": "h", "y": -0.15}
    )
    figure.update_xaxes(title="speed-up over dense")
    figure.update_yaxes(title=_loss(result))
    figure.write_html(path, include_plotlyjs=True)
    return path


def _loss(result: StudyResult) -> str:
    return f"quality loss ({result.loss_text} to dense, same prompt and seed)"


def _title(result: StudyResult) -> str:
    device = result.device.get("device_name", "this machine")
    return f"{result.backbone} / {result.space}, {len(result.trials)} trials, batch {result.dense.batch}, {device}"


def _every_series(result: StudyResult) -> list[_Series]:
    """Returns every kind of point that occurs, the least important first."""
    complete = [record for record in result.trials if record.measurement is not None and record.source != "preset:dense"]
    presets = [record for record in complete if record.source.startswith("preset:")]
    controls = [record for record in complete if record.source.startswith("control:")]
    searched = [record for record in complete if not record.preset and record.source != "repeat"]
    accepted = [record for record in searched if record.feasible and record.state == "complete"]
    every = [
        _trial_series(_REJECTED, [record for record in searched if record not in accepted], held_out={}),
        _trial_series(_TRIAL, accepted, held_out={}),
        _trial_series(_CONTROL, controls, held_out=result.presets),
        _trial_series(_PRESET, presets, held_out=result.presets),
        _front_series(result.front),
        _Series(_DENSE, [1.0], [0.0], ["dense"], ["<b>dense</b><br>nothing pruned"]),
    ]
    return [series for series in every if series.x]


def _trial_series(name: str, records: Sequence[TrialRecord], *, held_out: Mapping[str, Measurement]) -> _Series:
    """Returns the points of trials; presets and controls that were measured with the front stand where that puts them."""
    shown = [held_out.get(record.preset, record.measurement) for record in records]
    heads = [f"trial {record.number}, {record.source}" for record in records]
    return _Series(
        name,
        [measured.speed_up for measured in shown],
        [measured.loss for measured in shown],
        [record.preset for record in records],
        [_hover(head, measured, policy=record.policy) for head, measured, record in zip(heads, shown, records, strict=True)],
    )


def _front_series(front: Sequence[FrontMember]) -> _Series:
    tiers: dict[int, list[str]] = {}
    members = {member.trial.number: member for member in sorted(front, key=lambda member: member.held_out.speed_up)}
    for member in front:
        tiers.setdefault(member.trial.number, []).append(member.tier)
    labels = [", ".join(filter(None, tiers[number])) for number in members]
    return _Series(
        _FRONT,
        [member.held_out.speed_up for member in members.values()],
        [member.held_out.loss for member in members.values()],
        labels,
        [
            _hover(f"{label or 'front'}, trial {number}, held-out prompts", member.held_out, policy=member.trial.policy)
            for label, (number, member) in zip(labels, members.items(), strict=True)
        ],
    )


def _hover(head: str, measured: Measurement, *, policy: Policy) -> str:
    numbers = f"{measured.speed_up:.2f}x, loss {measured.loss:.3f}"
    if measured.scored:
        numbers += f", score drop {drop_text(measured)} points"
    return "<br>".join([f"<b>{head}</b>", numbers, *schedule_lines(policy)])


def _place_labels(axes: "Axes", labelled: list[_Series]) -> None:
    """Writes each label at the nearest place beside its point where it covers no label and no labelled point."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer, line = axes.figure.canvas.get_renderer(), {"arrowstyle": "-", "color": "#9aa4b1", "linewidth": 0.6}
    points = [(series, place, text) for series in labelled for *place, text in series.points() if text]
    taken = [Bbox.from_bounds(*(axes.transData.transform(place) - 10), 20, 20) for _, place, _ in points]
    for series, place, text in points:
        style = {"fontsize": 9, "va": "center", "color": _STYLES[series.name][2], "arrowprops": line}
        note = axes.annotate(text, place, xytext=(0, 0), textcoords="offset points", **style)
        for distance, (right, up) in product(_DISTANCES, _SIDES):
            note.set_position((distance * right, distance * up))
            note.set_horizontalalignment(("center", "left", "right")[right])
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer)
            if axes.bbox.fully_containsx(box.x1) and axes.bbox.fully_containsx(box.x0) and not box.count_overlaps(taken):
                break
        taken.append(box)
