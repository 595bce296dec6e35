"""The study in words: the final table and what was found."""

from pathlib import Path

from rich import box
from rich.table import Table

from autoprune.measure.metrics import METRICS
from autoprune.measure.metrics.summary import MetricValue
from autoprune.measure.statistics import Interval
from autoprune.search.records import Measurement, StudyResult

METRICS_ABREAST = 3  # columns that a narrow terminal has room for
SMALL_DEBT = 0.01  # dimensions that the front owes less to are not listed


def result_table(result: StudyResult) -> Table:
    """Returns one row per exported policy, from the held-out prompts; the drop is dense minus pruned, in points of 100.

    `p` is the Holm-adjusted p-value of a loss or drop beyond what the tier allows.
    """
    table = Table(box=box.SIMPLE_HEAD, title=_title(result), title_justify="left", caption_justify="left")
    dense = f"dense: {1000 * result.dense.latency:.0f} ms a batch of {result.dense.batch}"
    table.caption = f"{dense}; numbers from held-out prompts; files in {relative(result.directory)}"
    table.add_column("tier", overflow="fold")
    for name in ("speed-up", "loss", "score drop [95 %]", "memory", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("file", overflow="fold")
    for member in filter(lambda member: member.tier, result.front):
        file = member.policy_path.relative_to(result.directory) if member.policy_path else "-"
        table.add_row(member.tier, *_numbers(member.held_out), _p_text(member.promise_p), str(file))
    table.add_section()
    kinds = {trial.preset: trial.source.partition(":")[0] for trial in result.trials if trial.preset}
    for name, measured in result.presets.items():
        table.add_row(name, *_numbers(measured), "", f"({kinds.get(name, 'preset')})", style="dim")
    if not result.front:
        limit = "quality.max_score_drop" if result.dense.scored else "quality.max_loss"
        table.caption = f"no policy met the quality constraints: raise {limit} or budget.trials."
    elif not any(member.tier for member in result.front):
        table.caption = "no policy is shown to keep a tier's promise: raise quality.held_out_prompts, which narrows intervals."
    return table


def metric_tables(result: StudyResult) -> list[Table]:
    """Returns one row per exported policy and preset, each metric with its 95 % interval, a few metrics a table.

    The interval is of the value, or, where it has signs, of the change from dense.
    """
    rows = {member.tier: member.held_out for member in result.front if member.tier} | dict(result.presets)
    names = list(dict.fromkeys(name for measured in rows.values() for name in measured.metrics))
    tables = []
    for first in range(0, len(names), METRICS_ABREAST):
        shown = names[first : first + METRICS_ABREAST]
        table = Table(box=box.SIMPLE_HEAD, caption="held-out prompts, 95 % intervals; with signs: of the change from dense")
        table.add_column("", overflow="fold")
        for name in shown:
            table.add_column(METRICS[name].info.label, justify="right", no_wrap=True)
        for row, measured in rows.items():
            table.add_row(row, *(metric_text(measured.metrics.get(name)) for name in shown))
        tables.append(table)
    return tables


def findings(result: StudyResult) -> list[str]:
    """Returns what the study found in sentences: the front against the presets, what it owes to which dimensions, and how
    much of the time the sampler took."""
    lines = []
    if result.rivalry is not None and result.rivalry.presets > 0:  # presets no faster than dense have no hypervolume
        compared = result.rivalry
        ratios = ", ".join(f"{ratio:.2f} at {name}'s" for name, ratio in compared.ratios.items())
        lines.append(
            f"The front's hypervolume is {compared.front / compared.presets:.3f} times that of all presets together; "
            f"speed at the loss of each undominated preset / its own: {ratios} (best preset: {compared.best})."
        )
    if result.dimensions:
        helped = [f"{row.name} ({100 * row.owed:.0f} %)" for row in result.dimensions if row.owed >= SMALL_DEBT]
        lines.append(f"Share of the search front owed to each dimension: {', '.join(helped) or 'none of 1 % or more'}.")
    if result.sampler_share is not None:
        lines.append(f"The sampler took {100 * result.sampler_share:.1f} % of a trial's seconds (median).")
    return lines


def relative(path: Path) -> str:
    """Returns a path as the user would type it from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def drop_text(measured: Measurement) -> str:
    """Returns `+1.3 [-0.4, +3.0]`, in points of 100; `-` without scores."""
    if not measured.scored:
        return "-"
    low, high = measured.score_drop_interval
    return f"{100 * measured.score_drop:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _title(result: StudyResult) -> str:
    device = result.device.get("device_name", "this machine")
    return f"{result.backbone} / {result.space}: {len(result.trials)} trials on {device}"


def _numbers(measured: Measurement) -> tuple[str, ...]:
    speed_up = f"{measured.speed_up:.2f}x{_half_width(measured.speed_up_interval, digits=2)}"
    loss = f"{measured.loss:.3f}{_half_width(measured.loss_interval, digits=3)}"
    return (speed_up, loss, drop_text(measured), f"{measured.peak_memory_mb:.0f} MB")


def _half_width(interval: Interval | None, *, digits: int) -> str:
    """Returns half the width of a 95 % interval; nothing where none is known."""
    return "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.{digits}f}"


def _p_text(p: float | None) -> str:
    if p is None:
        return "-"
    return "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def metric_text(value: MetricValue | None) -> str:
    """Returns a value and its 95 % interval, with signs where that is of the change from dense."""
    if value is None:
        return "-"
    form = "{:.4g} [{:.4g}, {:.4g}]" if value.change is None else "{:.4g} [{:+.3g}, {:+.3g}]"
    return form.format(value.value, *value.interval)
