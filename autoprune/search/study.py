"""The entry of a study: opens folder and storage, finds out who leads, and runs the loop of this worker."""

import logging
import re
from contextlib import ExitStack
from dataclasses import replace

from autoprune.backbones import Backbone
from autoprune.measure.device import device_conditions, device_identity
from autoprune.measure.device_lock import DeviceLock
from autoprune.measure.latency import LatencyTable
from autoprune.policy import fingerprint
from autoprune.search.crew import Crew
from autoprune.search.evaluation import Evaluator
from autoprune.search.evaluator import GenerationEvaluator
from autoprune.search.folder import StudyFolder
from autoprune.search.interrupts import Interrupts
from autoprune.search.leadership import Leadership, await_folder
from autoprune.search.loop import StudyLoop
from autoprune.search.presence import Presence, Worker
from autoprune.search.progress import NullProgress
from autoprune.search.publication import TABLE_FILE, Publication
from autoprune.search.quality import check_prompts
from autoprune.search.records import StudyResult
from autoprune.search.sampler import make_sampler
from autoprune.search.settings import StudySettings
from autoprune.search.shared_study import SharedStudy
from autoprune.search.space import SearchSpace, space_for
from autoprune.search.storage import open_storage
from autoprune.search.tracking import NullTracker

_LOG = logging.getLogger("autoprune")
SEED_STEP = 100_003  # between workers' samplers; a resumed study counts on from its trials


def run_study(
    settings: StudySettings,
    *,
    backbone: Backbone,
    tracker: NullTracker,
    progress: NullProgress,
    evaluator: Evaluator | None = None,
    crew: Crew | None = None,
) -> StudyResult | None:
    """Runs, continues or helps the study in `settings.folder`; who leads it validates its front. The others return None.

    Ctrl-C ends it with `interrupted` set and everything finished stored; the same call continues. `evaluator` replaces
    what measures policies; `crew` says who else takes part. Raises UserError for unreadable prompts, a storage that does not
    answer, and a folder or study that is unwritable, in use, or of something else.
    """
    check_prompts(settings, backbone)
    space, crew = space_for(settings.space, backbone), crew or Crew()
    if space.missing:
        _LOG.info("%s", " ".join(space.missing))
    with ExitStack() as stack:
        folder = stack.enter_context(StudyFolder(settings.folder, _identity(settings, backbone, space)))
        interrupts = stack.enter_context(Interrupts(_LOG.warning))
        await_folder(folder, crew, settings.storage)
        study = SharedStudy(open_storage(settings.storage, settings.folder), name=settings.name, space=space)
        study.sync()
        worker = Worker.here(crew.name or "the study")
        presence = stack.enter_context(Presence(worker, study.board, lease=settings.lease))
        leadership = Leadership(folder, study, presence, crew=crew, presets=space.presets()).join()
        if leadership.over:
            return None
        seed = settings.seed + study.size() + SEED_STEP * crew.rank
        study.use(make_sampler(space, settings.sampler, seed, margin=settings.quality.margin))
        if evaluator is None:
            saved = folder.read_json(TABLE_FILE)
            evaluator = GenerationEvaluator(backbone, settings, table=saved and LatencyTable.from_plain(saved))
        publication = Publication(folder, study, space, tracker=tracker, progress=progress)
        parts = {"leadership": leadership, "evaluator": evaluator, "publication": publication}
        loop = StudyLoop(settings, space, lock=DeviceLock(backbone.device), **parts)
        conditions, loss = device_conditions(backbone.device, backbone.dtype), settings.quality.loss_text
        loop.result = replace(loop.result, backbone=backbone.name, device=conditions, loss_text=loss)
        return loop.run(interrupts)


def of_device(settings: StudySettings, backbone: Backbone) -> StudySettings:
    """Returns the settings of the study of this device, dtype and torch, which is named after them."""
    identity = device_identity(backbone.device, backbone.dtype)
    words = "-".join(str(identity[name]) for name in ("device_name", "threads", "dtype", "torch"))
    return replace(settings, name=f"{settings.name}@{re.sub('[^a-z0-9.]+', '-', words.lower())}")


def _identity(settings: StudySettings, backbone: Backbone, space: SearchSpace) -> dict[str, object]:
    """Returns what must be equal for two workers' numbers to belong to one study."""
    return {
        "backbone": backbone.name,
        "sampling": backbone.sampling.identity(),
        "weights": backbone.revision,
        "keys": backbone.keys,
        "scale_schedule": fingerprint(space.target.scale_schedule),
        "space": settings.space.name,
        "space_sha256": settings.space.sha256(),
        "calibration": space.calibration.digest() if space.calibration else "",
        "device": device_identity(backbone.device, backbone.dtype),
        "settings": settings.measurement_identity(),
    }
