"""`python -m autoprune.compare`: every preset of a search space and any policy files, measured under identical conditions."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.arguments import run_command
from autoprune.backbones import LoadArguments
from autoprune.errors import UserError, unknown_name
from autoprune.files import check_writable

if TYPE_CHECKING:
    from autoprune.backbones import Backbone
    from autoprune.search.comparison_records import Comparison
    from autoprune.search.space import SearchSpace

USAGE = "python -m autoprune.compare policies=outputs/tiny-unified/policies prompts=64 prompts_file=own.txt"


@dataclass(frozen=True)
class Choices(LoadArguments):
    """The command line. `search_spaces` names the file whose presets are compared, `policies` is a policy file or a folder.

    `prompts` counts held-out prompts; they come from `prompts_file` (as `prompts=FILE` of the search) or are rendered scenes'.
    `rounds` is the least number of timed rounds; every batch of `prompts` gets one. `per_prompt` prompts are timed alone.
    """

    search_spaces: str = "unified"
    policies: str = ""
    prompts: int = 160
    prompts_file: str = ""
    batch: int = 16
    rounds: int = 9
    per_prompt: int = 8
    seed: int = 0
    output: str = "outputs/comparison"


def main(arguments: list[str]) -> int:
    """Runs the command; returns 0, 2 after bad input, 130 after Ctrl-C, when the finished rounds are written all the same."""
    return run_command(Choices, arguments, usage=USAGE, command=_compare)


def _compare(choices: Choices) -> str:
    try:
        return _report(choices, *_measured(choices))
    except ModuleNotFoundError as error:
        rule = f"the comparison needs {str(error.name).partition('.')[0]}, not installed here"
        raise UserError(f'{rule}; run: pip install "autoprune[search]".') from None


def _measured(choices: Choices) -> "tuple[Comparison, tuple[str, ...]]":
    """Returns the comparison and a sentence for each preset that was left out."""
    import matplotlib  # noqa: F401 (needed at the end: a missing package must show before any work)
    import PIL  # noqa: F401
    import torchmetrics  # noqa: F401

    from autoprune.measure.placement import with_fitting_keys
    from autoprune.search.comparison import compare
    from autoprune.search.comparison_records import ComparisonSettings, file_candidates, preset_candidates
    from autoprune.search.progress import RichProgress
    from autoprune.search.prompt_files import read_prompts
    from autoprune.search.settings import world_of

    names = [field.name for field in fields(ComparisonSettings)]
    settings = ComparisonSettings(**{name: getattr(choices, name) for name in names})
    prompts = read_prompts(Path(choices.prompts_file)) if choices.prompts_file else None
    if prompts is None:
        world_of(choices.backbone)  # must say before any work that there is none
    else:
        prompts.take("held_out", settings.prompts, setting="prompts")
    check_writable(Path(choices.output), what="output", remedy="choose another folder")
    backbone = with_fitting_keys(choices.load(), batch=choices.batch)
    space = _space(choices, backbone)
    candidates = preset_candidates(space)
    if choices.policies:
        taken = [candidate.name for candidate in candidates]
        candidates += file_candidates(Path(choices.policies), space.target, taken=taken)
    try:
        with RichProgress() as progress:
            return compare(backbone, candidates, settings, progress=progress, prompts=prompts), space.missing
    except KeyboardInterrupt:
        print("autoprune: stopped before the first round was done; nothing was written.", file=sys.stderr)
        raise


def _space(choices: Choices, backbone: "Backbone") -> "SearchSpace":
    from autoprune.search.folders import shipped_folder
    from autoprune.search.space import space_for
    from autoprune.search.space_file import read_space

    files = {path.stem: path for path in sorted(shipped_folder("search_spaces").glob("*.yaml"))}
    if choices.search_spaces not in files:
        raise unknown_name("search space", choices.search_spaces, files)
    return space_for(read_space(files[choices.search_spaces]), backbone)


def _report(choices: Choices, comparison: "Comparison", left_out: Sequence[str]) -> str:
    """Writes and prints the comparison; raises KeyboardInterrupt after that if Ctrl-C cut it short."""
    from rich.console import Console

    from autoprune.search.comparison_report import comparison_table, write_comparison
    from autoprune.search.tables import relative

    defaults = asdict(Choices())
    changed = [f"{key}={value}" for key, value in asdict(choices).items() if value != defaults[key]]
    command = " ".join(["python -m autoprune.compare", *changed])
    paths = write_comparison(comparison, Path(choices.output), command=command, left_out=left_out)
    Console(width=None if sys.stdout.isatty() else 170).print(comparison_table(comparison))
    for sentence in left_out:
        print(f"autoprune: {sentence}", file=sys.stderr)
    if comparison.interrupted:
        done = f"{comparison.rounds} of {comparison.settings.total_rounds} rounds were finished"
        print(f"autoprune: stopped; {done}, what they measured is in {choices.output}.", file=sys.stderr)
        raise KeyboardInterrupt
    return "written: " + ", ".join(map(relative, paths))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
