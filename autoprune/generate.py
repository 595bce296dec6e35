"""`python -m autoprune.generate`: one image or video with a policy file, and what the policy is worth on this machine.

Run as a module only; in Python, `autoprune.generate` is the function.
"""

import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoprune.arguments import run_command
from autoprune.backbones import load_backbone
from autoprune.errors import UserError
from autoprune.files import write_whole
from autoprune.generation import generate
from autoprune.measure.latency import interleaved
from autoprune.measure.placement import with_fitting_keys
from autoprune.policy import Policy
from autoprune.production import doubts
from autoprune.video_files import SUFFIXES, check_video_name, write_video

_USAGE = 'python -m autoprune.generate policy=FILE prompt="a red circle left of a blue square"'


@dataclass(frozen=True)
class Choices:
    """The command line. `runs` generations with the policy and as many dense ones are timed; `backbone` is the policy's.

    `text` is the folder of a text encoder; guidance and temperature default to the authors'. `h_div_w` picks the nearest
    aspect ratio and `frames` the length of a video; the policy's decisions are taken over to them. `output` is image.png, or
    video.webp for videos, unless it says otherwise: .webp, .gif and .mp4 are one file that moves, .png is one a frame,
    numbered.
    """

    policy: str
    prompt: str
    backbone: str = ""
    weights: str | None = None
    text: str = ""
    seed: int = 0
    guidance: float | None = None
    temperature: float | None = None
    negative: str = ""
    h_div_w: float | None = None
    frames: int | None = None
    output: str = ""
    runs: int = 7

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise UserError(f"runs must be at least 1, got {self.runs}.")


def main(arguments: list[str]) -> int:
    """Runs the command; returns 0, 2 after bad input, 130 after Ctrl-C."""
    return run_command(Choices, arguments, usage=_USAGE, command=_generate)


def _generate(choices: Choices) -> str:
    policy = Policy.load(choices.policy)
    changes = {name: getattr(choices, name) for name in ("guidance", "temperature", "negative", "h_div_w", "frames")}
    backbone = load_backbone(choices.backbone or policy.backbone, weights=choices.weights, text=choices.text)
    backbone = backbone.sampled(**{name: value for name, value in changes.items() if value is not None})
    backbone = with_fitting_keys(backbone, batch=1)
    if choices.h_div_w is not None or choices.frames is not None:
        policy = policy.for_schedule(backbone.scale_schedule())
    policy.check_prunes()
    target = _target(choices.output, video=(backbone.sampling.frames or 1) > 1)
    for doubt in doubts(policy, backbone, batch=1):
        print(f"autoprune: {doubt}", file=sys.stderr)

    def run(chosen: Policy | None) -> Tensor:
        return generate(backbone, [choices.prompt], policy=chosen, seed=choices.seed)

    image = run(policy)[0]
    path = write_pictures(target, image, backbone.frame_rate)
    runs = {"dense": lambda: run(None), "pruned": lambda: run(policy)}
    timings = interleaved(runs, rounds=choices.runs, warm_up=1, device=backbone.device)
    dense, pruned = timings["dense"].median, timings["pruned"].median
    return (
        f"{path}: {dense / pruned:.2f}x faster than dense "
        f"({1000 * pruned:.1f} ms against {1000 * dense:.1f} ms, batch 1, median of {choices.runs} interleaved runs)"
    )


def _target(output: str, *, video: bool) -> Path:
    """Returns where to write. Raises UserError for a suffix that is not known, and for one that a package is missing for."""
    path = Path(output or ("video.webp" if video else "image.png"))
    known = (".png", *(SUFFIXES if video else ("",)))
    if path.suffix.lower() not in known:
        what = f"{', '.join(known)} for a video" if video else ".png for an image"
        raise UserError(f"output must end in {what}, got {output!r}; choose another name.")
    if path.suffix.lower() in SUFFIXES:
        check_video_name(path)
    return path


def write_pictures(path: Path, image: Tensor, frame_rate: float) -> Path:
    """Writes an image [3, H, W] as a PNG, a video [3, F, H, W] by the suffix of `path`: one file, or for .png one beside the
    other a frame. Returns the first file."""
    try:
        if image.dim() == 3:
            return write_whole(path, png(image))
        if path.suffix.lower() != ".png":
            return write_video(path, image, frame_rate)
        frames = enumerate(image.unbind(1))
        return [write_whole(path.with_stem(f"{path.stem}-{number:03}"), png(frame)) for number, frame in frames][0]
    except OSError as error:
        raise UserError(f"output {str(path)!r} cannot be written ({error.strerror}); choose another file.") from None


def png(image: Tensor) -> bytes:
    """Encodes `image` [3, H, W] in [0, 1] as an 8-bit RGB PNG (RFC 2083), so that production needs no imaging package."""
    _, height, width = image.shape
    pixels = (image.cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).reshape(height, 3 * width)
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels], 1)
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.numpy().tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
