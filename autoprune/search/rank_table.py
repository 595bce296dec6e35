"""How many random mixtures each chunk of blocks needs: FasterVAR/StageVAR's rank table, published or calibrated."""

from autoprune.search.calibration import Calibration

PUBLISHED = (0.0168, 0.1365, 0.2104, 0.2503, 0.2559, 0.1979, 0.1570, 0.1909)
ALPHA = "0.96"


def rank_table(calibration: Calibration | None, chunks: int) -> tuple[float, ...]:
    """Returns the share of tokens each of `chunks` chunks works on, for the energy ALPHA.

    A calibration of this backbone comes first; without one the table published for Infinity-2B at 40x40 (arXiv
    2512.16483, official code), whose eight entries are placed by the relative depth of a chunk.
    """
    measured = calibration.ranks.get(ALPHA) if calibration else None
    if measured and len(measured) == chunks:
        return measured
    return tuple(PUBLISHED[(2 * chunk + 1) * len(PUBLISHED) // (2 * chunks)] for chunk in range(chunks))
