"""What measuring accumulates: per-image comparisons with dense, and seconds by policy over interleaved rounds."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

DENSE = ""


@dataclass(frozen=True)
class Pairs:
    """Per image [n]: SSIM and PSNR against dense, the candidate's score and the dense score."""

    ssim: np.ndarray
    psnr: np.ndarray
    score: np.ndarray
    dense: np.ndarray

    @staticmethod
    def joined(parts: list["Pairs"]) -> "Pairs":
        """Concatenates batches."""
        names = ("ssim", "psnr", "score", "dense")
        return Pairs(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


class Tally:
    """What accumulates over the rounds of a validation, by policy name; dense seconds under DENSE."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self.seconds: dict[str, list[float]] = {name: [] for name in (DENSE, *names)}
        self.parts: dict[str, list[Pairs]] = {name: [] for name in names}
        self.peaks = dict.fromkeys(names, 0.0)

    def order(self, turn: int) -> list[str]:
        """Returns the names, beginning with another one each round."""
        shift = turn % len(self._names)
        return self._names[shift:] + self._names[:shift]

    def add(self, times: Mapping[str, float]) -> None:
        """Adds one round of seconds."""
        for name, seconds in times.items():
            self.seconds[name].append(seconds)
