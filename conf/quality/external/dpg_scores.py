"""For DPG-Bench's environment: dpg_scores.py IMAGES PROMPTS OUTPUT REPOSITORY. One image a prompt is scored as one picture."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

from PIL import Image

images, prompts, output, repository = sys.argv[1:]
with open(prompts) as file:
    asked = [json.loads(line) for line in file]
side = str(max(Image.open(os.path.join(images, asked[0]["image"])).size))
benchmark = os.path.join(repository, "dpg_bench")
with tempfile.TemporaryDirectory() as folder, open(output, "w", buffering=1) as scores:
    pictures, results, done = os.path.join(folder, "pictures"), os.path.join(folder, "results.txt"), 0
    os.makedirs(pictures)
    for one in asked:  # what stands before the first dot is the prompt's name there
        shutil.copy(os.path.join(images, one["image"]), os.path.join(pictures, one["item_id"] + "." + one["image"]))
    command = [sys.executable, os.path.join(benchmark, "compute_dpg_bench.py"), "--image-root-path", pictures]
    command += ["--resolution", side, "--pic-num", "1", "--csv", os.path.join(benchmark, "dpg_bench.csv")]
    program = subprocess.Popen(command + ["--res-path", results])
    ended = False
    open(results, "w").close()
    while not ended:
        ended = program.poll() is not None
        with open(results) as file:
            lines = file.read().split("\n")[:-1]
        for line in lines[done:]:
            if line.startswith(pictures):
                path, _, score = line.rsplit(", ", 2)
                image = os.path.basename(path).split(".", 1)[1]
                scores.write(json.dumps({"image": image, "score": float(score)}) + "\n")
        done = len(lines)
        time.sleep(0 if ended else 1)
sys.exit(program.returncode)
