"""For an environment with vbench: vbench_scores.py IMAGES PROMPTS OUTPUT CACHE."""

import importlib
import json
import os
import sys
import tempfile

images, prompts, output, cache = sys.argv[1:]
os.environ["VBENCH_CACHE_DIR"] = cache

import torch  # noqa: E402
from vbench.utils import init_submodules  # noqa: E402

DIMENSIONS = {"aesthetic_quality": 1, "imaging_quality": 100}  # and what VBench divides each picture's number by
with open(prompts) as file:
    asked = [json.loads(line) for line in file]
parts = init_submodules(list(DIMENSIONS), local=True)
with tempfile.TemporaryDirectory() as folder, open(output, "w", buffering=1) as scores:
    table = os.path.join(folder, "pictures.json")
    with open(table, "w") as file:
        paths = [(one["prompt"], os.path.join(images, one["image"])) for one in asked]
        json.dump([{"prompt_en": prompt, "dimension": list(DIMENSIONS), "video_list": [path]} for prompt, path in paths], file)
    for dimension, scale in DIMENSIONS.items():
        compute = getattr(importlib.import_module("vbench." + dimension), "compute_" + dimension)
        for found in compute(table, torch.device("cuda"), parts[dimension])[1]:
            name, value = os.path.basename(found["video_path"]), float(found["video_results"]) / scale
            scores.write(json.dumps({"image": name, "scores": {dimension: value}}) + "\n")
