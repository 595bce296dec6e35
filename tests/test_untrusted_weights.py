"""Weights whose pickle would run code: at every place that takes .pth or .bin nothing runs, and the error is one sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_clip import save_clip

from autoprune.backbones import load_backbone
from autoprune.backbones.checkpoints import WeightFiles
from autoprune.backbones.text_models import TextModelSource
from autoprune.errors import UserError
from autoprune.measure.metrics.clip_score import CLIP
from autoprune.measure.metrics.contract import MetricContext
from autoprune.measure.metrics.feature_network import load_network
from autoprune.measure.metrics.image_reward import read_blip
from autoprune.measure.metrics.lpips import ALEXNET, load_trunk
from autoprune.measure.metrics.pretrained import PretrainedFolder

CPU = torch.device("cpu")


class WritesAFile:
    """What an attacker pickles: unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def clip_folder(folder: Path, file: Path) -> Path:
    save_clip(folder / "clip")
    (folder / "clip" / "model.safetensors").unlink()
    return file.rename(folder / "clip" / "pytorch_model.bin").parent


def sharded(folder: Path, file: Path) -> Path:
    (folder / "model.bin.index.json").write_text(json.dumps({"weight_map": {"a": file.name}}))
    return folder


def pretrained(path: Path) -> PretrainedFolder:
    return PretrainedFolder("clip_score", CLIP, MetricContext(CPU, {CLIP.key: path}))


LOADERS: dict[str, tuple[Callable[[Path, Path], Path], Callable[[Path], object]]] = {
    "a file": (lambda folder, file: file, lambda path: list(WeightFiles(path).states())),
    "shards": (sharded, lambda path: list(WeightFiles(path).states())),
    "lpips": (lambda folder, file: file, lambda path: load_trunk(ALEXNET, path, CPU)),
    "image reward": (lambda folder, file: file, lambda path: read_blip(path, CPU)),
    "feature network file": (lambda folder, file: file, lambda path: load_network(path, CPU)),
    "feature network folder": (clip_folder, lambda path: load_network(path, CPU)),
    "pretrained metric": (clip_folder, lambda path: pretrained(path).model("CLIPModel")),
    "text encoder": (clip_folder, lambda path: TextModelSource(str(path), "clip", "CLIPModel").load(CPU, torch.float32)),
    "backbone": (lambda folder, file: file, lambda path: load_backbone("tiny", weights=path)),
}


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", LOADERS)
def test_a_pickle_that_runs_code_is_refused_in_one_sentence(tmp_path: Path, name: str, old_format: bool) -> None:
    place, load = LOADERS[name]
    proof = tmp_path / "executed"
    file = tmp_path / "weights.pth"
    state = {"a": torch.ones(2), "surprise": WritesAFile(proof)}
    torch.save(state, file, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(UserError) as caught:
        load(place(tmp_path, file))
    assert not proof.exists() and "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_the_attack_works_where_nothing_guards(tmp_path: Path) -> None:
    torch.save(WritesAFile(tmp_path / "executed"), tmp_path / "weights.pth")
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert (tmp_path / "executed").exists()
