"""VQAScore against a hand-assembled forward pass of a small random Llava that transformers saved."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_clip_metrics import pictures, pil
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from autoprune.errors import UserError
from autoprune.measure.metrics.contract import ImageBatch, MetricContext
from autoprune.measure.metrics.vqa_score import VqaScore

CPU = torch.device("cpu")
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "Yes", "No", "yes", "no", "USER", "ASSISTANT", ":", "Does", "this"]
WORDS += ["figure", "show", "Please", "answer", "or", "a", "red", "cat", '"', "?", ".", '"?']
TEMPLATE = (
    "<s>{% for message in messages %}USER : {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT :{% endif %}"
)
SIDE, PATCH = 24, 8


def save_llava(folder: Path, *, words: list[str] = WORDS, template: str | None = TEMPLATE, tied: bool = False) -> Path:
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **marks)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    LlavaProcessor(
        CLIPImageProcessorPil(**size),
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, **sizes),
        text_config=LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, initializer_range=0.2, **sizes),
        image_token_index=WORDS.index("<image>"),
        vision_feature_layer=-2,
        tie_word_embeddings=tied,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


def expected(folder: Path, image: torch.Tensor, words: list[str]) -> float:
    """Returns P(Yes) after the words, the image put in place of <image> by hand."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pil(image), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        seen = model.model.multi_modal_projector(states)[0]
        embed = model.get_input_embeddings()
        place = words.index("<image>")
        ids = [
            torch.tensor([WORDS.index(word) if word in WORDS else 3 for word in part])
            for part in (words[:place], words[place + 1 :])
        ]
        whole = torch.cat([embed(ids[0]), seen, embed(ids[1])])[None]
        logits = model.lm_head(model.model.language_model(inputs_embeds=whole).last_hidden_state)[0, -1]
    return float(logits.double().exp()[5] / logits.double().exp().sum())


def test_it_is_the_probability_of_yes_over_the_vocabulary(folder: Path) -> None:
    images, prompts = pictures(2, 48, 48), ["a red cat", "a {x} cat"]
    found = VqaScore(MetricContext(CPU, {"vqa": folder})).measure(ImageBatch(images, prompts))
    assert found.shape == (2,) and found.dtype == np.float64
    start = ["<s>", "USER", ":", "<image>", "Does", "this", "figure", "show"]
    end = ["Please", "answer", "yes", "or", "no", ".", "ASSISTANT", ":"]
    asked = [['"', "a", "red", "cat", '"?'], ['"', "a", "<unk>", "<unk>", "<unk>", "cat", '"?']]
    truth = [expected(folder, image, [*start, *words, *end]) for image, words in zip(images, asked, strict=True)]
    assert abs(truth[0] - truth[1]) > 1e-3 and 0.001 < min(truth) < max(truth) < 0.999
    np.testing.assert_allclose(found, truth, atol=2e-4)


def test_images_matter(folder: Path) -> None:
    found = VqaScore(MetricContext(CPU, {"vqa": folder})).measure(ImageBatch(pictures(2), ["a red cat"] * 2))
    assert abs(found[0] - found[1]) > 1e-6


def test_of_a_video_it_is_the_mean_over_frames(folder: Path) -> None:
    metric, frames = VqaScore(MetricContext(CPU, {"vqa": folder})), pictures(4)
    alone = metric.measure(ImageBatch(frames, ["a red cat"] * 4)).reshape(2, 2)
    video = metric.measure(ImageBatch(frames.unflatten(0, (2, 2)).transpose(1, 2), ["a red cat"] * 2))
    np.testing.assert_allclose(video, alone.mean(1), rtol=1e-6)


def test_weights_that_a_file_holds_once_for_two_places_are_there(tmp_path: Path) -> None:
    tied = VqaScore(MetricContext(CPU, {"vqa": save_llava(tmp_path, tied=True)}))
    assert tied._model.lm_head.weight is tied._model.get_input_embeddings().weight


def test_a_folder_that_cannot_ask_is_one_sentence(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"metric vqa_score needs weights\.vqa, got nothing; .*huggingface"):
        VqaScore(MetricContext(CPU))
    with pytest.raises(UserError, match=r"cannot use weights\.vqa "):
        VqaScore(MetricContext(CPU, {"vqa": tmp_path}))
    with pytest.raises(UserError, match="must have a chat template, and a token for 'Yes'"):
        VqaScore(MetricContext(CPU, {"vqa": save_llava(tmp_path / "silent", template=None)}))
    other = [word if word != "Yes" else "Oui" for word in WORDS]
    with pytest.raises(UserError, match="must have a chat template, and a token for 'Yes'"):
        VqaScore(MetricContext(CPU, {"vqa": save_llava(tmp_path / "french", words=other)}))
