"""Rendered scenes in one memory-mapped file, so that every training process reads them without rendering twice."""

import json
from pathlib import Path

import numpy as np

from autoprune.files import write_whole
from autoprune.testbed.distributed import Team
from autoprune.testbed.worlds import IMAGES, World


def open_images(folder: Path, count: int, *, seed: int, team: Team, world: World = IMAGES) -> np.ndarray:
    """Pixels of `world.pair(seed, 0 .. count - 1)` as uint8 [count, (F,) h, w, 3], read-only.

    The team shares the rendering; a complete file of the same seed, count and data version is used again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{world.version.replace(chr(47), chr(45))}-{seed}-{count}.u8"
    done = path.with_suffix(".json")
    shape = (count, *world.shape)
    finished = done.exists()
    if team.leads and not finished:
        np.memmap(path, np.uint8, "w+", shape=shape).flush()
    team.wait()
    if not finished:
        images = np.memmap(path, np.uint8, "r+", shape=shape)
        for index in range(team.rank, count, team.size):
            images[index] = world.pair(seed, index)[0]
        images.flush()
        team.wait()
        if team.leads:
            write_whole(done, json.dumps({"seed": seed, "count": count, "data": world.version}))
    return np.memmap(path, np.uint8, "r", shape=shape)
