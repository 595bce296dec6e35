"""Files of generator training: the tokenizer it starts from, the state it resumes, the weights it ships."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoprune.backbones.bsq_tokenizer import BSQTokenizer
from autoprune.backbones.embedded import TINY
from autoprune.errors import UserError
from autoprune.files import whole_file, write_whole
from autoprune.testbed.generator_recipe import GeneratorRecipe
from autoprune.testbed.scenes import DATA_VERSION

SPEC = TINY
FULL_PRECISION = ("magnitudes", "mask")  # small or integer tensors that stay as they are


@dataclass(frozen=True)
class GeneratorRun:
    """A recipe and where it runs."""

    recipe: GeneratorRecipe
    tokenizer: Path
    out: Path
    cache: Path
    device: str
    resume: bool = False

    @property
    def state_path(self) -> Path:
        """What `--resume` reads."""
        return self.out.with_suffix(".state")

    @property
    def partial_path(self) -> Path:
        """Averaged weights of an unfinished run, in the shipped form."""
        return self.out.with_stem(f"{self.out.stem}_partial")


def load_tokenizer(run: GeneratorRun) -> BSQTokenizer:
    """The trained tokenizer, frozen. Raises UserError for a file that is missing or has other keys."""
    tokenizer = BSQTokenizer(SPEC.tokenizer)
    try:
        state = load_file(run.tokenizer)
    except OSError as error:
        raise UserError(f"tokenizer {str(run.tokenizer)!r} cannot be read ({error}); run train_tokenizer first.") from None
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    problems = tokenizer.load_state_dict(state, strict=False)
    wrong = [*problems.missing_keys, *problems.unexpected_keys]
    if wrong and wrong != ["quantize.lfq.mask"]:
        raise UserError(
            f"tokenizer {str(run.tokenizer)!r} must have the embedded model's keys, {wrong[0]!r} differs; train it again."
        )
    return tokenizer.requires_grad_(False).eval().to(run.device)


def weights_hash(module: nn.Module) -> str:
    """sha256 over names and float16 values, the same before and after saving."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(_stored(key, value).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_weights(path: Path, parts: dict[str, nn.Module], record: dict[str, object]) -> None:
    """One safetensors file: `prefix.key` in float16, the record as JSON in its metadata and in `path` + .json."""
    tensors = {
        f"{prefix}.{key}": _stored(key, value).contiguous().clone()
        for prefix, part in parts.items()
        for key, value in part.state_dict().items()
    }
    record = {
        **record,
        "config": asdict(SPEC),
        "data_version": DATA_VERSION,
        "hashes": {prefix: weights_hash(part) for prefix, part in parts.items()},
    }
    with whole_file(path) as temporary:
        save_file(tensors, temporary, {"record": json.dumps(record)})
    write_whole(path.with_suffix(".json"), json.dumps(record, indent=1))


def read_record(path: Path) -> dict[str, object]:
    """The record that `save_weights` stored."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("record", "{}"))


def _stored(key: str, value: Tensor) -> Tensor:
    value = value.detach().cpu()
    keep = not value.is_floating_point() or key.rsplit(".", 1)[-1] in FULL_PRECISION
    return value if keep else value.half()
