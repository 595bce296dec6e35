"""Tokenizer and encoder of a language model through transformers, from a folder; downloaded only where that is allowed."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Generic, TypeVar

import torch

from autoprune.backbones.checkpoints import reason
from autoprune.backbones.forks import ForkSafeLock
from autoprune.errors import UserError

Encoded = TypeVar("Encoded")


class PromptMemory(Generic[Encoded]):
    """What prompts became, computed once each, by one thread at a time (tokenizers and lazy loading of encoders ask for it);
    beyond `limit` the least recently used are forgotten."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: OrderedDict[str, Encoded] = OrderedDict()
        self._lock = ForkSafeLock()

    def of(self, prompts: Sequence[str], encode: Callable[[str], Encoded]) -> list[Encoded]:
        """Returns what each prompt became, `encode` called for those that are not known."""
        with self._lock:
            for prompt in dict.fromkeys(prompts):
                if prompt not in self._known:
                    self._known[prompt] = encode(prompt)
                self._known.move_to_end(prompt)
            found = [self._known[prompt] for prompt in prompts]
            while len(self._known) > self._limit:
                self._known.popitem(last=False)
        return found


@dataclass(frozen=True)
class TextModelSource:
    """Where a text model is: `source` is a folder, or with `allow_download` a name on the Hugging Face hub. `released` is its
    authors' name there, `kind` the transformers class that loads it."""

    source: str
    released: str
    kind: str
    allow_download: bool = False

    def load(self, device: torch.device, dtype: torch.dtype) -> tuple[object, torch.nn.Module]:
        """Returns (tokenizer, model) for inference. Raises UserError when transformers or the folder is missing or broken."""
        try:
            import transformers
        except ImportError:
            raise UserError("text encoders need transformers; install it with: pip install 'autoprune[text]'.") from None
        local = not self.allow_download
        if local and not Path(self.source).is_dir():
            raise UserError(
                f"text encoder folder {self.source!r} does not exist; download {self.released} there, "
                "or allow it with allow_download=true."
            )
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.source, local_files_only=local, trust_remote_code=False)
            model = getattr(transformers, self.kind).from_pretrained(self.source, dtype=dtype, local_files_only=local)
        except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError) as error:
            raise UserError(
                f"text encoder {self.source!r} cannot be loaded ({reason(error)}); copy {self.released} again."
            ) from None
        return tokenizer, model.to(device).eval().requires_grad_(False)

    @staticmethod
    def found(folder: Path | None, released: str, kind: str, *, allow_download: bool) -> "TextModelSource":
        """Returns the source in a folder; without one, the hub where that is allowed, else a folder of the released name."""
        source = folder or (released if allow_download else released.rpartition("/")[2])
        return TextModelSource(str(source), released, kind, allow_download)
