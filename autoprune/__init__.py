"""Public names, resolved on first use: importing autoprune imports neither torch nor any search package."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoprune.backbones import load_backbone
    from autoprune.backbones.released import TextOptions
    from autoprune.backbones.wrapping import wrap
    from autoprune.errors import UserError
    from autoprune.generation import Sampling
    from autoprune.policy import Policy
    from autoprune.production import generate

__version__ = "0.1.0"
__all__ = ["Policy", "Sampling", "TextOptions", "UserError", "generate", "load_backbone", "wrap"]

_HOME = {
    "Policy": "autoprune.policy",
    "Sampling": "autoprune.generation",
    "TextOptions": "autoprune.backbones.released",
    "UserError": "autoprune.errors",
    "generate": "autoprune.production",
    "load_backbone": "autoprune.backbones",
    "wrap": "autoprune.backbones.wrapping",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'autoprune' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
