"""From the command line to plain data: Hydra composes conf/ and search_spaces/, pydantic checks, dataclasses leave.

OmegaConf and Hydra objects do not get past this file.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autoprune.backbones import Backbone, load_backbone
from autoprune.backbones.released import TextOptions
from autoprune.errors import UserError
from autoprune.search.folders import shipped_folder
from autoprune.search.prompt_files import PromptFile, read_prompts
from autoprune.search.settings import (
    AUTO,
    EMBEDDED,
    BudgetSettings,
    LatencySettings,
    QualitySettings,
    SamplerSettings,
    StorageSettings,
    StudySettings,
    world_of,
)
from autoprune.search.space_file import space_from_document
from autoprune.search.storage import shown


@dataclass(frozen=True)
class RunSettings:
    """One run of the command: what to load, what to search, where to record it, by how many processes.

    `several_jobs` says that this is one job of a multirun. `composed` holds no password.
    """

    backbone: "BackboneChoice"
    study: StudySettings
    tracker: "TrackerChoice"
    composed: dict[str, object]
    workers: int = 1
    join: bool = False
    per_device: bool = False
    several_jobs: bool = False


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplingChoice(_Strict):
    """What a user sets of backbones.Sampling; the rest stays as the authors have it."""

    guidance: float | tuple[float, ...] | None = None
    temperature: float | tuple[float, ...] | None = None
    top_k: int | tuple[int, ...] | None = None
    top_p: float | tuple[float, ...] | None = None
    guidance_layers: tuple[int, ...] | None = None
    negative: str | None = None
    h_div_w: float | None = None
    frames: int | None = None


class BackboneChoice(_Strict):
    """The arguments of `load_backbone`, and changes of its sampling."""

    name: str
    weights: str | None = None
    device: str | None = None
    dtype: str = "auto"
    text: TextOptions = TextOptions()
    graphs: str = "auto"
    keys: str = "auto"
    sampling: SamplingChoice = SamplingChoice()

    def load(self) -> Backbone:
        """Returns the loaded backbone. Raises UserError."""
        options = {"device": self.device, "dtype": self.dtype, "text": self.text, "graphs": self.graphs, "keys": self.keys}
        backbone = load_backbone(self.name, weights=self.weights, **options)
        changes = self.sampling.model_dump(exclude_none=True)
        return backbone.sampled(**changes) if changes else backbone


class TrackerChoice(_Strict):
    """`project` is the Weights & Biases project; unused by `none`."""

    name: Literal["wandb", "none"]
    project: str | None = None


class _Study(_Strict):
    dir: Path
    name: str
    seed: int
    discard: bool
    shared_prefix_mb: int
    shared_prefix_host_mb: int
    lease: float
    per_device: bool


class _Composed(_Strict):
    backbone: BackboneChoice
    prompts: Path | None = None
    weights: dict[str, Path | None] = {}
    search_spaces: dict[str, object]
    quality: QualitySettings
    latency: LatencySettings
    sampler: SamplerSettings
    storage: StorageSettings
    tracker: TrackerChoice
    budget: BudgetSettings
    study: _Study
    workers: int = Field(1, ge=1)
    join: bool = False


def run_composed(task: Callable[[RunSettings], None]) -> None:
    """Composes the configuration from the command line and calls `task` with it, once per job of a multirun.

    Raises UserError for whatever is wrong with the command line or a configuration file.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them and exiting with 1
    Plugins.instance().register(_SearchSpacesBesideConf)
    failures: list[Exception] = []
    composing = os.getpid()

    def job(config: DictConfig) -> None:
        try:
            task(read_settings(config))
        except Exception as error:  # raised below: Hydra would first print a line of its own
            if os.getpid() != composing:  # a launcher took the job to another process, and tells this one
                raise
            failures.append(error)

    try:
        hydra.main(version_base="1.3", config_path=str(shipped_folder("conf")), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error)) from error
    except OSError as error:
        raise UserError(f"output folder {error.filename!r} must be writable ({error.strerror}); set study.dir.") from error
    if failures:
        raise failures[0]


def read_settings(config: DictConfig) -> RunSettings:
    """Checks a composed configuration and returns it as plain data."""
    try:
        composed = OmegaConf.to_container(config, resolve=True)
        valid = _Composed.model_validate(composed)
    except OmegaConfBaseException as error:
        raise UserError(_sentence(error)) from None
    except ValidationError as error:
        raise UserError(_first_problem(error)) from None
    prompts = valid.prompts and read_prompts(valid.prompts)
    study = StudySettings(
        directory=valid.study.dir,
        name=valid.study.name,
        space=space_from_document(valid.search_spaces),
        seed=valid.study.seed,
        sampler=valid.sampler,
        latency=valid.latency,
        quality=_quality(valid.quality, prompts, backbone=valid.backbone.name),
        budget=valid.budget,
        prompts=prompts,
        discard=valid.study.discard,
        shared_prefix_mb=valid.study.shared_prefix_mb,
        weights={key: path for key, path in valid.weights.items() if path is not None},
        shared_prefix_host_mb=valid.study.shared_prefix_host_mb,
        storage=valid.storage,
        lease=valid.study.lease,
    )
    composed["storage"]["url"] = valid.storage.url and shown(valid.storage)
    return RunSettings(
        backbone=valid.backbone,
        study=study,
        tracker=valid.tracker,
        composed=composed,
        workers=valid.workers,
        join=valid.join,
        per_device=valid.study.per_device,
        several_jobs=HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN,
    )


def _quality(chosen: QualitySettings, prompts: PromptFile | None, *, backbone: str) -> QualitySettings:
    """Returns the settings with `auto` decided: nothing detects what a user's own prompts ask for.

    Raises UserError where there are only scenes to ask for, which the embedded backbones alone have learnt, each its own.
    """
    if prompts is None and backbone not in EMBEDDED and chosen.name == "auto":
        raise UserError(f"backbone {backbone} needs your prompts; give prompts=FILE, one a line (of VAR: class numbers).")
    if prompts is not None or chosen.name not in (AUTO, *EMBEDDED.values()):
        return chosen if chosen.name != AUTO else replace(chosen, name="fidelity")
    own = world_of(backbone)
    if chosen.name not in (AUTO, own):
        raise UserError(f"quality {chosen.name} is of scenes that {backbone} has not learnt; set quality={own}.")
    return replace(chosen, name=own)


class _SearchSpacesBesideConf(SearchPathPlugin):
    """Makes search_spaces/NAME.yaml the Hydra group `search_spaces`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("autoprune", f"file://{shipped_folder('search_spaces').parent}")


def _sentence(error: Exception) -> str:
    """Returns Hydra's or OmegaConf's error in one sentence that lists the choices where there are any."""
    cause, first = error.__cause__, str(error).strip().splitlines()[0].rstrip(".")
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        return f"unknown {group} {name!r}; choose from {', '.join(sorted(error.options))}."
    if isinstance(cause, OmegaConfBaseException) and cause.parent_node is not None:
        known = sorted(str(key) for key in cause.parent_node if key != "hydra")
        return f"unknown setting {cause.full_key!r}; choose from {', '.join(known)}."
    return f"the settings do not compose ({first}); write group=choice or key=value as `python -m autoprune --help` lists them."


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return str(cause)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown setting {where!r}; `python -m autoprune --help` shows every setting."
    rule = problem["msg"].replace("Input should be", "must be").partition(",")[0]
    return f"{where} {rule[0].lower() + rule[1:]}, got {problem['input']!r}."
