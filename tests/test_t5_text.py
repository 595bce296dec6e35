"""The T5 encoder on a tiny random model saved to a folder, as transformers saves it."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from autoprune.backbones.released import Target, TextOptions
from autoprune.backbones.t5_text import MAX_LENGTH, RandomTextEncoder, T5TextEncoder, t5_encoder, with_positive
from autoprune.errors import UserError

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "and", "blue", "dog"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flan-t5-tiny")
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    T5EncoderModel(T5Config(vocab_size=len(WORDS), **sizes)).save_pretrained(path)
    return path


def encoder(folder: Path | None, **options: object) -> T5TextEncoder:
    return t5_encoder(folder, Target(CPU, torch.float32), TextOptions(**options))


def test_features_are_the_models_own_without_padding(folder: Path) -> None:
    prompts = ["a cat", "a red cat and a blue dog"]
    features = encoder(folder)(prompts)
    assert features.lengths == (3, 8) and features.values.shape == (2, 8, 32) and features.values.dtype is torch.float32
    model = T5EncoderModel.from_pretrained(folder).eval()
    for row, length, ids in zip(features.values, features.lengths, ([3, 5, 1], [3, 4, 5, 6, 3, 7, 8, 1]), strict=True):
        padded = torch.tensor([ids + [0] * (MAX_LENGTH - len(ids))])
        expected = model(input_ids=padded, attention_mask=(padded != 0).long()).last_hidden_state[0, :length]
        torch.testing.assert_close(row[:length], expected, rtol=0, atol=1e-5)
        assert not row[length:].any()


def test_a_prompt_is_encoded_once(folder: Path) -> None:
    text = encoder(folder)
    first = text(["a cat", "a cat"])
    model = text._parts[1]
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(text(["a cat"]).values[0], first.values[0]) and not calls
    text(["a dog"])
    assert len(calls) == 1


def test_long_prompts_are_cut(folder: Path) -> None:
    assert encoder(folder)(["cat " * 900]).lengths == (MAX_LENGTH,)


def test_a_loaded_pair_is_used_as_it_is(folder: Path) -> None:
    from transformers import AutoTokenizer

    model = T5EncoderModel.from_pretrained(folder).eval()
    around = T5TextEncoder.around(AutoTokenizer.from_pretrained(folder), model)
    assert torch.equal(around(["a cat"]).values, encoder(folder)(["a cat"]).values)


def test_a_missing_or_broken_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; download google/flan-t5-xl there, or allow it with allow_download"):
        encoder(tmp_path / "nowhere")(["a cat"])
    with pytest.raises(UserError, match="cannot be loaded"):
        encoder(tmp_path)(["a cat"])
    with pytest.raises(UserError, match="'flan-t5-xl' does not exist"):
        encoder(None)(["a cat"])


@pytest.mark.parametrize("prompt", ["a man", "two women", "a humane shelter", "grandson of a king"])
def test_prompts_about_people_get_the_official_sentence(prompt: str) -> None:
    assert with_positive(prompt).startswith(prompt + ". very smooth faces")


def test_other_prompts_and_the_default_stay_as_they_are(folder: Path) -> None:
    assert with_positive("a red cat") == "a red cat"
    assert encoder(folder)(["a man"]).lengths == (3,) and encoder(folder, positive_prompt=True)(["a man"]).lengths[0] > 3


def test_random_features_are_the_same_for_the_same_prompt() -> None:
    text = RandomTextEncoder(16, device=CPU, length=5)
    features = text(["a cat", "a dog", "a cat"])
    assert features.lengths == (5, 5, 5) and torch.equal(features.values[0], features.values[2])
    assert not torch.equal(features.values[0], features.values[1])
