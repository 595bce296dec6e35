"""Prompts of the user's own: every layout, the split, and one sentence for whatever is wrong with a file."""

import json
import random
from pathlib import Path

import pytest

from autoprune.errors import UserError
from autoprune.search.prompt_files import HELD_OUT_SHARE, PromptFile, TextPrompt, read_prompts

SPLITS = ("search", "held_out")


def written(folder: Path, content: str | bytes, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(found: PromptFile) -> list[str]:
    return [prompt.text for prompt in found.prompts]


def numbered(count: int) -> PromptFile:
    return PromptFile("x", tuple(TextPrompt(f"prompt {number}") for number in range(count)))


def whole(found: PromptFile, split: str) -> list[TextPrompt]:
    """Returns a split as a whole, taken by asking for more and more."""
    taken: list[TextPrompt] = []
    try:
        while True:
            taken = found.take(split, len(taken) + 1)
    except UserError:
        return taken


def test_a_text_file_is_one_prompt_a_line_without_blanks_and_repetitions(tmp_path):
    path = written(tmp_path, "\ufeffa red  circle \r\n\n  \na blue ring\na red circle\n{curly} braces")
    assert texts(read_prompts(path)) == ["a red circle", "a blue ring", "{curly} braces"]


def test_class_numbers_are_prompts(tmp_path):
    assert texts(read_prompts(written(tmp_path, "207\n0\n\n999\n207\n"))) == ["207", "0", "999"]


@pytest.mark.parametrize("name", ["evaluation_metadata.jsonl", "metadata.txt"])
def test_a_geneval_file_gives_prompts_and_tags(tmp_path, name):
    lines = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [], "prompt": "a photo of two clocks"},
        {"prompt": "a caf\u00e9\u2028at night"},
    ]
    content = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    found = read_prompts(written(tmp_path, content, name)).prompts
    assert found == (
        TextPrompt("a photo of a bench", "single_object"),
        TextPrompt("a photo of two clocks", "counting"),
        TextPrompt("a caf\u00e9 at night"),
    )
    assert [prompt.details for prompt in found] == lines


def test_a_folder_has_one_prompt_a_text_file_named_by_its_stem(tmp_path):
    written(tmp_path, "A long\nparagraph.\n", "partiprompts7.txt")
    written(tmp_path, "Another one.", "COCOval2014.txt")
    written(tmp_path, "", "empty.txt")
    written(tmp_path, "not a prompt", "README.md")
    expected = (TextPrompt("Another one.", "COCOval2014"), TextPrompt("A long paragraph.", "partiprompts7"))
    assert read_prompts(tmp_path).prompts == expected
    assert [prompt.details["item_id"] for prompt in read_prompts(tmp_path).prompts] == ["COCOval2014", "partiprompts7"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", "\n \n", "prompts must not be empty, got none in "),
        ("a.jsonl", "", "prompts must not be empty, got none in "),
        ("a.txt", b"\xff\xfe\x00", "prompts must be UTF-8 text, got other bytes in "),
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": "y"', "a.jsonl, line 3 (Expecting ',' delimiter at character 15); mend it."),
        ("a.jsonl", "a red circle\n", "every line must be one JSON object, got 'a red circle' in "),
        ("a.txt", '{"prompt": "x"}\n{"text": "y"}\n', 'every line must be a JSON object with a text "prompt", got '),
        ("a.jsonl", '{"prompt": 5}', "line 1; add it."),
        ("a.jsonl", "[1, 2]", "line 1; add it."),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, name, content, sentence):
    with pytest.raises(UserError) as caught:
        read_prompts(written(tmp_path, content, name))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_without_prompts_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be read .No such file or directory.; give a file or a folder"):
        read_prompts(tmp_path / "missing.txt")
    with pytest.raises(UserError, match=r"got none in .*; give \*\.txt files of one prompt each"):
        read_prompts(tmp_path)


def test_the_splits_share_nothing_and_hold_everything():
    found = numbered(300)
    search, held_out = (whole(found, split) for split in SPLITS)
    assert not set(search) & set(held_out) and set(search + held_out) == set(found.prompts)
    for seed in (1, 2):
        assert set(found.take("search", len(search), seed=seed)) == set(search), "a seed moves no prompt to the other split"


def test_the_split_is_that_of_any_machine_and_of_the_text_alone():
    few, many = numbered(40), numbered(400)
    assert [prompt.text for prompt in few.take("search", 3)] == ["prompt 14", "prompt 33", "prompt 12"], "as sha256sum has it"
    assert [prompt.text for prompt in few.take("held_out", 3)] == ["prompt 29", "prompt 26", "prompt 39"]
    assert set(whole(few, "held_out")) <= set(whole(many, "held_out"))


def test_neither_file_order_nor_labels_matter():
    shuffled = [TextPrompt(prompt.text, "label") for prompt in numbered(100).prompts]
    random.Random(0).shuffle(shuffled)
    other = PromptFile("y", tuple(shuffled))
    for split in SPLITS:
        assert [prompt.text for prompt in other.take(split, 20)] == [prompt.text for prompt in numbered(100).take(split, 20)]
    assert other.sha256() == numbered(100).sha256() != numbered(99).sha256()


def test_the_splits_have_their_shares_and_a_short_prefix_is_spread_over_the_file():
    found = numbered(2000)
    assert len(whole(found, "held_out")) == pytest.approx(2000 * HELD_OUT_SHARE, abs=3 * (2000 * 0.375 * 0.625) ** 0.5)
    places = [found.prompts.index(prompt) for prompt in found.take("search", 100)]
    assert sum(place < 1000 for place in places) == pytest.approx(50, abs=15) and places != sorted(places)
    assert found.take("search", 100) != found.take("search", 100, seed=1)


def test_too_few_prompts_are_one_sentence_with_both_numbers_and_the_remedy():
    available = len(whole(numbered(40), "search"))
    sentence = f"quality.prompts must be at most {available}, the search split of the 40 prompts in 'x', got 96; "
    with pytest.raises(UserError) as caught:
        numbered(40).take("search", 96)
    assert str(caught.value) == sentence + "lower quality.prompts or give more prompts."
    with pytest.raises(UserError, match="lower quality.held_out_prompts or give more prompts"):
        numbered(40).take("held_out", 160)
    with pytest.raises(UserError, match="^prompts must be at most"):
        numbered(40).take("held_out", 160, setting="prompts")
    with pytest.raises(UserError, match="unknown prompt split 'test'; choose from search, held_out"):
        numbered(40).take("test", 1)
