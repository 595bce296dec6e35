"""Host memory while released weights are loaded, on a synthetic sharded checkpoint in the official layout."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

CHILD = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from autoprune.backbones.checkpoints import WeightFiles
from autoprune.backbones.infinity import Infinity, TransformerConfig
from autoprune.backbones.loading import load_weights
from autoprune.backbones.released import Target
from autoprune.measure.memory import PeakMemory
config, files = TransformerConfig(**json.loads(sys.argv[1])), WeightFiles(Path(sys.argv[2]))
dtype, cpu = getattr(torch, sys.argv[3]), torch.device("cpu")
with torch.device("meta"):
    model = Infinity(config)
torch.rand(2**20).to(dtype)  # the library's own pages and threads are not what loading needs
with PeakMemory(cpu) as before:
    pass
with PeakMemory(cpu) as loading:
    load_weights(model, files, Target(cpu, dtype).transformer(), what="the transformer", convert=dict)
kept = sum(value.nbytes for value in model.state_dict().values())
print(json.dumps({"peak": loading.megabytes - before.megabytes, "kept": kept / 2**20, "shard": files.largest() / 2**20}))
"""


@dataclass(frozen=True)
class LoadingCase:
    """A transformer of `width` and `depth` in float32, saved in `shards` files."""

    width: int = 1024
    depth: int = 16
    shards: int = 4


def measure_loading(case: LoadingCase, folder: Path) -> dict[str, dict[str, float]]:
    """Writes the checkpoint into `folder` and loads it in fresh processes, in its own precision and in bfloat16.

    Megabytes: `peak` above what the process had before, `kept` by the loaded model, the largest `shard`; `ratio` is
    (peak - kept) / shard, what loading needs besides the model: 1 where one shard is in memory beside it.
    """
    config = _write(case, folder)
    rows = {}
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-c", CHILD, json.dumps(config), str(folder), dtype]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows[dtype] = row | {"ratio": (row["peak"] - row["kept"]) / row["shard"]}
    return rows


def _write(case: LoadingCase, folder: Path) -> dict[str, object]:
    """Writes shards of about one size, one tensor after the other, so that writing needs little memory too."""
    from autoprune.backbones.infinity import Infinity, TransformerConfig

    config = TransformerConfig(width=case.width, heads=8, depth=case.depth, chunks=case.depth, token_bits=32)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in Infinity(config).state_dict().items()}
    limit, parts = sum(shape.numel() for shape in shapes.values()) / case.shards, [{}]
    for key, shape in shapes.items():
        if sum(each.numel() for each in parts[-1].values()) >= limit:
            parts.append({})
        parts[-1][key] = shape
    places = {}
    for number, part in enumerate(parts):
        name = f"pytorch_model-{number:05d}.bin"
        torch.save({key: torch.rand(shape) for key, shape in part.items()}, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return asdict(config)
