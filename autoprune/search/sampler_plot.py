"""Hypervolume of every sampler against trials and against seconds."""

from collections.abc import Mapping
from pathlib import Path

from autoprune.files import whole_file

_COLOURS = {"gp": "#2563eb", "tpe": "#d97706", "nsga2": "#059669", "random": "#6b7280", "grid": "#b91c1c"}


def save_sampler_plot(record: Mapping[str, object], path: Path) -> Path:
    """Draws a record of sampler_bench.measure_samplers as a PNG: the median of seeds, lowest and highest shaded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    trials, seconds = figure.subplots(1, 2, sharey=True)
    for name, curve in record["samplers"].items():
        places, colour = range(1, len(curve["trials"]) + 1), _COLOURS[name]
        trials.plot(places, curve["trials"], color=colour, label=name)
        trials.fill_between(places, curve["lowest"], curve["highest"], color=colour, alpha=0.12, linewidth=0)
        seconds.plot(curve["seconds"], curve["trials"], color=colour)
    trials.axvline(record["presets"], color="#9aa4b1", linewidth=0.8, linestyle="--")
    trials.set_xlabel("trials (left of the dashed line: presets)")
    seconds.set_xlabel("seconds of evaluations and sampler")
    trials.set_ylabel("hypervolume / all that was found")
    for axes in (trials, seconds):
        axes.axhline(0.9, color="#9aa4b1", linewidth=0.8)
        axes.grid(color="#e5e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    canvas.draw()
    with whole_file(path) as temporary:
        figure.savefig(temporary)
    return path
