"""Files of generator training: the tokenizer it starts from, the state it resumes, the weights it ships."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from autoprune.backbones.embedded import TINY, build_parts, embedded_parts
from autoprune.errors import UserError
from autoprune.files import whole_file, write_whole
from autoprune.testbed.generator_recipe import GeneratorRecipe
from autoprune.testbed.lessons import IMAGE_LESSONS, Lessons
from autoprune.testbed.stored import stored, weights_hash

SPEC = TINY


@dataclass(frozen=True)
class GeneratorRun:
    """A recipe and where it runs. It begins with the weights in `start`, tokenizer included, where there are some."""

    recipe: GeneratorRecipe
    tokenizer: Path | None
    out: Path
    cache: Path
    device: str
    resume: bool = False
    lessons: Lessons = IMAGE_LESSONS
    start: Path | None = None

    @property
    def state_path(self) -> Path:
        """What `--resume` reads."""
        return self.out.with_suffix(".state")

    @property
    def partial_path(self) -> Path:
        """Averaged weights of an unfinished run, in the shipped form."""
        return self.out.with_stem(f"{self.out.stem}_partial")


def load_tokenizer(run: GeneratorRun) -> nn.Module:
    """The trained tokenizer, frozen. Raises UserError for a file that is missing or has other keys."""
    if run.start is not None:
        return embedded_parts(run.lessons.spec, run.start)[0]["vae"].requires_grad_(False).eval().to(run.device)
    tokenizer = build_parts(run.lessons.spec)["vae"]
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


def save_weights(path: Path, parts: dict[str, nn.Module], record: dict[str, object], lessons: Lessons) -> None:
    """One safetensors file: `prefix.key` in float16, the record as JSON in its metadata and in `path` + .json."""
    tensors = {
        f"{prefix}.{key}": stored(key, value).contiguous().clone()
        for prefix, part in parts.items()
        for key, value in part.state_dict().items()
    }
    record = {
        **record,
        "config": asdict(lessons.spec),
        "data_version": lessons.world.version,
        "hashes": {prefix: weights_hash(part) for prefix, part in parts.items()},
    }
    with whole_file(path) as temporary:
        save_file(tensors, temporary, {"record": json.dumps(record)})
    write_whole(path.with_suffix(".json"), json.dumps(record, indent=1))


def read_record(path: Path) -> dict[str, object]:
    """The record that `save_weights` stored."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("record", "{}"))
