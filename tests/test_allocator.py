"""Freed memory stays with the process once asked for, and leaves it when released."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from pathlib import Path
from autoprune.backbones.allocator import keep_freed_memory, release_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

before = resident()
keep_freed_memory()
torch.ones(50 * 2**20 // 4), torch.ones(100 * 2**20 // 4)
kept = resident() - before
release_freed_memory()
print(kept, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_kept_and_released() -> None:
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    kept, released = map(float, output.split())
    assert kept > 80 and released < 40
