"""The backbones by name, and what a loaded one consists of."""

from autoprune.backbones.backbone import Backbone, Sampling
from autoprune.backbones.catalogue import BACKBONES, LoadArguments, load_backbone

__all__ = ["BACKBONES", "Backbone", "LoadArguments", "Sampling", "load_backbone"]
