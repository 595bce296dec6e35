"""Images as CLIP and its kin read them: shorter side resized, middle cut out, normalised; in torch, on the images' device."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CONFIGS = ("preprocessor_config.json", "processor_config.json")  # the second of processors that transformers 5 saved


@dataclass(frozen=True)
class Preprocessing:
    """Bicubic to `side` pixels on the shorter side, the middle square of it, (image - mean) / std."""

    side: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @staticmethod
    def read(folder: Path) -> "Preprocessing":
        """Reads what a folder says. Raises ValueError when it says nothing, or asks for another kind of preprocessing."""
        file = next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)
        if file is None:
            raise ValueError(f"it has no {_CONFIGS[0]}")
        document = json.loads(file.read_text())
        document = document.get("image_processor", document)
        size, crop = document.get("size"), document.get("crop_size")
        side = size.get("shortest_edge") if isinstance(size, dict) else size
        cut = crop.get("height") if isinstance(crop, dict) else crop
        if side is None or side != cut or document.get("resample", 3) != 3:
            raise ValueError(f"{file.name} must resize the shorter side bicubically to the size it cuts out")
        return Preprocessing(side, tuple(document.get("image_mean", CLIP_MEAN)), tuple(document.get("image_std", CLIP_STD)))

    def __call__(self, images: Tensor) -> Tensor:
        """Returns [B, 3, side, side] of images [B, 3, H, W] in [0, 1], through 8 bits before and after, as Pillow does it."""
        height, width = (max(self.side, side * self.side // min(images.shape[-2:])) for side in images.shape[-2:])
        wide = eight_bits(_resized(eight_bits(images), (images.shape[-2], width)))
        resized = eight_bits(_resized(wide, (height, width)))
        top, left = (height - self.side) // 2, (width - self.side) // 2
        cut = resized[:, :, top : top + self.side, left : left + self.side]
        mean, std = (torch.tensor(values, device=cut.device)[:, None, None] for values in (self.mean, self.std))
        return (cut - mean) / std


def eight_bits(images: Tensor) -> Tensor:
    """Returns images in [0, 1] as an 8-bit file would keep them, float32."""
    return images.float().clamp(0, 1).mul(255).round() / 255


def _resized(images: Tensor, shape: tuple[int, int]) -> Tensor:
    return functional.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False)
