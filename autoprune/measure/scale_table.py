"""A record of suite=scales in words: the whole generation of everybody, then every forward that differs from dense."""

from collections.abc import Mapping

from autoprune.measure.scales import DENSE


def scale_table(record: Mapping[str, object]) -> list[str]:
    """Returns the lines of the terminal table."""
    rows = record["policies"]
    ceiling = f"best matrix product {record['matmul_ceiling_gflops']:.0f} GFLOP/s; share is of that"
    columns, widths = (
        ("ms", "+-", "ratio", "text", "scales", "decode", "GFLOP", "share", "peak MB"),
        (9, 7, 6, 7, 9, 8, 10, 7, 8),
    )
    lines = [ceiling, " " * 33 + " ".join(f"{column:>{width}s}" for column, width in zip(columns, widths, strict=True))]
    for name, row in rows.items():
        times = f"{row['ms']:9.1f} {row['spread_ms']:7.1f} {row['speed_up']:6.2f} {row['text_ms']:7.1f}"
        work = f"{row['scales_ms']:9.1f} {row['decoding_ms']:8.1f} {row['gflop']:10.1f} {_percent(row['share'])}"
        lines.append(f"{name[:32]:32s} {times} {work} {row['peak_memory_mb']:8.0f}")
    known = {_work(forward) for forward in rows[DENSE]["forwards"]}
    for name, row in rows.items():
        forwards = [forward for forward in row["forwards"] if name == DENSE or _work(forward) not in known]
        lines += _forwards(name, forwards, row["gflop"]) if forwards else []
    lines += _memory(rows)
    decoder = record["decoder"]
    way = "in strips" if decoder["strips"] else "compiled" if decoder["compiled"] else "uncompiled"
    lines.append(f"decoder: {decoder['samples']} at a time, {way}, {decoder['above_loaded_mb']:.1f} MB above the loaded model")
    if "dense_keys_values" in record:
        layouts = record["dense_keys_values"]
        both = f"{layouts['official_mb']:.0f} MB in the official layout, {layouts['ours_mb']:.0f} MB in ours in bfloat16"
        lines.append(f"keys and values, dense: {both}, {layouts['ratio']:.2f} times")
    return lines


def _memory(rows: Mapping[str, Mapping[str, object]]) -> list[str]:
    columns = ("measured", "resident", "allocated", "K/V", "caches", "decoding")
    heads = " ".join(f"{column:>9s}" for column in columns)
    lines = ["MB above the loaded model; all but the first predicted", f"{'':32s} {heads}"]
    for name, row in rows.items():
        parts = [row["predicted"][f"{part}_mb"] for part in ("resident", "allocated", "key_values", "caches", "decoding")]
        lines.append(f"{name[:32]:32s} " + " ".join(f"{value:9.1f}" for value in (row["above_loaded_mb"], *parts)))
    return lines


def _forwards(name: str, forwards: list[Mapping[str, object]], whole: float) -> list[str]:
    title = name if name == DENSE else f"{name}: where it differs from dense"
    columns = ("tokens", "kept", "rows", "GFLOP", "of all", "ms", "+-", "GFLOP/s", "share", "K/V MB")
    widths = (7, 7, 5, 10, 7, 9, 7, 9, 7, 8)
    heads = " ".join(f"{column:>{width}s}" for column, width in zip(columns, widths, strict=True))
    lines = [title, f"  {'scale':8s} {heads}"]
    for row in forwards:
        scales = "+".join(map(str, row["scales"]))
        counts = f"{row['tokens']:7d} {row['kept']:7d} {row['rows']:5d} {row['gflop']:10.2f} {_percent(row['gflop'] / whole)}"
        times = f"{row['ms']:9.2f} {row['spread_ms']:7.2f} {row['gflops']:9.1f} {_percent(row['share'])}"
        lines.append(f"  {scales:8s} {counts} {times} {row['key_value_mb']:8.1f}")
    return lines


def memory_table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Returns the lines of suite=memory."""
    lines = [f"{'MB above the loaded model':44s} {'predicted':>9s} {'measured':>9s} {'ratio':>6s}"]
    for name, row in rows.items():
        lines.append(f"  {name:42s} {row['predicted']:9.1f} {row['measured']:9.1f} {row['ratio']:6.3f}")
    return lines


def _work(row: Mapping[str, object]) -> tuple[object, ...]:
    return (*row["scales"], row["kept"], row["rows"], row["gflop"])


def _percent(share: float) -> str:
    return f"{100 * share:5.1f} %"
