"""What vision models of transformers want to see: images resized, cropped and normalised as their folder says, on the device.

The package's own processors need torchvision or a trip through PIL.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.errors import UserError

FILE = "preprocessor_config.json"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PictureInput:
    """The shorter side becomes `resize` pixels (bicubic), the middle `crop` x `crop` is kept, channels get mean and spread."""

    resize: int
    crop: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @staticmethod
    def read(folder: Path) -> "PictureInput":
        """Reads a folder's preprocessor_config.json, of old and new layout. Raises UserError when it does not say these."""
        try:
            plain = json.loads((folder / FILE).read_text(encoding="utf-8"))
            resize = _side(plain["size"])
            crop = _side(plain["crop_size"]) if plain.get("do_center_crop", True) and "crop_size" in plain else resize
            return PictureInput(resize, crop, tuple(plain["image_mean"]), tuple(plain["image_std"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            rule = f"{FILE} must give size, image_mean and image_std"
            raise UserError(f"{rule}, got {error!r} from {str(folder)!r}; copy the published folder.") from None

    def __call__(self, images: Tensor) -> Tensor:
        """Returns images [B, 3, H, W] in [0, 1] as the model reads them, float32 [B, 3, crop, crop].

        They pass through 8 bits before, between and after resizing columns and rows, as they do in Pillow.
        """
        height, width = (side * self.resize // min(images.shape[2:]) for side in images.shape[2:])
        wide = eight_bits(_resized(eight_bits(images), (images.shape[2], width)))
        resized = eight_bits(_resized(wide, (height, width)))
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        middle = resized[..., top : top + self.crop, left : left + self.crop]
        mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (middle - mean) / std


def eight_bits(images: Tensor) -> Tensor:
    """Returns images in [0, 1] as an 8-bit file would keep them, float32."""
    return images.float().clamp(0, 1).mul(255).round() / 255


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(images, size, mode="bicubic", antialias=True)


def _side(size: int | dict[str, int]) -> int:
    return size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
