"""Wrapping a stand-in that has nothing in common with our classes but the official state dict."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_star
import torch
from torch import Tensor, nn

import autoprune
from autoprune.backbones.bsq_tokenizer import BSQTokenizer, TokenizerConfig
from autoprune.backbones.infinity import Infinity, TransformerConfig
from autoprune.backbones.infinitystar import InfinityStar, StarConfig
from autoprune.backbones.official import RELEASED
from autoprune.backbones.text import TextFeatures
from autoprune.backbones.var import VAR, VARConfig
from autoprune.backbones.video_tokenizer import VideoTokenizer
from autoprune.backbones.vq_tokenizer import VQConfig, VQTokenizer
from autoprune.errors import UserError
from autoprune.generation import generate
from autoprune.policy import BranchRule, Policy

CONFIG = TransformerConfig(width=64, heads=2, depth=4, chunks=2, token_bits=16, text_width=128, text_max_length=16)
TOKENIZER = TokenizerConfig(
    bits=4, base=32, channel_multipliers=(1, 1, 1, 2), encoder_blocks=1, decoder_blocks=2, patchify=True
)


class Authors(nn.Module):
    """A tree of bare modules with the tensors of a state dict, as another package's class would hold them."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for key, value in state.items():
            module = self
            *path, name = key.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            if value.is_floating_point() and "zero" not in name:
                module.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))
            else:
                module.register_buffer(name, value.clone())
        if hasattr(self, "quantizer"):
            self.quantize = self.quantizer  # the authors' alias


def features(prompts: list[str]) -> TextFeatures:
    rows = [torch.randn(3 + len(prompt) % 5, 128, generator=torch.Generator().manual_seed(len(prompt))) for prompt in prompts]
    return TextFeatures.from_rows(rows)


@pytest.fixture(scope="module")
def authors() -> tuple[Authors, Authors]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Authors(Infinity(CONFIG).state_dict()), Authors(BSQTokenizer(TOKENIZER).state_dict())


def test_every_tensor_is_the_authors_own(authors: tuple[Authors, Authors]) -> None:
    backbone = autoprune.wrap(*authors, text=features, pixel_budget="0.06M")
    for ours, theirs in ((backbone.model, authors[0]), (backbone.tokenizer, authors[1])):
        pointers = {key: value.data_ptr() for key, value in theirs.state_dict().items()}
        assert {key: value.data_ptr() for key, value in ours.state_dict().items()} == pointers
    assert backbone.model.config == CONFIG and backbone.tokenizer.config == TOKENIZER
    own = sum(value.nbytes for value in backbone.model.buffers() if value.data_ptr() not in pointers.values())
    total = sum(value.nbytes for value in authors[0].state_dict().values())
    assert own < 0.01 * total or {value.data_ptr() for value in backbone.model.buffers()} <= {
        value.data_ptr() for value in authors[0].state_dict().values()
    }


def test_a_wrapped_model_generates_what_a_loaded_one_does(authors: tuple[Authors, Authors]) -> None:
    backbone = autoprune.wrap(*authors, text=features, pixel_budget="0.06M")
    loaded = Infinity(CONFIG)
    loaded.load_state_dict(authors[0].state_dict())
    policy = Policy(backbone.name, 4, backbone.scale_schedule(), guidance=BranchRule("cond", 5), skip_last=1)
    ours = generate(backbone, ["a", "a cat"], policy=policy, seed=4)
    assert torch.equal(ours, generate(replace(backbone, model=loaded.eval()), ["a", "a cat"], policy=policy, seed=4))


def test_a_change_of_the_authors_weights_is_seen(authors: tuple[Authors, Authors]) -> None:
    backbone = autoprune.wrap(*authors, text=features, pixel_budget="0.06M")
    before = authors[0].pos_start.detach().clone()
    with torch.no_grad():
        authors[0].pos_start.add_(1)
    assert torch.equal(backbone.model.pos_start, before + 1)
    with torch.no_grad():
        authors[0].pos_start.copy_(before)


def test_what_cannot_be_wrapped_is_said_in_a_sentence(authors: tuple[Authors, Authors]) -> None:
    with pytest.raises(UserError, match="wrap takes .*, this is an Infinity tokenizer; pass the authors' model object"):
        autoprune.wrap(authors[1], authors[1])
    incomplete = {key: value for key, value in authors[0].state_dict().items() if "ffn" not in key}
    with pytest.raises(UserError, match="keys are missing, first block_chunks.0.module.0.ffn"):
        autoprune.wrap(Authors(incomplete), authors[1])
    half = Authors({key: value.half() for key, value in authors[0].state_dict().items()})
    with pytest.raises(UserError, match="must be in float32, as the authors load them, but cfg_uncond is float16"):
        autoprune.wrap(half, authors[1])
    with pytest.raises(UserError, match="no text encoder"):
        generate(autoprune.wrap(*authors, pixel_budget="0.06M"), ["a cat"])


