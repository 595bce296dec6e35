"""The embedded text encoder: features do not depend on padding, unknown words are named."""

import pytest
import torch

from autoprune.backbones.caption_encoder import MAX_WORDS, VOCABULARY, CaptionEncoder, tokenize
from autoprune.errors import UserError


@pytest.fixture
def encoder() -> CaptionEncoder:
    torch.manual_seed(0)
    return CaptionEncoder().eval()


def test_a_prompt_has_the_same_features_alone_and_beside_a_longer_one(encoder):
    short, long = "a red circle", "a photo of a striped blue square left of a green ring"
    with torch.no_grad():
        alone, together = encoder([short]), encoder([short, long])
    assert together.lengths == (3, 12)
    torch.testing.assert_close(together.values[0, :3], alone.values[0], atol=1e-5, rtol=0)
    assert not together.values[0, 3:].any()


def test_word_order_changes_the_features(encoder):
    with torch.no_grad():
        features = encoder(["red circle", "circle red"]).values
    assert not torch.allclose(features[0, 0], features[1, 1])


def test_tokenize_ignores_case_and_punctuation():
    assert tokenize("A red circle, left of: a RING.") == tokenize("a red circle left of a ring")


def test_unknown_words_are_named_with_the_vocabulary():
    with pytest.raises(UserError, match="'purple', 'cow'.*magenta"):
        tokenize("a purple cow")


def test_too_long_a_prompt_is_refused():
    with pytest.raises(UserError, match=f"at most {MAX_WORDS} words, got {MAX_WORDS + 1}"):
        tokenize("red " * (MAX_WORDS + 1))


def test_the_encoder_is_small():
    parameters = sum(parameter.numel() for parameter in CaptionEncoder().parameters())
    assert 300_000 < parameters < 500_000
    assert len(set(VOCABULARY)) == len(VOCABULARY)
