"""Which dimensions of a search space matter, as bars: importance for both objectives, and what the front owes to each."""

from collections.abc import Sequence
from pathlib import Path

from autoprune.files import whole_file
from autoprune.search.records import DimensionRow

SHOWN = 16
_BARS = {"latency": ("importance for latency", "#2563eb"), "loss": ("importance for loss", "#d97706")}
_OWED = ("share of the front's hypervolume gone without it", "#111827")


def save_dimension_plot(rows: Sequence[DimensionRow], path: Path) -> Path:
    """Writes a PNG with the SHOWN rows that matter most in any of the three ways."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: max(row.owed, row.latency, row.loss))[-SHOWN:]
    figure = Figure(figsize=(9, 0.4 * len(rows) + 1.6), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for shift, (name, (label, colour)) in zip((0.27, 0.0), _BARS.items(), strict=True):
        places = [index + shift for index in range(len(rows))]
        axes.barh(places, [getattr(row, name) for row in rows], height=0.25, color=colour, label=label)
    places = [index - 0.27 for index in range(len(rows))]
    axes.barh(places, [row.owed for row in rows], height=0.25, color=_OWED[1], label=_OWED[0])
    axes.set_yticks(range(len(rows)), [f"{row.name} ({row.used})" for row in rows])
    axes.set_xlabel("share; in brackets the trials that used the dimension")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    canvas.draw()
    with whole_file(path) as temporary:
        figure.savefig(temporary)
    return path
