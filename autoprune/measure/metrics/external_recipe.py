"""How another program scores images: a command with placeholders, read from YAML as in conf/quality/external."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from autoprune.errors import UserError
from autoprune.video_files import SUFFIXES

GIVEN = ("images", "prompts", "output", "here")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Recipe:
    """`command` is split into arguments as a shell would split it, but no shell ever runs; then placeholders become paths:
    {images} a folder of PNG files, {prompts} a JSONL file, {output} the file of scores, {here} the recipe's own folder, and
    the keys of `weights` (key -> what it is) those of the user's. `dimensions` names parts that the program may score;
    without a score of the whole their mean counts. The program is ended after `seconds`. With `videos`, a suffix of
    video_files.py, it scores videos, one file each of `fps` frames a second; 16 is InfinityStar's (arXiv 2511.04675).
    """

    name: str
    command: str
    source: str
    weights: Mapping[str, str] = field(default_factory=dict)
    dimensions: tuple[str, ...] = ()
    lower: bool = False
    passes: bool = False
    unit: str = ""
    seconds: float = 3600.0
    videos: str = ""
    fps: float = 16.0
    here: Path = Path(".")

    @staticmethod
    def read(file: Path) -> "Recipe":
        """Reads a recipe. Raises UserError for a file that is none."""
        import yaml

        try:
            document = yaml.safe_load(file.read_text())
            document |= {"dimensions": tuple(document.get("dimensions", ())), "weights": dict(document.get("weights", {}))}
            return Recipe(**document, here=file.parent.resolve())
        except UserError:
            raise
        except (OSError, yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
            keys = ", ".join(known.name for known in fields(Recipe) if known.name != "here")
            reason = " ".join(str(error).split())
            raise UserError(f"a recipe must be YAML with keys out of {keys}, got {str(file)!r} ({reason}); mend it.") from None

    def __post_init__(self) -> None:
        named = set(_PLACEHOLDER.findall(self.command))
        unknown = sorted(named - {*GIVEN, *self.weights})
        if unknown or "output" not in named or self.seconds <= 0:
            problem = f"placeholder {{{unknown[0]}}}" if unknown else f"command {self.command!r} with {self.seconds} seconds"
            raise UserError(
                f"external recipe {self.name} must have {{output}} in its command, no placeholder but {', '.join(GIVEN)} and "
                f"its weights, and seconds above 0, got {problem}; mend it."
            )
        if self.videos and self.videos not in SUFFIXES or self.fps <= 0:
            rule = f"videos out of {', '.join(SUFFIXES)} or none, and fps above 0"
            raise UserError(f"external recipe {self.name} must have {rule}, got {self.videos!r} and {self.fps}; mend it.")

    def arguments(self, paths: Mapping[str, Path]) -> list[str]:
        """Returns the command as arguments, every placeholder replaced within its own. Raises UserError for open quotes."""
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise UserError(f"the command of external recipe {self.name} cannot be split ({error}); close it.") from None
        return [_PLACEHOLDER.sub(lambda found: str(paths[found[1]]), word) for word in words]
