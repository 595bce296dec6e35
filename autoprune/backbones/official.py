"""The released models: sizes, sampling defaults of their authors, and the files they come in."""

from dataclasses import replace
from functools import partial

from autoprune.backbones import hart, infinitystar
from autoprune.backbones.backbone import Sampling
from autoprune.backbones.bsq_tokenizer import BSQTokenizer, TokenizerConfig
from autoprune.backbones.context import RandomContext
from autoprune.backbones.hart import HART_0_7B, HART_SAMPLING, Hart, HartConfig
from autoprune.backbones.infinity import Infinity, TransformerConfig
from autoprune.backbones.infinitystar import STAR_8B_480P, STAR_8B_720P, InfinityStar, StarConfig
from autoprune.backbones.qwen_text import qwen_encoder
from autoprune.backbones.released import BackboneSpec, Family, ReleasedFiles
from autoprune.backbones.schedules import pixel_budget_schedules
from autoprune.backbones.sizes import tokenizer_state, transformer_state
from autoprune.backbones.star_schedules import FRAMES_PER_SECOND, video_schedules
from autoprune.backbones.t5_text import RandomTextEncoder, t5_encoder
from autoprune.backbones.var import (
    VAR,
    VAR_D16,
    VAR_D20,
    VAR_D24,
    VAR_D30,
    VAR_D36,
    VAR_SAMPLING,
    VARConfig,
    read_labels,
    state_without_masks,
)
from autoprune.backbones.video_tokenizer import VideoTokenizer, VideoTokenizerConfig
from autoprune.backbones.vq_tokenizer import VQConfig, VQTokenizer

INFINITY = Family(
    transformer=Infinity,
    tokenizer=BSQTokenizer,
    transformer_state=lambda config: partial(transformer_state, config=config),
    tokenizer_state=lambda model: partial(tokenizer_state, expected=model.state_dict()),
    text=lambda spec, folder, target, options: t5_encoder(folder, target, options),
    random_text=lambda spec, target: RandomTextEncoder(spec.transformer.text_width, device=target.device),
)
_INFINITY_SOURCE = "FoundationVision/Infinity on Hugging Face"
_T5 = ("flan-t5-xl", "flan-t5-xl-official", "text_encoder/flan-t5-xl-official", "text_encoder")
_LARGE = TransformerConfig(width=3584, heads=28, depth=40, chunks=8, token_bits=56)
_PATCHIFIED = TokenizerConfig(bits=14, channel_multipliers=(1, 2, 4, 4), patchify=True)
_PATCHIFIED_FILE = ("infinity_vae_d56_f8_14_patchify.pth",)

INFINITY_2B = BackboneSpec(
    family=INFINITY,
    transformer=TransformerConfig(width=2048, heads=16, depth=32, chunks=8, token_bits=32),
    tokenizer=TokenizerConfig(bits=32, channel_multipliers=(1, 2, 4, 4, 4)),
    sampling=Sampling(guidance=4.0, temperature=0.5, top_p=0.97),
    schedule_for=pixel_budget_schedules("1M"),
    files=ReleasedFiles(
        transformer=("infinity_2b_reg.pth",),
        tokenizer=("infinity_vae_d32reg.pth", "infinity_vae_d32_reg.pth"),
        source=_INFINITY_SOURCE,
        text=_T5,
    ),
)
INFINITY_8B = BackboneSpec(
    family=INFINITY,
    transformer=_LARGE,
    tokenizer=_PATCHIFIED,
    sampling=Sampling(guidance=3.0, temperature=1.0, top_p=0.97),
    schedule_for=pixel_budget_schedules("1M"),
    files=ReleasedFiles(("infinity_8b_weights",), _PATCHIFIED_FILE, _INFINITY_SOURCE, _T5),
)
INFINITY_8B_512 = BackboneSpec(
    family=INFINITY,
    transformer=_LARGE,
    tokenizer=_PATCHIFIED,
    sampling=Sampling(guidance=3.0, temperature=1.0, top_p=0.97),
    schedule_for=pixel_budget_schedules("0.25M"),
    files=ReleasedFiles(("infinity_8b_512x512_weights",), _PATCHIFIED_FILE, _INFINITY_SOURCE, _T5),
)
HART_FAMILY = Family(
    transformer=Hart,
    tokenizer=VQTokenizer,
    transformer_state=lambda config: hart.transformer_state,
    tokenizer_state=lambda model: hart.tokenizer_state,
    text=lambda spec, folder, target, options: qwen_encoder(folder, target, options, tokens=spec.transformer.context_tokens),
    random_text=lambda spec, target: RandomContext(
        spec.transformer.context_tokens, spec.transformer.context_width, device=target.device
    ),
    configured=lambda spec, fields: hart_sized(spec, HartConfig.from_fields(fields)),
)
STAR_FAMILY = Family(
    transformer=InfinityStar,
    tokenizer=VideoTokenizer,
    transformer_state=lambda config: partial(infinitystar.transformer_state, config=config),
    tokenizer_state=lambda model: dict,
    text=lambda spec, folder, target, options: t5_encoder(folder, target, options),
    random_text=lambda spec, target: RandomTextEncoder(spec.transformer.text_width, device=target.device),
)
VAR_FAMILY = Family(
    transformer=VAR,
    tokenizer=VQTokenizer,
    transformer_state=lambda config: state_without_masks,
    tokenizer_state=lambda model: dict,
    text=lambda spec, folder, target, options: read_labels,
    random_text=lambda spec, target: read_labels,
)