def test_a_var_model_is_wrapped_too() -> None:
    config = VARConfig(width=64, heads=2, depth=2)
    vae = VQTokenizer(
        VQConfig(vocabulary=4096, channels=32, base=32, channel_multipliers=(1, 1, 2), blocks=1), with_encoder=False
    )
    masks = {"lvl_1L": torch.zeros(1, 680).long(), "attn_bias_for_masking": torch.zeros(1, 1, 680, 680)}
    authors = Authors(VAR(config).state_dict() | masks), Authors(vae.state_dict())
    backbone = autoprune.wrap(*authors)
    assert backbone.model.config == config and backbone.scale_schedule() == config.schedule
    assert backbone.model.word_embed.weight.data_ptr() == authors[0].word_embed.weight.data_ptr()
    images = generate(backbone, ["7"], policy=Policy(backbone.name, 2, config.schedule, skip_last=1))
    assert images.shape == (1, 3, 64, 64) and images.isfinite().all()


def star_authors(config: StarConfig, tokenizer: VideoTokenizer) -> tuple[Authors, Authors]:
    """The authors' objects with the attributes that their class sets."""
    model = Authors(InfinityStar(config).state_dict())
    model.image_scale_repetition, model.video_scale_repetition = list(config.image_repetitions), list(config.video_repetitions)
    model.text_maxlen, model.detail_scale_min_tokens = config.text_max_length, tokenizer.config.detail_places
    model.other_args = SimpleNamespace(
        semantic_scales=config.semantic_scales, dynamic_scale_schedule="infinity_elegant_clip20frames_v2"
    )
    return model, Authors(tokenizer.state_dict())


@pytest.fixture
def star() -> tuple[Authors, Authors]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return star_authors(tiny_star.TRANSFORMER, VideoTokenizer(tiny_star.TOKENIZER))


def test_a_wrapped_infinitystar_shares_every_tensor_and_generates_what_a_loaded_one_does(star: tuple[Authors, Authors]) -> None:
    said = []

    def text(prompts: list[str]) -> TextFeatures:
        said.extend(prompts)
        return TextFeatures.from_rows([row[:, :32] for row in features(prompts).values])

    wrapped = autoprune.wrap(*star, text=text)
    for ours, theirs in ((wrapped.model, star[0]), (wrapped.tokenizer, star[1])):
        pointers = {key: value.data_ptr() for key, value in theirs.state_dict().items()}
        assert {key: value.data_ptr() for key, value in ours.state_dict().items()} == pointers
    assert wrapped.model.config == tiny_star.TRANSFORMER and wrapped.tokenizer.config == tiny_star.TOKENIZER
    assert wrapped.sampling.frames == 81 and wrapped.sampling.guidance == 34.0 and wrapped.sampling.projected == 0.05
    backbone = wrapped.sampled(frames=17)
    assert backbone.scale_schedule() == tiny_star.star().scale_schedule()
    model, tokenizer = InfinityStar(tiny_star.TRANSFORMER), VideoTokenizer(tiny_star.TOKENIZER)
    model.load_state_dict(star[0].state_dict())
    tokenizer.load_state_dict(star[1].state_dict())
    policy = Policy(backbone.name, 4, backbone.scale_schedule(), guidance=BranchRule("cond", 8), fewer_repetitions={7: 1})
    ours = generate(backbone, ["a cat"], policy=policy, seed=4)
    loaded = replace(backbone, model=model.eval(), tokenizer=tokenizer.eval())
    assert torch.equal(ours, generate(loaded, ["a cat"], policy=policy, seed=4)) and ours.shape == (1, 3, 17, 64, 112)
    assert said[0] == "<<<t=1s>>>a cat, Close-up on big objects, emphasize scale and detail"
    with torch.no_grad():
        star[0].head.bias.add_(1)
    assert torch.equal(backbone.model.head.bias, star[0].head.bias)


@pytest.mark.parametrize("name", ["infinitystar_480p", "infinitystar_720p"])
def test_a_released_size_is_known_by_its_name_and_runs_its_policies(name: str) -> None:
    spec = RELEASED[name]
    with torch.device("meta"):
        authors = star_authors(spec.transformer, VideoTokenizer(spec.tokenizer))
        backbone = autoprune.wrap(*authors)
    assert (backbone.name, backbone.sampling, backbone.tokenizer.config) == (name, spec.sampling, spec.tokenizer)
    assert backbone.scale_schedule() == spec.schedule_for(spec.sampling.h_div_w, spec.sampling.frames)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda model, vae: delattr(model, "video_scale_repetition"), "must have video_scale_repetition, this one has none"),
        (lambda model, vae: delattr(model.other_args, "semantic_scales"), "must have other_args.semantic_scales, this one"),
        (lambda model, vae: setattr(model.other_args, "dynamic_scale_schedule", "infinity_star_interact"), "this one runs inf"),
        (lambda model, vae: model.image_scale_repetition.pop(), "as many scales, 1 to 15, got 4 and 5"),
        (lambda model, vae: delattr(model, "semantic_head2"), "must have semantic_head2.weight, this one has none"),
        (lambda model, vae: delattr(vae, "proj_down"), "2 keys are missing, first proj_down"),
        (lambda model, vae: delattr(vae, "decoder"), "must have decoder.conv_out.conv.weight, this one has none"),
        (lambda model, vae: model.head.half(), "heads must be in float32, .* but head.weight is float16; convert block_chunks"),
        (lambda model, vae: vae.bfloat16(), "must be in float32, .* is bfloat16; convert encoder and decoder alone"),
    ],
)
def test_an_infinitystar_that_cannot_be_wrapped_is_one_sentence(
    star: tuple[Authors, Authors], change: Callable[..., object], sentence: str
) -> None:
    change(*star)
    with pytest.raises(UserError, match=sentence):
        autoprune.wrap(*star)
