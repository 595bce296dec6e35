"""What the processes of a study say, told apart: a log file each, and warnings on the terminal under their names."""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from autoprune.search.crew import TERMINAL, Crew
from autoprune.search.workers import log_file


def terminal(environment: Mapping[str, str]) -> TextIO:
    """Returns where a person looks: the standard error of whoever started this process as one of several, else its own."""
    return os.fdopen(os.dup(int(environment[TERMINAL])), "w", buffering=1) if TERMINAL in environment else sys.stderr


def log_apart(crew: Crew, folder: Path, screen: TextIO) -> None:
    """Sends what a shared process logs to its file in the study folder, and its warnings to the screen too."""
    if not crew.shared:
        return
    logger = logging.getLogger("autoprune")
    path = log_file(folder, crew.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    own, shown = logging.FileHandler(path), logging.StreamHandler(screen)
    own.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    shown.setFormatter(logging.Formatter(f"{crew.name}: %(message)s"))
    shown.setLevel(logging.WARNING)
    logger.handlers, logger.propagate = [own, shown], False
    logger.setLevel(logging.INFO)