def hart_sized(spec: BackboneSpec, config: HartConfig) -> BackboneSpec:
    """Returns a spec with the sizes, scales and tokenizer rows of a configuration."""
    tokenizer = replace(spec.tokenizer, scales=len(config.sides))
    return replace(spec, transformer=config, tokenizer=tokenizer, schedule_for=config.schedule_for)


HART = BackboneSpec(
    family=HART_FAMILY,
    transformer=HART_0_7B,
    tokenizer=VQConfig(scales=len(HART_0_7B.sides), phi_at_last=False),
    sampling=HART_SAMPLING,
    schedule_for=HART_0_7B.schedule_for,
    files=ReleasedFiles(
        transformer=("llm/ema_model.bin", "llm"),
        tokenizer=("tokenizer",),
        source="mit-han-lab/hart-0.7b-1024px on Hugging Face",
        text=("Qwen2-VL-1.5B-Instruct", "text_model"),
        config="llm/config.json",
    ),
)


def _var(name: str, config: VARConfig) -> BackboneSpec:
    return BackboneSpec(
        family=VAR_FAMILY,
        transformer=config,
        tokenizer=VQConfig(),
        sampling=VAR_SAMPLING,
        schedule_for=config.schedule_for,
        files=ReleasedFiles((f"{name}.pth",), ("vae_ch160v4096z32.pth",), "FoundationVision/var on Hugging Face"),
    )


def star_caption(prompt: str, sampling: Sampling) -> str:
    """Returns a prompt as the released scripts of InfinityStar complete it: its seconds in front, none for an image
    (inferred).
    """
    seconds = ((sampling.frames or 1) - 1) // FRAMES_PER_SECOND
    head = f"<<<t={seconds}s>>>" if seconds else ""
    return f"{head}{prompt}, Close-up on big objects, emphasize scale and detail"


def star_sampling(scales: int) -> Sampling:
    """Returns the settings of the authors' scripts for clips of so many scales: five seconds of 9:16."""
    return Sampling(
        guidance=34.0,
        projected=0.05,
        temperature=(1.0,) * scales + (0.4,) * scales * _MOST_CLIPS,
        h_div_w=0.571,
        frames=5 * FRAMES_PER_SECOND + 1,
    )


def _star(config: StarConfig, folder: str, *, detail_places: int) -> BackboneSpec:
    scales = len(config.image_repetitions)
    return BackboneSpec(
        family=STAR_FAMILY,
        transformer=config,
        tokenizer=VideoTokenizerConfig(detail_places=detail_places),
        sampling=star_sampling(scales),
        schedule_for=video_schedules(scales),
        files=ReleasedFiles((folder,), ("infinitystar_videovae.pth",), "FoundationVision/InfinityStar on Hugging Face", _T5),
        caption=star_caption,
        frame_rate=FRAMES_PER_SECOND,
    )


_MOST_CLIPS = 12  # of five seconds each; the authors go to one at 720p, to two at 480p
_VAR_SIZES = {"var_d16": VAR_D16, "var_d20": VAR_D20, "var_d24": VAR_D24, "var_d30": VAR_D30, "var_d36": VAR_D36}
RELEASED = {"infinity2b": INFINITY_2B, "infinity8b": INFINITY_8B, "infinity8b_512": INFINITY_8B_512}
RELEASED["hart"] = HART
RELEASED["infinitystar_480p"] = _star(STAR_8B_480P, "infinitystar_8b_480p_weights", detail_places=350)
RELEASED["infinitystar_720p"] = _star(STAR_8B_720P, "infinitystar_8b_720p_weights", detail_places=750)
RELEASED |= {name: _var(name, config) for name, config in _VAR_SIZES.items()}
