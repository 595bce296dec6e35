"""Networks that turn images into features for distances of sets, from local files, and folders of reference images."""

import warnings
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor

from autoprune.backbones.checkpoints import reason
from autoprune.errors import UserError
from autoprune.measure.metrics.contract import MetricContext, WeightNeed
from autoprune.measure.metrics.picture_input import PictureInput

Features = Callable[[Tensor], Tensor]
REFERENCE = WeightNeed("reference_images", "a folder of .png, .jpg or .webp images", "your own or a data set such as MJHQ-30K")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_BATCH = 32


def load_network(path: Path, device: torch.device) -> Features:
    """Returns a function from images [B, 3, H, W] in [0, 1] to features [B, F].

    A file is a TorchScript module of uint8 images, called with `return_features=True` where it takes that (the Inception
    network of FID, inception-2015-12-05.pt, does); a folder holds a vision transformer for transformers: of CLIP the image
    embedding is taken, of others (DINOv2) the first token. Raises UserError for anything else.
    """
    return _vision_transformer(path, device) if path.is_dir() else _script(path, device)


@torch.inference_mode()
def features_of(images: Tensor, network: Features) -> np.ndarray:
    """Returns features, float64 [B, F]."""
    return network(images).double().cpu().numpy()


def reference_features(metric: str, network: Features, context: MetricContext) -> np.ndarray:
    """Returns the features [m, F] of all images of weights.reference_images. Raises UserError for fewer than two."""
    folder = context.path(metric, REFERENCE)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise UserError(f"weights.{REFERENCE.key} must hold at least 2 images, got {len(files)} in {str(folder)!r}; add some.")
    return np.concatenate([features_of(batch.to(context.device), network) for batch in _batches(files)])


def _vision_transformer(folder: Path, device: torch.device) -> Features:
    """Returns the features of a transformers folder, as `load_network` says."""
    try:
        import transformers
    except ImportError:
        raise UserError("this metric needs transformers; install it with: pip install 'autoprune[text]'.") from None
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        clip = config.model_type.startswith("clip")
        kind = transformers.CLIPVisionModelWithProjection if clip else transformers.AutoModel
        model, report = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError) as error:
        raise UserError(
            f"feature network {str(folder)!r} cannot be loaded ({reason(error)}); copy the published folder."
        ) from None
    if report["missing_keys"]:
        first = sorted(report["missing_keys"])[0]
        raise UserError(f"feature network {str(folder)!r} lacks weights, first {first}; copy the published folder.")
    prepared, model = PictureInput.read(folder), model.to(device).eval()

    def features(images: Tensor) -> Tensor:
        output = model(pixel_values=prepared(images))
        return output.image_embeds if clip else output.last_hidden_state[:, 0]

    return features


def _script(file: Path, device: torch.device) -> Features:
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # the published file is TorchScript
            module = torch.jit.load(file, map_location=device).eval()
    except RuntimeError as error:
        said = (str(error).strip().splitlines() or ["no reason given"])[0][:120]
        wanted = "a TorchScript file or a folder for transformers"
        raise UserError(f"feature network {str(file)!r} must be {wanted} ({said}); see README, Metrics.") from None
    accepted = {argument.name for argument in module.forward.schema.arguments}
    options = {"return_features": True} if "return_features" in accepted else {}
    return lambda images: module((255 * images.clamp(0, 1)).round().to(torch.uint8), **options).flatten(1)


def _batches(files: list[Path]) -> Iterator[Tensor]:
    """Yields images [B, 3, H, W] in [0, 1], neighbours of one size together."""
    chunks = (files[first : first + _BATCH] for first in range(0, len(files), _BATCH))
    for chunk in chunks:
        for _, same in groupby(map(_read, chunk), key=lambda image: image.shape):
            yield torch.stack(list(same))


def _read(file: Path) -> Tensor:
    from PIL import Image

    try:
        pixels = np.asarray(Image.open(file).convert("RGB"))
    except OSError as error:
        raise UserError(f"reference image {str(file)!r} cannot be read ({error}); remove it or copy it again.") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
