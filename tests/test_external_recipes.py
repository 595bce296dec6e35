"""The shipped recipes: each reads, and its script turns what the benchmark's program gives into scores.

The programs are stand-ins of a few lines that take the published arguments and write the published layout.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from autoprune.errors import UserError
from autoprune.measure.metrics.contract import ImageBatch, MetricContext
from autoprune.measure.metrics.external import External
from autoprune.measure.metrics.external_recipe import Recipe
from autoprune.search.folders import shipped_folder

FOLDER = shipped_folder("conf") / "quality" / "external"
RECIPES = {file.stem: file for file in FOLDER.glob("*.yaml")}
CPU = torch.device("cpu")
GENEVAL = """
import argparse, json, os
parser = argparse.ArgumentParser()
parser.add_argument("imagedir"); parser.add_argument("--outfile"); parser.add_argument("--model-path")
given = parser.parse_args()
with open(given.outfile, "w") as out:
    for folder in sorted(filter(str.isdigit, os.listdir(given.imagedir)), reverse=True):
        metadata = json.load(open(os.path.join(given.imagedir, folder, "metadata.jsonl")))
        for name in os.listdir(os.path.join(given.imagedir, folder, "samples")):
            path = os.path.join(given.imagedir, folder, "samples", name)
            right = metadata["tag"] == "colors" and os.path.isdir(given.model_path)
            out.write(json.dumps({"filename": path, "tag": metadata["tag"], "correct": right}) + "\\n")
"""
DPG = """
import argparse, os
parser = argparse.ArgumentParser()
for name in ("--image-root-path", "--csv", "--res-path"): parser.add_argument(name)
for name in ("--resolution", "--pic-num"): parser.add_argument(name, type=int)
given = parser.parse_args()
assert open(given.csv).read() == "questions" and given.resolution == 8 and given.pic_num == 1
scores = {"stanford7": 0.25, "vrd3": 0.75}
with open(given.res_path, "w") as out:
    for name in sorted(os.listdir(given.image_root_path)):
        score = str(scores[name.split(".")[0]])
        out.write(os.path.join(given.image_root_path, name) + ", " + score + ", " + score + "\\n")
    out.write("Model: x\\nL1 category scores:\\n\\tentity: 50.0\\nDPG-Bench score: 50.0\\n")
"""
HPSV3 = """
class HPSv3RewardInferencer:
    def __init__(self, device, checkpoint_path): assert device == "cuda" and open(checkpoint_path).read() == "weights"
    def reward(self, prompts, image_paths):
        from PIL import Image
        return [[Image.open(path).getpixel((0, 0))[0] + len(prompt), 9.0] for path, prompt in zip(image_paths, prompts)]
"""
VBENCH = """
import json, os
def init_submodules(dimensions, local=False, read_frame=False):
    assert local and os.path.isdir(os.environ["VBENCH_CACHE_DIR"])
    return {name: name + " models" for name in dimensions}
def compute(table, device, models, name, value):
    assert models == name + " models"
    paths = [one["video_list"][0] for one in json.load(open(table)) if name in one["dimension"]]
    return value, [{"video_path": path, "video_results": value} for path in reversed(paths)]
"""
PART = """
from vbench.utils import compute
def compute_{0}(table, device, models): return compute(table, device, models, "{0}", {1})
"""


def external(recipe: str, **weights: Path) -> External:
    python = {key: Path(sys.executable) for key in Recipe.read(RECIPES[recipe]).weights if key.endswith("_python")}
    return External(MetricContext(CPU, {"external": RECIPES[recipe]} | python | weights))


def pictures(details: list[dict[str, object]]) -> ImageBatch:
    values = torch.tensor([10.0, 20.0])[:, None, None, None] / 255
    return ImageBatch(values.expand(2, 3, 8, 8), ["a cat", "two dogs"], details)


def written(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_reads_and_asks_for_what_it_needs(name: str) -> None:
    recipe = Recipe.read(RECIPES[name])
    assert recipe.name == name and "{here}/" in recipe.command and "github.com/" in recipe.source
    script = FOLDER / recipe.command.split("{here}/")[1].split()[0]
    compile(script.read_text(), script, "exec")
    with pytest.raises(
        UserError, match=rf"metric external \({name}\) needs weights\..*_python, got nothing; .*{recipe.source}"
    ):
        External(MetricContext(CPU, {"external": RECIPES[name]}))


def test_six_benchmarks_have_recipes() -> None:
    assert set(RECIPES) == {"dpg_bench", "geneval_original", "hpsv2", "hpsv3", "vbench", "vbench_video"}


def test_geneval_gets_its_folders_and_each_image_its_verdict(tmp_path: Path) -> None:
    written(tmp_path / "evaluation" / "evaluate_images.py", GENEVAL)
    metric = external("geneval_original", geneval_repository=tmp_path, geneval_models=tmp_path)
    tasks = [{"tag": "colors", "include": []}, {"tag": "counting", "include": []}]
    assert metric.resolved(metric.measure(pictures(tasks))).tolist() == [1, 0] and metric.info.passes


def test_dpg_bench_knows_prompts_by_their_files(tmp_path: Path) -> None:
    written(tmp_path / "dpg_bench" / "compute_dpg_bench.py", DPG)
    written(tmp_path / "dpg_bench" / "dpg_bench.csv", "questions")
    metric = external("dpg_bench", dpg_repository=tmp_path)
    found = metric.resolved(metric.measure(pictures([{"item_id": "vrd3"}, {"item_id": "stanford7"}])))
    assert found.tolist() == [0.75, 0.25]


def test_hpsv3_gives_the_mean_of_its_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "hpsv3" / "__init__.py", HPSV3)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    metric = external("hpsv3", hpsv3_checkpoint=written(tmp_path / "HPSv3.safetensors", "weights"))
    assert metric.resolved(metric.measure(pictures([{}, {}]))).tolist() == [15, 28]


def test_vbench_gives_both_dimensions_in_0_to_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "vbench" / "__init__.py", "")
    written(tmp_path / "vbench" / "utils.py", VBENCH)
    for name, value in (("aesthetic_quality", 0.5), ("imaging_quality", 70)):
        written(tmp_path / "vbench" / f"{name}.py", PART.format(name, value))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    metric = external("vbench", vbench_cache=tmp_path)
    found = metric.resolved(metric.measure(pictures([{}, {}])))
    np.testing.assert_allclose(found, [[0.6, 0.5, 0.7]] * 2)


def test_vbench_gives_seven_dimensions_of_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    written(tmp_path / "vbench" / "__init__.py", "")
    written(tmp_path / "vbench" / "utils.py", VBENCH)
    values = {name: 0.1 * index for index, name in enumerate(Recipe.read(RECIPES["vbench_video"]).dimensions)}
    assert len(values) == 7
    for name, value in values.items():
        given = {"dynamic_degree": True, "imaging_quality": 100 * value}.get(name, value)
        written(tmp_path / "vbench" / f"{name}.py", PART.format(name, given))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    metric = external("vbench_video", vbench_cache=tmp_path)
    videos = pictures([{}, {}])
    videos = ImageBatch(videos.images[:, :, None].expand(2, 3, 4, 8, 8), videos.prompts, videos.details)
    parts = [*(values | {"dynamic_degree": 1.0}).values()]
    np.testing.assert_allclose(metric.resolved(metric.measure(videos)), [[np.mean(parts), *parts]] * 2)
    metric.info.check(videos.images.shape)
    with pytest.raises(UserError, match="metric external needs videos of at least 2 frames, got images"):
        metric.info.check((2, 3, 8, 8))
