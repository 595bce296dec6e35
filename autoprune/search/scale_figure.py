"""Where the milliseconds go, as stacked bars: one bar a schedule, one segment a scale, text and decoding at its ends.

Where nothing was timed, FLOPs of the scales alone.
"""

from collections.abc import Mapping
from pathlib import Path

from autoprune.files import whole_file

_TEXT, _DECODING, _REST = "#9ca3af", "#4b5563", "#e5e7eb"
_FIRST_NAMED = 0.04  # share of the longest bar from which a segment has its scale's number written in it


def save_scale_plot(record: Mapping[str, object], path: Path) -> Path:
    """Writes a PNG of a record of `python -m autoprune.bench suite=scales`; scales decoded together are one segment."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows, timed = record["scales"]["policies"], record["scales"]["matmul_ceiling_gflops"] is not None
    count, machine = len(record["backbone"]["scale_schedule"]), record["machine"]
    colours = colormaps["viridis"].resampled(count)
    figure = Figure(figsize=(11, 0.36 * len(rows) + 2.2), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = max(row["ms" if timed else "gflop"] for row in rows.values())
    for place, row in enumerate(rows.values()):
        left = 0.0
        for label, width, colour in _segments(row, colours) if timed else _work(row, colours):
            axes.barh(place, width, left=left, color=colour, edgecolor="white", linewidth=0.4)
            if label and width > _FIRST_NAMED * longest:
                axes.text(left + width / 2, place, label, ha="center", va="center", fontsize=7, color=_ink(colour))
            left += width
        sums = f"{row['ms']:.0f} ms, {row['speed_up']:.2f}x" if timed else f"{row['gflop'] / 1000:.0f} TFLOP"
        axes.text(left + 0.005 * longest, place, sums, va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * longest)
    timing = f"milliseconds of a batch of {record['batch']} (medians of {record['rounds']} interleaved rounds)"
    axes.set_xlabel(timing if timed else f"GFLOP of a batch of {record['batch']}, planned; nothing was timed")
    where = f", {machine['device_name']}, {machine['threads']} threads" if timed else ""
    title = f"{record['backbone']['name']}{where}, {machine['dtype']}"
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    ends = {"text": _TEXT, "decoding": _DECODING, "rest": _REST} if timed else {}
    handles = [Patch(color=colours(scale), label=f"scale {scale}") for scale in range(count)]
    handles += [Patch(color=colour, label=name) for name, colour in ends.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    canvas.draw()
    with whole_file(path) as temporary:
        figure.savefig(temporary)
    return path


def _segments(row: Mapping[str, object], colours) -> list[tuple[str, float, object]]:  # noqa: ANN001 (a matplotlib Colormap)
    """Returns label, milliseconds and colour of everything in a bar, in the order it runs."""
    scales = [_segment(part, part["ms"], colours) for part in row["forwards"]]
    rest = max(0.0, row["ms"] - row["text_ms"] - row["scales_ms"] - row["decoding_ms"])
    return [("", row["text_ms"], _TEXT), *scales, ("", row["decoding_ms"], _DECODING), ("", rest, _REST)]


def _work(row: Mapping[str, object], colours) -> list[tuple[str, float, object]]:  # noqa: ANN001
    return [_segment(part, part["gflop"], colours) for part in row["forwards"]]


def _segment(part: Mapping[str, object], width: float, colours) -> tuple[str, float, object]:  # noqa: ANN001
    scales = range(part["scale"], part["scale"] + len(part["scales"]))
    return "+".join(map(str, scales)), width, colours(scales[-1])


def _ink(colour: object) -> str:
    """Returns black or white, whichever reads better on a colour (a name, or red, green and blue in [0, 1])."""
    if isinstance(colour, str):
        return "black"
    red, green, blue = colour[:3]
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "white"
