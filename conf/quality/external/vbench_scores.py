"""For an environment with vbench: vbench_scores.py IMAGES PROMPTS OUTPUT CACHE DIMENSION..."""

import importlib
import json
import os
import sys
import tempfile

images, prompts, output, cache, *dimensions = sys.argv[1:]
os.environ["VBENCH_CACHE_DIR"] = cache

import torch  # noqa: E402
from vbench.utils import init_submodules  # noqa: E402

PERCENT = "imaging_quality"  # whose numbers of single files VBench has not divided by 100 yet
with open(prompts) as file:
    asked = [json.loads(line) for line in file]
parts = init_submodules(dimensions, local=True)
with tempfile.TemporaryDirectory() as folder, open(output, "w", buffering=1) as scores:
    table = os.path.join(folder, "files.json")
    with open(table, "w") as file:
        paths = [(one["prompt"], os.path.join(images, one["image"])) for one in asked]
        json.dump([{"prompt_en": prompt, "dimension": dimensions, "video_list": [path]} for prompt, path in paths], file)
    for dimension in dimensions:
        compute = getattr(importlib.import_module("vbench." + dimension), "compute_" + dimension)
        for found in compute(table, torch.device("cuda"), parts[dimension])[1]:
            score = float(found["video_results"]) / (100 if dimension == PERCENT else 1)
            name = os.path.basename(found["video_path"])
            scores.write(json.dumps({"image": name, "scores": {dimension: score}}) + "\n")
