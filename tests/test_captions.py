from dataclasses import replace

import numpy as np
import pytest

from autoprune.backbones.caption_encoder import MAX_WORDS, VOCABULARY, tokenize
from autoprune.errors import UserError
from autoprune.testbed import captions
from autoprune.testbed.captions import SPLITS, TASKS, Description, Noun


def test_every_caption_is_in_the_vocabulary_and_every_word_is_used():
    rng = np.random.default_rng(0)
    seen = {0, 1}
    for _ in range(1500):
        tokens = tokenize(captions.sample_description(rng).text())
        assert len(tokens) <= MAX_WORDS
        seen.update(tokens)
    assert {VOCABULARY[index] for index in seen} == set(VOCABULARY)


@pytest.mark.parametrize(
    ("description", "text"),
    [
        (
            Description("left of", (Noun("circle", "red"), Noun("square", "blue", "striped"))),
            "a red circle left of a striped blue square",
        ),
        (
            Description("count", (Noun("cross", None, "dotted"),), 3, "dark", "noisy", True),
            "a photo of three dotted crosses on a dark noisy background",
        ),
        (
            Description("and", (Noun("ring"), Noun("circle"), Noun("triangle")), 1, "light"),
            "a ring and a circle and a triangle on a light background",
        ),
    ],
)
def test_texts(description, text):
    assert description.text() == text
    assert len(tokenize(text)) == len(text.split())


def test_the_tokenizer_ignores_case_and_punctuation_and_names_unknown_words():
    assert tokenize("A red circle, left of a BLUE square.") == tokenize("a red circle left of a blue square")
    assert tokenize("") == [VOCABULARY.index("<null>")]
    with pytest.raises(UserError, match=r"'purple', 'dog'.*triangle"):
        tokenize("a purple circle and a dog, a purple dog")
    with pytest.raises(UserError, match="at most 28 words, got 29"):
        tokenize("red " * 29)


def test_corruption_changes_one_attribute_or_swaps_one():
    rng = np.random.default_rng(0)
    for _ in range(300):
        before = captions.sample_description(rng)
        after = captions.corrupted(before, rng)
        changed = [
            (ours, theirs)
            for noun, other in zip(before.nouns, after.nouns, strict=True)
            for ours, theirs in zip(vars(noun).values(), vars(other).values(), strict=True)
            if ours != theirs
        ]
        assert replace(after, nouns=before.nouns) == before
        assert len(changed) == 1 or (len(changed) == 2 and changed[0] == changed[1][::-1])


def test_training_shares():
    rng = np.random.default_rng(0)
    said = [captions.sample_description(rng) for _ in range(1500)]
    shares = {
        "colour": (np.mean([any(noun.colour for noun in each.nouns) for each in said]), 0.8),
        "texture": (np.mean([any(noun.texture for noun in each.nouns) for each in said]), 0.6),
        "background": (np.mean([bool(each.tone or each.ground) for each in said]), 0.55),
        "photo": (np.mean([each.photo for each in said]), 0.5),
    }
    for share, aim in shares.values():
        assert share == pytest.approx(aim, abs=0.06)


def test_prompt_sets_are_balanced_distinct_and_disjoint():
    sets = [captions.prompt_set(split, 700, seed=seed) for split in SPLITS for seed in (0, 1)]
    texts = [{prompt.text for prompt in prompts} for prompts in sets]
    for prompts, distinct in zip(sets, texts, strict=True):
        assert len(prompts) == len(distinct) == 700
        assert [prompt.task for prompt in prompts[:7]] == list(TASKS)
        assert [prompt.text for prompt in prompts] == [prompt.description.text() for prompt in prompts]
    assert not (texts[0] | texts[1]) & (texts[2] | texts[3])
    assert texts[0] != texts[1]
    assert captions.prompt_set("search", 700) == sets[0]


def test_prompt_sets_refuse_what_they_cannot_give():
    with pytest.raises(UserError, match="unknown prompt split 'test'; choose from search, held_out"):
        captions.prompt_set("test", 7)
    with pytest.raises(UserError, match="unknown task 'counts'"):
        captions.task_prompts("counts", 7)
    with pytest.raises(UserError, match="ask for fewer"):
        captions.task_prompts("two", 1200)
