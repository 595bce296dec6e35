"""What a study makes of images: whether they are images, how they score, and how far they are from the dense ones."""

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import UserError
from autoprune.measure.metrics import ImageBatch, MetricContext
from autoprune.measure.metrics.suite import MetricSuite
from autoprune.search.batches import Batch, Work
from autoprune.search.faults import IMAGES, Fault, check_images
from autoprune.search.quality import Quality
from autoprune.search.settings import StudySettings
from autoprune.search.tally import Pairs


class Judge:
    """Scores and metrics of a study, its loss loaded. Images that are none raise Fault."""

    def __init__(self, quality: Quality, settings: StudySettings, device: torch.device) -> None:
        """Loads every metric once: a file that cannot be loaded must not be found out at the end."""
        self._quality, self._settings, self._device = quality, settings, device
        self._loaded(*settings.quality.metrics)
        self._suite = self._loaded("ssim", "psnr", settings.quality.loss)

    def held_out_suite(self) -> MetricSuite:
        """Returns all metrics of the study, loaded now. Raises UserError where their files are gone since."""
        try:
            return self._loaded("ssim", "psnr", self._settings.quality.loss, *self._settings.quality.metrics)
        except UserError as error:
            rest = "every trial is kept, and the same command goes on with the held-out measurement"
            raise UserError(f"{str(error).removesuffix('.')}; {rest}.") from None

    def paired(self, work: Work, images: Tensor, tokens: tuple[Tensor, ...] = ()) -> Batch:
        """Returns dense images [B, 3, H, W] as what policies are compared with."""
        check_images(images)
        return Batch(work, images, self._quality.score(images, work.prompts), tokens)

    def compare(self, images: Tensor, batch: Batch, suite: MetricSuite | None = None, tokens: tuple[Tensor, ...] = ()) -> Pairs:
        """Returns what `suite`, or that of the search, finds in images [B, 3, H, W] of a policy beside those of a batch."""
        check_images(images)
        found = (suite or self._suite).measure(self.pictures(images, batch, tokens))
        if not np.isfinite(found[self._settings.quality.loss]).all():
            raise Fault(IMAGES, f"{self._settings.quality.loss} of some images is not finite")
        return Pairs(self._quality.score(images, batch.work.prompts), batch.score, found)

    def pictures(self, images: Tensor, batch: Batch, tokens: tuple[Tensor, ...]) -> ImageBatch:
        """Returns images with all that metrics may judge them by."""
        prompts = batch.work.prompts
        texts, details = self._quality.texts(prompts), self._quality.details(prompts)
        return ImageBatch(images, texts, details, batch.images, tokens, batch.tokens)

    def _loaded(self, *names: str) -> MetricSuite:
        return MetricSuite(names, MetricContext(self._device, self._settings.weights))
