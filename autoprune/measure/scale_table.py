"""A record of suite=scales in words: the whole generation of everybody, then every forward that differs from dense."""

from collections.abc import Iterator, Mapping
from itertools import groupby

from autoprune.measure.scales import DENSE


def scale_table(record: Mapping[str, object]) -> list[str]:
    """Returns the lines of the terminal table."""
    rows, ceiling = record["policies"], record["matmul_ceiling_gflops"]
    title = "planned, nothing was timed" if ceiling is None else f"best matrix product {ceiling:.0f} GFLOP/s; share is of that"
    columns, widths = (
        ("ms", "+-", "ratio", "text", "scales", "decode", "GFLOP", "share", "peak MB"),
        (9, 7, 6, 7, 9, 8, 10, 7, 8),
    )
    lines = [title, " " * 33 + " ".join(f"{column:>{width}s}" for column, width in zip(columns, widths, strict=True))]
    for name, row in rows.items():
        times = f"{_or_dash(row, 'ms', '9.1f')} {_or_dash(row, 'spread_ms', '7.1f')} {_or_dash(row, 'speed_up', '6.2f')}"
        times += f" {_or_dash(row, 'text_ms', '7.1f')} {_or_dash(row, 'scales_ms', '9.1f')}"
        work = f"{_or_dash(row, 'decoding_ms', '8.1f')} {row['gflop']:10.1f} {_percent(row['share'])}"
        lines.append(f"{name[:32]:32s} {times} {work} {_or_dash(row, 'peak_memory_mb', '8.0f')}")
    known = {_work(forward) for forward in rows[DENSE]["forwards"]}
    for name, row in rows.items():
        forwards = [forward for forward in row["forwards"] if name == DENSE or _work(forward) not in known]
        lines += _forwards(name, forwards, row["gflop"]) if forwards else []
    lines += _memory(rows)
    decoder = record["decoder"]
    way = "in strips" if decoder["strips"] else "compiled" if decoder["compiled"] else "uncompiled"
    above = "" if decoder["above_loaded_mb"] is None else f", {decoder['above_loaded_mb']:.1f} MB above the loaded model"
    lines.append(f"decoder: {decoder['samples']} at a time, {way}{above}")
    if "dense_keys_values" in record:
        layouts = record["dense_keys_values"]
        both = f"{layouts['official_mb']:.0f} MB in the official layout, {layouts['ours_mb']:.0f} MB in ours in bfloat16"
        lines.append(f"keys and values, dense: {both}, {layouts['ratio']:.2f} times")
    return lines


def _memory(rows: Mapping[str, Mapping[str, object]]) -> list[str]:
    columns = ("measured", "resident", "allocated", "K/V", "in host", "caches", "decoding")
    heads = " ".join(f"{column:>9s}" for column in columns)
    lines = ["MB above the loaded model; all but the first predicted", f"{'':32s} {heads}"]
    for name, row in rows.items():
        names = ("resident", "allocated", "key_values", "host", "caches", "decoding")
        parts = " ".join(f"{row['predicted'][f'{part}_mb']:9.1f}" for part in names)
        lines.append(f"{name[:32]:32s} {_or_dash(row, 'above_loaded_mb', '9.1f')} {parts}")
    return lines


def _forwards(name: str, forwards: list[Mapping[str, object]], whole: float) -> list[str]:
    title = name if name == DENSE else f"{name}: where it differs from dense"
    columns = ("runs", "tokens", "kept", "rows", "GFLOP", "of all", "ms", "+-", "GFLOP/s", "share", "K/V MB")
    widths = (5, 7, 7, 5, 10, 7, 9, 7, 9, 7, 8)
    heads = " ".join(f"{column:>{width}s}" for column, width in zip(columns, widths, strict=True))
    lines = [title, f"  {'scale':8s} {heads}"]
    for label, count, row in _runs(forwards):
        counts = f"{count:5d} {row['tokens']:7d} {row['kept']:7d} {row['rows']:5d} {row['gflop']:10.2f}"
        times = f"{_or_dash(row, 'ms', '9.2f')} {_or_dash(row, 'spread_ms', '7.2f')} {_or_dash(row, 'gflops', '9.1f')}"
        share = f"{_percent(count * row['gflop'] / whole)} {times} {_percent(row['share'])}"
        lines.append(f"  {label:8s} {counts} {share} {row['key_value_mb']:8.1f}")
    return lines


def _runs(forwards: list[Mapping[str, object]]) -> Iterator[tuple[str, int, Mapping[str, object]]]:
    """Yields the scale, of videos behind its clip, how often it runs with the same work, and the row of the last time."""
    clips = len({row["clip"] for row in forwards}) > 1 or forwards[0]["clip"] > 0
    for _, runs in groupby(forwards, key=lambda row: (row["scale"], *_work(row)[1:])):
        *_, last = rows = list(runs)
        names = [last["scale"] + place for place in range(len(last["scales"]))]
        label = "+".join(map(str, names))
        yield f"{last['clip']}:{label}" if clips else label, len(rows), last


def memory_table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Returns the lines of suite=memory."""
    lines = [f"{'MB above the loaded model':62s} {'predicted':>9s} {'measured':>9s} {'ratio':>6s}"]
    for name, row in rows.items():
        lines.append(f"  {name:60s} {row['predicted']:9.1f} {row['measured']:9.1f} {row['ratio']:6.3f}")
    return lines


def _work(row: Mapping[str, object]) -> tuple[object, ...]:
    return (tuple(row["scales"]), row["kept"], row["rows"], row["gflop"])


def _percent(share: float | None) -> str:
    return f"{'-':>7s}" if share is None else f"{100 * share:5.1f} %"


def _or_dash(row: Mapping[str, object], name: str, form: str) -> str:
    """Returns a value in this form, or a dash as wide where nothing was measured."""
    return f"{'-':>{form.partition('.')[0]}s}" if row[name] is None else f"{row[name]:{form}}"
