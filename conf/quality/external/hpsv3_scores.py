"""For an environment with hpsv3: hpsv3_scores.py IMAGES PROMPTS OUTPUT CHECKPOINT."""

import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hpsv3 import HPSv3RewardInferencer  # noqa: E402

images, prompts, output, checkpoint = sys.argv[1:]
model = HPSv3RewardInferencer(device="cuda", checkpoint_path=checkpoint)
with open(prompts) as asked, open(output, "w", buffering=1) as scores:
    for line in asked:
        one = json.loads(line)
        reward = model.reward(prompts=[one["prompt"]], image_paths=[os.path.join(images, one["image"])])[0]
        scores.write(json.dumps({"image": one["image"], "score": float(reward[0])}) + "\n")  # the mean; [1] is its spread
