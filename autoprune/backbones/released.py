"""Backbones from the authors' files in a folder, at random in their true shapes, or around a model that is loaded already."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autoprune.backbones.backbone import DEFAULT_FRAME_RATE, Backbone, Sampling
from autoprune.backbones.checkpoints import WeightFiles
from autoprune.backbones.family import Features, Schedule
from autoprune.backbones.loading import Convert, Placement, fill_at_random, load_weights
from autoprune.errors import UserError

BLOCKS = ("block_chunks.", "blocks.")
NETWORKS = ("encoder.", "decoder.")
TextEncoder = Callable[[Sequence[str]], Features]


@dataclass(frozen=True)
class TextOptions:
    """Where a text encoder is (None: a subfolder of the weights), whether it may be downloaded, and the authors' rule that
    adds a sentence about faces to prompts about people."""

    folder: str | None = None
    allow_download: bool = False
    positive_prompt: bool = False


@dataclass(frozen=True)
class ReleasedFiles:
    """Names under which the authors' files are looked for in a folder, in order, and where they come from.

    `config` is a JSON file that says the sizes, for families that release one.
    """

    transformer: tuple[str, ...]
    tokenizer: tuple[str, ...]
    source: str
    text: tuple[str, ...] = ()
    config: str = ""


@dataclass(frozen=True)
class Family:
    """How the modules of a family are built from their configurations, and the keys of its files brought to ours.

    `text` makes the text encoder from a spec, the folder found for it, its device and precision, and the user's options.
    `configured` takes the sizes over from the fields of a released configuration.
    """

    transformer: Callable[[object], nn.Module]
    tokenizer: Callable[[object], nn.Module]
    transformer_state: Callable[[object], Convert]
    tokenizer_state: Callable[[nn.Module], Convert]
    text: Callable[["BackboneSpec", Path | None, "Target", TextOptions], TextEncoder]
    random_text: Callable[["BackboneSpec", "Target"], TextEncoder]
    configured: Callable[["BackboneSpec", Mapping[str, object]], "BackboneSpec"] = lambda spec, fields: spec


@dataclass(frozen=True)
class BackboneSpec:
    """Sizes, sampling defaults, schedules and files of a backbone, the form that its authors bring prompts to, and how many
    frames a second its videos show."""

    family: Family
    transformer: object
    tokenizer: object
    sampling: Sampling
    schedule_for: Callable[..., Schedule]
    files: ReleasedFiles
    caption: Callable[[str, Sampling], str] | None = None
    frame_rate: float = DEFAULT_FRAME_RATE


@dataclass(frozen=True)
class Target:
    """Where a backbone goes: device and precision of its blocks."""

    device: torch.device
    dtype: torch.dtype

    def transformer(self) -> Placement:
        """Blocks in the compute precision; text, embeddings and head in float32, as released code keeps them."""
        return self._placement(BLOCKS)

    def tokenizer(self) -> Placement:
        """Convolutional networks in the compute precision, codebooks in float32."""
        return self._placement(NETWORKS)

    def _placement(self, lowered: tuple[str, ...]) -> Placement:
        def dtype_of(key: str) -> torch.dtype:
            return self.dtype if key.startswith(lowered) else torch.float32

        return Placement(self.device, dtype_of, self.device.type == "cpu" and self.dtype is torch.float32)


def released_backbone(name: str, spec: BackboneSpec, folder: Path, target: Target, text: TextOptions) -> Backbone:
    """Loads the files of a folder. Raises UserError for files that are missing, unreadable or of another model."""
    if not folder.is_dir():
        raise UserError(f"weights of {name} are a folder with the released files, {str(folder)!r} is none; give that folder.")
    if spec.files.config:
        spec = spec.family.configured(spec, _config(folder, name, spec.files))
    files = [WeightFiles(_found(folder, names, name, spec.files)) for names in (spec.files.transformer, spec.files.tokenizer)]
    transformer, tokenizer = _on_meta(spec)
    convert = spec.family.transformer_state(spec.transformer)
    load_weights(transformer, files[0], target.transformer(), what=f"the transformer of {name}", convert=convert)
    convert = spec.family.tokenizer_state(tokenizer)
    load_weights(tokenizer, files[1], target.tokenizer(), what=f"the tokenizer of {name}", convert=convert)
    encoder = spec.family.text(spec, _text_folder(folder, spec.files, text), target, text)
    revision = hashlib.sha256("".join(part.revision() for part in files).encode()).hexdigest()
    return _backbone(name, spec, (transformer, tokenizer), encoder, revision)


def random_backbone(name: str, spec: BackboneSpec, target: Target) -> Backbone:
    """Builds the true shapes with random values: for timing and memory, not for pictures."""
    transformer, tokenizer = _on_meta(spec)
    fill_at_random(transformer, target.transformer())
    fill_at_random(tokenizer, target.tokenizer())
    return _backbone(name, spec, (transformer, tokenizer), spec.family.random_text(spec, target), "")


def _on_meta(spec: BackboneSpec) -> tuple[nn.Module, nn.Module]:
    with torch.device("meta"):
        return spec.family.transformer(spec.transformer), spec.family.tokenizer(spec.tokenizer)


def _backbone(
    name: str, spec: BackboneSpec, parts: tuple[nn.Module, nn.Module], encoder: TextEncoder, revision: str
) -> Backbone:
    transformer, tokenizer = (part.eval().requires_grad_(False) for part in parts)
    for network in (getattr(tokenizer, "encoder", None), tokenizer.decoder):
        if network is not None and not tokenizer.streams:
            network.to(memory_format=torch.channels_last)
    facts = {"caption": spec.caption, "frame_rate": spec.frame_rate}
    return Backbone(name, transformer, tokenizer, encoder, spec.sampling, spec.schedule_for, revision, **facts)


def _found(folder: Path, names: tuple[str, ...], backbone: str, files: ReleasedFiles) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    looked = " or ".join(names)
    raise UserError(f"folder {str(folder)!r} lacks {looked} of {backbone}; it comes from {files.source}.")


def _config(folder: Path, backbone: str, files: ReleasedFiles) -> Mapping[str, object]:
    path = _found(folder, (files.config,), backbone, files)
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"configuration {str(path)!r} cannot be read ({error.__class__.__name__}); copy it again.") from None
    if not isinstance(fields, dict):
        raise UserError(f"configuration {str(path)!r} must hold named fields, got a {type(fields).__name__}; copy it again.")
    return fields


def _text_folder(folder: Path, files: ReleasedFiles, text: TextOptions) -> Path | None:
    if text.folder:
        return Path(text.folder)
    return next((folder / name for name in files.text if (folder / name).is_dir()), None)
