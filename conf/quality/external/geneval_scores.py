"""For GenEval's environment: geneval_scores.py IMAGES PROMPTS OUTPUT REPOSITORY MODELS."""

import json
import os
import shutil
import subprocess
import sys
import tempfile

images, prompts, output, repository, models = sys.argv[1:]
with open(prompts) as file:
    asked = [json.loads(line) for line in file]
with tempfile.TemporaryDirectory() as folder:
    for index, one in enumerate(asked):
        samples = os.path.join(folder, f"{index:05}", "samples")
        os.makedirs(samples)
        shutil.copy(os.path.join(images, one["image"]), os.path.join(samples, "0000.png"))
        with open(os.path.join(os.path.dirname(samples), "metadata.jsonl"), "w") as file:
            json.dump(one, file)
    results = os.path.join(folder, "results.jsonl")
    program = os.path.join(repository, "evaluation", "evaluate_images.py")
    subprocess.run([sys.executable, program, folder, "--outfile", results, "--model-path", models], check=True)
    with open(results) as file, open(output, "w") as scores:
        for line in file:
            found = json.loads(line)
            index = int(found["filename"].split(os.sep)[-3])
            scores.write(json.dumps({"image": asked[index]["image"], "score": float(found["correct"])}) + "\n")
