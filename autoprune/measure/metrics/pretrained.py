"""Models and tokenizers from folders that transformers saved: local files only, and every weight must be there."""

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError

from autoprune.backbones.checkpoints import reason
from autoprune.errors import UserError
from autoprune.measure.metrics.contract import MetricContext, WeightNeed

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, EOFError, SafetensorError, UnpicklingError)


@dataclass(frozen=True)
class PretrainedFolder:
    """The folder that a metric's `need` points at; what is wrong with it is said in one sentence."""

    metric: str
    need: WeightNeed
    context: MetricContext

    @property
    def path(self) -> Path:
        """The folder. Raises UserError when it is not given or not there."""
        return self.context.path(self.metric, self.need)

    def model(self, kind: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """Returns a model of a transformers class for inference. Raises UserError also for weights that the folder lacks, which
        transformers would draw at random; of buffers, which are constants, published folders leave some out.
        """
        model, found = self._loaded(kind, dtype=dtype, output_loading_info=True)
        weights = dict(model.named_parameters())
        lacking = sorted([*weights.keys() & set(found["missing_keys"]), *map(str, found["mismatched_keys"])])
        if lacking:
            raise self.broken(f"{len(lacking)} weights of {kind} are missing or of another shape, first {lacking[0]}")
        return model.to(self.context.device).eval().requires_grad_(False)

    def processor(self, kind: str) -> object:
        """Returns the tokenizer or processor of a transformers class. Raises UserError, also where no file holds a vocabulary:
        transformers 5 makes an empty one up for a model that it knows.
        """
        path = self.path
        if not any((path / name).is_file() for name in VOCABULARIES):
            raise self.broken(f"it has none of {', '.join(VOCABULARIES)}")
        return self._loaded(kind)

    def broken(self, reason: str) -> UserError:
        """Returns the error for a folder that does not hold what it should."""
        key, what, source = self.need.key, self.need.what, self.need.source
        return UserError(
            f"metric {self.metric} cannot use weights.{key} {str(self.path)!r} ({reason}); copy {what} from {source}."
        )

    def _loaded(self, kind: str, **options: object) -> object:
        path = self.path
        try:
            import transformers
        except ImportError:
            raise UserError(
                f"metric {self.metric} needs transformers, which is not installed; pip install 'autoprune[text]'."
            ) from None
        transformers.utils.logging.disable_progress_bar()  # one a model, in the midst of the search's own
        try:
            return getattr(transformers, kind).from_pretrained(path, local_files_only=True, **options)
        except _ERRORS as error:
            raise self.broken(reason(error)) from None
