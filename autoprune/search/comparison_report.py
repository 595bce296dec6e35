"""A comparison in words and as a record: comparison.json, comparison.md and the same table on a terminal."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from autoprune.errors import UserError
from autoprune.files import write_whole
from autoprune.search.comparison_figures import save_comparison_pictures, save_comparison_plot
from autoprune.search.comparison_records import DENSE, ComparedPolicy, Comparison
from autoprune.search.tables import drop_text

SCHEMA = "autoprune.comparison/1"
_NOTES = (
    "Speed-up: dense / policy, medians of seconds a batch, +- half the interquartile range over rounds. "
    "Loss: 1 - SSIM to dense, same prompt and seed. Score drop: dense - policy in points of 100, paired 95 % interval. "
    "Tokens: computed / dense, summed over scales, layers, sublayers and guidance branches; "
    "~ marks a policy that decides while it generates, counted in the first batch."
)


def write_comparison(comparison: Comparison, folder: Path, *, command: str, left_out: Sequence[str] = ()) -> list[Path]:
    """Writes record, table, plot and pictures into `folder` and returns their paths.

    `command` says how to get them again, `left_out` in a sentence each which presets could not be compared.
    """
    record = _record(comparison) | {"command": command, "left_out": list(left_out)}
    writers: Mapping[str, Callable[[Path], Path]] = {
        "comparison.json": lambda path: write_whole(path, json.dumps(record, indent=1) + "\n"),
        "comparison.md": lambda path: write_whole(path, _markdown(comparison, command, left_out)),
        "comparison.png": lambda path: save_comparison_plot(comparison, path),
        "comparison-pictures.png": lambda path: save_comparison_pictures(comparison, path),
    }
    try:
        return [write(folder / name) for name, write in writers.items()]
    except OSError as error:
        raise UserError(f"output {str(folder)!r} cannot be written ({error.strerror}); choose another folder.") from None


def comparison_table(comparison: Comparison) -> Table:
    """Returns one row a policy, dense first."""
    table = Table(box=box.SIMPLE_HEAD, title=_conditions(comparison), title_justify="left", caption_justify="left")
    table.caption = _NOTES
    for heading in _COLUMNS:
        words = heading in ("policy", "kind")
        table.add_column(Text(heading), justify="left" if words else "right", no_wrap=heading != "kind", overflow="fold")
    for row in comparison.policies:
        table.add_row(*(Text(cell(row)) for cell in _COLUMNS.values()))
    return table


def _record(comparison: Comparison) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "machine": dict(comparison.device),
        "backbone": {
            "name": comparison.backbone,
            "weights": comparison.revision,
            "scale_schedule": [list(grid) for grid in comparison.scale_schedule],
        },
        "settings": asdict(comparison.settings) | {"noise_seed": comparison.policies[0].measurement.seed},
        "prompts_sha256": comparison.prompts_sha256,
        "rounds": comparison.rounds,
        "interrupted": comparison.interrupted,
        "policies": [_row_record(row) for row in comparison.policies],
    }


def _row_record(row: ComparedPolicy) -> dict[str, object]:
    candidate = row.candidate
    alone = row.prompt_quantiles or (None, None)
    return {
        "name": candidate.name,
        "source": candidate.source,
        "kind": candidate.kind,
        "inferred": candidate.inferred,
        "adaptive": candidate.policy.adaptive,
        "share_computed": row.share_computed,
        "speed_up_spread": row.speed_up_spread,
        **dict(zip(("latency_p50", "latency_p95"), row.batch_quantiles, strict=True)),
        **dict(zip(("prompt_p50", "prompt_p95"), alone, strict=True)),
        **row.measurement.to_plain(),
        "policy": json.loads(candidate.policy.to_json()),
    }


def _markdown(comparison: Comparison, command: str, left_out: Sequence[str]) -> str:
    lines = [
        f"{_conditions(comparison)}  ",
        f"`{command}`",
        "",
        _markdown_row([heading.replace("\n", " ") for heading in _COLUMNS]),
    ]
    lines.append("|" + "|".join("---" if heading in ("policy", "kind") else "---:" for heading in _COLUMNS) + "|")
    lines += [_markdown_row([cell(row) for cell in _COLUMNS.values()]) for row in comparison.policies]
    lines += ["", _NOTES, ""]
    lines += [f"- **{row.candidate.name}**: {row.candidate.source}" for row in comparison.policies]
    lines += [f"- {sentence}" for sentence in left_out]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _conditions(comparison: Comparison) -> str:
    device, measured = comparison.device, comparison.policies[0].measurement
    prompts = f"{measured.prompts} held-out prompts, batch {measured.batch}"
    stopped = f" (stopped early, {comparison.settings.total_rounds} were asked for)" * comparison.interrupted
    machine = f"{device['device_name']}, {device['threads']} threads, {device['dtype']}, torch {device['torch']}"
    return f"{comparison.backbone}, {prompts}, {comparison.rounds} interleaved rounds{stopped}; {machine}"


def _kind(row: ComparedPolicy) -> str:
    return row.candidate.kind + ", inferred" * row.candidate.inferred


def _milliseconds(quantiles: tuple[float, float] | None) -> str:
    return " / ".join(f"{1000 * seconds:.0f}" for seconds in quantiles) if quantiles else "-"


_COLUMNS: Mapping[str, Callable[[ComparedPolicy], str]] = {
    "policy": lambda row: row.candidate.name,
    "kind": _kind,
    "speed-up": lambda row: f"{row.measurement.speed_up:.2f}x +- {row.speed_up_spread:.2f}",
    "ms a batch\np50 / p95": lambda row: _milliseconds(row.batch_quantiles),
    "ms alone\np50 / p95": lambda row: _milliseconds(row.prompt_quantiles),
    "loss": lambda row: f"{abs(row.measurement.loss):.3f}",
    "PSNR": lambda row: f"{row.measurement.psnr:.1f}",
    "SSIM": lambda row: f"{row.measurement.ssim:.3f}",
    "score": lambda row: f"{100 * row.measurement.score:.1f}" if row.measurement.scored else "-",
    "score drop\n[95 %]": lambda row: "-" if row.candidate.kind == DENSE else drop_text(row.measurement),
    "memory": lambda row: f"{row.measurement.peak_memory_mb:.0f} MB",
    "tokens": lambda row: "~ " * row.candidate.policy.adaptive + f"{100 * row.share_computed:.0f} %",
}
