"""The lines that `python -m autoprune.bench suite=scaling` prints."""

from collections.abc import Iterator, Mapping


def scaling_table(rows: Mapping[str, Mapping[str, Mapping]]) -> Iterator[str]:
    """Yields a line for every sampler and number of workers."""
    yield f"{'sampler':10s} {'workers':>7s} {'trials':>6s} {'minutes':>8s} {'hypervolume':>22s} {'seconds an ask':>22s}"
    for name, by_workers in rows.items():
        for workers, row in by_workers.items():
            share = f"{row['trials'][-1]:.3f} ({row['lowest'][-1]:.3f} to {row['highest'][-1]:.3f})"
            ask = f"{row['ask']['mean']:.3f}, at most {row['ask']['most']:.2f}"
            yield f"{name:10s} {workers:>7s} {len(row['trials']):>6d} {row['minutes'][-1]:8.1f} {share:>22s} {ask:>22s}"
