"""The authors' weight files: flat or sharded, pickled or safetensors, memory-mapped, read one shard at a time.

Nothing is unpickled but tensors (weights_only), and nothing is held twice: a shard is unmapped before the next one is opened.
"""

import hashlib
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from autoprune.errors import UserError

State = Mapping[str, Tensor]
INDEXES = ("*.safetensors.index.json", "*.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "ema_model.bin", "diffusion_pytorch_model.safetensors")
UNKNOWN = "nothing known here"
_WRAPPERS = ("trainer", "gpt_fsdp", "gpt_wo_ddp", "model", "module", "state_dict", "vae")  # of training checkpoints


class WeightFiles:
    """The shards of one state dict. `path` is a file, or a folder with an index (Hugging Face layout) or a single file."""

    def __init__(self, path: Path) -> None:
        """Raises UserError when there is nothing to read."""
        self.path = path
        self.shards = _shards(path)

    def states(self) -> Iterator[State]:
        """Yields the tensors of each shard by key; drop one before asking for the next."""
        for shard in self.shards:
            yield _read(shard)

    def largest(self) -> int:
        """Returns the bytes of the largest shard."""
        return max(shard.stat().st_size for shard in self.shards)

    def revision(self) -> str:
        """Returns an identity that is quick to compute: sha256 of every shard's size, first and last megabyte."""
        digest = hashlib.sha256()
        for shard in self.shards:
            size = shard.stat().st_size
            with shard.open("rb") as file:
                digest.update(size.to_bytes(8, "big") + file.read(2**20))
                file.seek(max(0, size - 2**20))
                digest.update(file.read())
        return digest.hexdigest()


def looks_like(keys: Iterable[str]) -> str:
    """Returns what a state dict with these keys seems to be, in words."""
    keys = list(keys)
    for mark, kind in _MARKS.items():
        if any(mark in key for key in keys):
            return kind
    return UNKNOWN


def reason(error: Exception) -> str:
    """Returns in a few words why weights could not be read: torch advises to unpickle what it refused, which runs its code."""
    if isinstance(error, pickle.UnpicklingError):
        return "its weights hold more than tensors"
    return " ".join(str(error).split())[:160] or type(error).__name__


def _shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"weights {str(path)!r} do not exist; give the file or folder that the authors released.")
    for pattern in INDEXES:
        for index in sorted(path.glob(pattern)):
            return _of_index(index)
    for name in SINGLE_FILES:
        if (path / name).is_file():
            return [path / name]
    looked = ", ".join((*INDEXES, *SINGLE_FILES))
    raise UserError(f"folder {str(path)!r} holds no weights that are known here; looked for {looked}.")


def _of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"index {str(index)!r} cannot be read ({error.__class__.__name__}); copy it again.") from None
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"index {str(index)!r} names {len(missing)} files that are not there, first {missing[0]}; copy them.")
    return [index.parent / name for name in names]


def _read(path: Path) -> State:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return _unwrapped(_unpickled(path), path)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"weights {str(path)!r} hold more than tensors and are not opened; save their state dict alone with torch.save."
        ) from None
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UserError(f"weights {str(path)!r} cannot be read ({error.__class__.__name__}: {reason}); copy again.") from None


def _unpickled(path: Path) -> object:
    """Opens a torch file, mapped where its format allows that (zip archives, the default since torch 1.6)."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


def _unwrapped(content: object, path: Path) -> State:
    """Returns the state dict inside a checkpoint: training runs nest it, tokenizers keep it beside optimiser state."""
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        keys = ", ".join(map(str, list(content)[:3])) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(f"weights {str(path)!r} hold no state dict, only {keys}; give the released file.")
    return {key.removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}


_MARKS = {
    "semantic_head2": "an InfinityStar transformer",
    ".attn.q_proj": "an InfinityStar transformer",
    "lfq_semantic": "an InfinityStar tokenizer",
    "text_proj_for_sos": "an Infinity transformer",
    "context_embed": "a HART transformer",
    "class_emb": "a VAR transformer",
    "quant_resi": "a VAR or HART tokenizer",
    "lfq.mask": "an Infinity tokenizer",
    "decoder.conv_in": "an image tokenizer",
    "SelfAttention": "a T5 text encoder",
    "mlp.gate_proj": "a language model",
}
