"""Quality metrics by name. Adding one: one file, one line here."""

from autoprune.measure.metrics.clip_score import ClipScore
from autoprune.measure.metrics.contract import ImageBatch, Metric, MetricContext, MetricInfo, SetMetric, WeightNeed
from autoprune.measure.metrics.external import External
from autoprune.measure.metrics.geneval import GenEval
from autoprune.measure.metrics.image_reward import ImageReward
from autoprune.measure.metrics.lpips import Lpips, LpipsVgg
from autoprune.measure.metrics.pick_score import PickScore
from autoprune.measure.metrics.sets import Cmmd, CmmdToReference, Fid, FidToReference, Kid, KidToReference
from autoprune.measure.metrics.similarity import MsSsim, Psnr, Ssim
from autoprune.measure.metrics.temporal import Flicker, TemporalError
from autoprune.measure.metrics.tokens import TokenAgreement
from autoprune.measure.metrics.vqa_score import VqaScore

METRICS: dict[str, type[Metric]] = {
    "psnr": Psnr,
    "ssim": Ssim,
    "ms_ssim": MsSsim,
    "tokens": TokenAgreement,
    "temporal_error": TemporalError,
    "flicker": Flicker,
    "lpips": Lpips,
    "lpips_vgg": LpipsVgg,
    "fid": Fid,
    "kid": Kid,
    "cmmd": Cmmd,
    "fid_reference": FidToReference,
    "kid_reference": KidToReference,
    "cmmd_reference": CmmdToReference,
    "clip_score": ClipScore,
    "pick_score": PickScore,
    "image_reward": ImageReward,
    "vqa_score": VqaScore,
    "geneval": GenEval,
    "external": External,
}

__all__ = ["METRICS", "ImageBatch", "Metric", "MetricContext", "MetricInfo", "SetMetric", "WeightNeed"]
