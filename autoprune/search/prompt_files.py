"""Prompts of the user's own: files in the layouts that benchmarks ship them in, split for search and final numbers.

GenEval (arXiv 2310.11513) ships one JSON object a line, DPG-Bench (arXiv 2403.05135) a folder with one text file a prompt.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from autoprune.errors import UserError, unknown_name

HELD_OUT_SHARE = 5 / 8  # as the default numbers of prompts divide, 96 to search and 160 held out: shipped numbers need more
_SETTINGS = {"search": "quality.prompts", "held_out": "quality.held_out_prompts"}


@dataclass(frozen=True)
class TextPrompt:
    """A prompt of a file; `label` is GenEval's tag or the stem of DPG-Bench's file, else empty.

    `details` is the whole JSON object that the prompt came with, or `item_id` as DPG-Bench calls that stem, for metrics that
    check what it asks for; no part of identity.
    """

    text: str
    label: str = ""
    details: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class PromptFile:
    """The distinct prompts of a file or folder, in its order; `source` names it in errors."""

    source: str
    prompts: tuple[TextPrompt, ...]

    def take(self, split: str, count: int, *, seed: int = 0, setting: str = "") -> list[TextPrompt]:
        """Returns `count` prompts of "search" or "held_out", in an order that depends on their texts and the seed alone.

        The splits share no prompt at any seed. Raises UserError for an unknown split, and when it has fewer prompts;
        `setting` is what the user lowers then, by default that of a study.
        """
        if split not in _SETTINGS:
            raise unknown_name("prompt split", split, _SETTINGS)
        members = [prompt for prompt in self.prompts if _split_of(prompt.text) == split]
        if len(members) < count:
            setting = setting or _SETTINGS[split]
            raise UserError(
                f"{setting} must be at most {len(members)}, the {split} split of the {len(self.prompts)} prompts in "
                f"{self.source!r}, got {count}; lower {setting} or give more prompts."
            )
        return sorted(members, key=lambda prompt: _hash(f"order {seed}", prompt.text))[:count]

    def sha256(self) -> str:
        """Returns what identifies the prompts, whatever their order, labels and file."""
        return texts_sha256(prompt.text for prompt in self.prompts)


def texts_sha256(texts: Iterable[str]) -> str:
    """Returns what identifies a set of prompts, whatever their order."""
    return hashlib.sha256("\n".join(sorted(texts)).encode(errors="replace")).hexdigest()


def read_prompts(source: Path) -> PromptFile:
    """Reads a text file (one prompt a line, class numbers too), a `.jsonl` file of GenEval's layout (also recognised by
    its first character) or a folder of `*.txt` files with one prompt each.

    White space within a prompt becomes one space; empty and repeated prompts are dropped. Raises UserError for what cannot
    be read or holds no prompt, and for a line that is no JSON object with a prompt.
    """
    try:
        found = list(_of_folder(source) if source.is_dir() else _of_file(source))
    except OSError as error:
        raise UserError(f"prompts {str(source)!r} cannot be read ({error.strerror}); give a file or a folder.") from None
    except UnicodeDecodeError:
        raise UserError(f"prompts must be UTF-8 text, got other bytes in {str(source)!r}; convert it.") from None
    distinct: dict[str, TextPrompt] = {}
    for prompt in found:
        distinct.setdefault(prompt.text, prompt)
    if not distinct:
        wanted = "*.txt files of one prompt each" if source.is_dir() else "a file of one prompt a line"
        raise UserError(f"prompts must not be empty, got none in {str(source)!r}; give {wanted}.")
    return PromptFile(str(source), tuple(distinct.values()))


def _of_folder(folder: Path) -> Iterator[TextPrompt]:
    files = sorted(folder.glob("*.txt"))
    return _filled(TextPrompt(_text(file), file.stem, {"item_id": file.stem}) for file in files)


def _of_file(file: Path) -> Iterator[TextPrompt]:
    text = _text(file)
    if file.suffix == ".jsonl" or text.lstrip().startswith("{"):
        return _filled(_of_object(line, f"{file}, line {number}") for number, line in _numbered(text))
    return _filled(TextPrompt(line) for _, line in _numbered(text))


def _filled(found: Iterable[TextPrompt]) -> Iterator[TextPrompt]:
    """Yields the prompts that have words, with one space between them."""
    for prompt in found:
        if prompt.text.strip():
            yield replace(prompt, text=" ".join(prompt.text.split()))


def _of_object(line: str, where: str) -> TextPrompt:
    """Returns the prompt of one line of JSON, its tag as the label."""
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at character {error.pos + 1}"
        raise UserError(f"every line must be one JSON object, got {_short(line)} in {where} ({problem}); mend it.") from None
    prompt = document.get("prompt") if isinstance(document, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f'every line must be a JSON object with a text "prompt", got {_short(line)} in {where}; add it.')
    return TextPrompt(prompt, str(document.get("tag", "")), document)


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    """Yields the lines with something in them and their numbers from 1; only line feeds end a line, as in JSONL."""
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig")


def _split_of(text: str) -> str:
    """Returns the split of a prompt; it hangs on its text alone, so that added prompts move no other one."""
    return "held_out" if _hash("split", text) < HELD_OUT_SHARE else "search"


def _hash(purpose: str, text: str) -> float:
    """Returns a number in [0, 1), the same on every machine."""
    digest = hashlib.sha256(f"autoprune {purpose} {text}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _short(line: str) -> str:
    return repr(line if len(line) <= 40 else line[:37] + "...")
