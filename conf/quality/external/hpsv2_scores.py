"""For an environment with hpsv2: hpsv2_scores.py IMAGES PROMPTS OUTPUT CHECKPOINT."""

import json
import os
import sys

import torch
from hpsv2.src.open_clip import create_model_and_transforms, get_tokenizer
from PIL import Image

images, prompts, output, checkpoint = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
precision = "amp" if device == "cuda" else "fp32"
model, _, prepare = create_model_and_transforms(
    "ViT-H-14", None, precision=precision, device=device, light_augmentation=True, aug_cfg={}, output_dict=True
)
model.load_state_dict(torch.load(checkpoint, map_location=device)["state_dict"])
model = model.to(device).eval()
tokenizer = get_tokenizer("ViT-H-14")
with open(prompts) as asked, open(output, "w", buffering=1) as scores, torch.no_grad():
    for line in asked:
        one = json.loads(line)
        pixels = prepare(Image.open(os.path.join(images, one["image"]))).unsqueeze(0).to(device)
        with torch.autocast(device, enabled=device == "cuda"):
            found = model(pixels, tokenizer([one["prompt"]]).to(device))
            score = (found["image_features"] @ found["text_features"].T)[0, 0]
        scores.write(json.dumps({"image": one["image"], "score": float(score)}) + "\n")
