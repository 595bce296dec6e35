"""The parts of HART's text encoder that need no language model: mask, positions, and cutting the system prompt off."""

import sys
from pathlib import Path

import pytest
import torch

from autoprune.backbones.context import ContextFeatures
from autoprune.backbones.qwen_text import SYSTEM_PROMPT, behind_system, qwen_encoder, without_system
from autoprune.backbones.released import Target, TextOptions
from autoprune.errors import UserError

CPU = Target(torch.device("cpu"), torch.float32)
MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)


def test_positions_count_the_own_tokens_whichever_side_is_padded() -> None:
    features = ContextFeatures.from_mask(torch.zeros(2, 4, 3), MASK)
    assert features.positions.tolist() == [[0, 1, 2, 2], [-1, 0, 1, 2]]
    assert len(features) == 2


def test_the_unconditional_rows_are_zeros_at_position_zero() -> None:
    features = ContextFeatures.from_mask(torch.ones(2, 4, 3), MASK)
    both = features.concatenate(features.unconditional())
    assert len(both) == 4 and both.values[2:].eq(0).all() and both.positions[2:].eq(0).all()
    assert torch.equal(both.positions[:2], features.positions)


def test_the_system_prompt_is_seen_by_all_and_cut_off_again() -> None:
    tokens, system = torch.tensor([[5, 6, 7, 0], [0, 8, 9, 4]]), torch.tensor([[1, 2]])
    joined, seen = behind_system(tokens, MASK, system)
    assert joined.tolist() == [[1, 2, 5, 6, 7, 0], [1, 2, 0, 8, 9, 4]]
    assert seen.int().tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1]]
    states = joined[..., None].bfloat16()
    assert without_system(states, 2)[..., 0].tolist() == tokens.tolist() and without_system(states, 2).dtype == torch.float32


def test_the_system_prompt_ends_where_the_users_begins() -> None:
    assert SYSTEM_PROMPT.startswith("Given a user prompt, generate") and SYSTEM_PROMPT.endswith("\n\nUser Prompt:\n")


@pytest.fixture(scope="module", params=["right", "left"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random language model and tokenizer, saved as transformers saves them."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("qwen-tiny")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "cat": 3}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    options = {"pad_token": "<pad>", "unk_token": "<unk>", "padding_side": request.param}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **options).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    transformers.Qwen2Model(transformers.Qwen2Config(vocab_size=4, **sizes, **heads)).save_pretrained(path)
    return path


def test_features_are_those_of_the_prompt_behind_the_system_prompt(folder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    encoder = qwen_encoder(folder, CPU, TextOptions(), tokens=300)
    features = encoder(["a cat", "a cat a", "a cat"])
    assert features.values.shape == (3, 300, 16) and torch.equal(features.values[0], features.values[2])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    assert features.positions[:, -1].tolist() == [1, 2, 1]
    system, own = tokenizer(SYSTEM_PROMPT).input_ids, tokenizer("a cat", padding="max_length", max_length=300).input_ids
    whole = torch.tensor([system + own])
    assert (whole != 0).sum() == len(system) + 2
    expected = model(input_ids=whole, attention_mask=(whole != 0).long()).last_hidden_state[0, len(system) :]
    torch.testing.assert_close(features.values[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("installed", [False, True])
def test_what_is_missing_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch, *, installed: bool) -> None:
    if installed:
        pytest.importorskip("transformers")
    else:
        monkeypatch.setitem(sys.modules, "transformers", None)
    encoder = qwen_encoder(Path("no/such/folder"), CPU, TextOptions(), tokens=300)
    with pytest.raises(UserError, match="does not exist; download" if installed else "need transformers; install it"):
        encoder(["a cat"])
