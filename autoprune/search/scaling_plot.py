"""What simulated workers find: hypervolume against virtual time, and against the number of workers after as many trials."""

from collections.abc import Mapping
from pathlib import Path

from autoprune.files import whole_file

_COLOURS = {"believer": "#2563eb", "liar": "#d97706", "none": "#059669", "random": "#6b7280"}
_LABELS = {
    "believer": "gp, running trials believed",
    "liar": "gp, running trials bad",
    "none": "gp, running trials ignored",
    "random": "random",
}


def save_scaling_plot(record: Mapping[str, object], path: Path) -> Path:
    """Draws a record of scaling_bench.measure_scaling as a PNG: the median of seeds, lowest and highest as bars.

    The left side shows one sampler, the first, with a line for every number of workers.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = record["scaling"]
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    minutes, workers = figure.subplots(1, 2, sharey=True)
    first, by_workers = next(iter(rows.items()))
    shades = colormaps["viridis"].resampled(len(by_workers) + 1)
    for place, (count, row) in enumerate(by_workers.items()):
        minutes.plot(row["minutes"], row["trials"], color=shades(place), label=f"{count} worker{'s' * (count != '1')}")
    for name, each in rows.items():
        _against_workers(workers, each, color=_COLOURS[name], label=_LABELS[name])
    minutes.set_xscale("log")
    minutes.set_xlabel(f"virtual minutes ({_LABELS[first]})")
    minutes.set_ylabel("hypervolume / all that was found")
    workers.set_xscale("log", base=2)
    workers.set_xticks([int(count) for count in by_workers], list(by_workers))
    workers.set_xlabel(f"workers (after {_shortest(rows)} trials)")
    for axes in (minutes, workers):
        axes.grid(color="#e5e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", frameon=False, fontsize=9)
    canvas.draw()
    with whole_file(path) as temporary:
        figure.savefig(temporary)
    return path


def _against_workers(axes: object, by_workers: Mapping[str, Mapping], *, color: str, label: str) -> None:
    count = _shortest({label: by_workers}) - 1
    middles = [row["trials"][count] for row in by_workers.values()]
    below = [row["trials"][count] - row["lowest"][count] for row in by_workers.values()]
    above = [row["highest"][count] - row["trials"][count] for row in by_workers.values()]
    places = [int(workers) for workers in by_workers]
    axes.errorbar(places, middles, yerr=(below, above), color=color, label=label, marker="o", markersize=4, capsize=2)


def _shortest(rows: Mapping[str, Mapping[str, Mapping]]) -> int:
    return min(len(row["trials"]) for by_workers in rows.values() for row in by_workers.values())
