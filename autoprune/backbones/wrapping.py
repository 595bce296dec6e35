"""A backbone around a model that is loaded and running already: the authors' own objects, their tensors, no copy.

Recognised by the state dict (and what InfinityStar's object says of itself), so the authors' package is never imported.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from autoprune.backbones.backbone import Backbone, Sampling
from autoprune.backbones.bsq_tokenizer import BSQTokenizer
from autoprune.backbones.checkpoints import looks_like
from autoprune.backbones.family import Features
from autoprune.backbones.infinity import Infinity
from autoprune.backbones.infinitystar import InfinityStar
from autoprune.backbones.infinitystar import transformer_state as star_state
from autoprune.backbones.loading import share_weights
from autoprune.backbones.official import RELEASED, star_caption, star_sampling
from autoprune.backbones.released import BLOCKS, NETWORKS, BackboneSpec, TextEncoder
from autoprune.backbones.schedules import pixel_budget_schedules
from autoprune.backbones.sizes import tokenizer_config, tokenizer_state, transformer_config, transformer_state
from autoprune.backbones.star_schedules import video_schedules
from autoprune.backbones.star_sizes import attribute, star_config, video_tokenizer_config
from autoprune.backbones.t5_text import T5TextEncoder
from autoprune.backbones.var import VAR, VAR_SAMPLING, read_labels, state_without_masks
from autoprune.backbones.video_tokenizer import VideoTokenizer
from autoprune.backbones.vq_sizes import var_config, vq_config
from autoprune.backbones.vq_tokenizer import VQTokenizer
from autoprune.errors import UserError


def wrap(
    model: nn.Module,
    vae: nn.Module,
    *,
    text: TextEncoder | tuple[object, nn.Module] | None = None,
    pixel_budget: str = "1M",
    sampling: Sampling | None = None,
) -> Backbone:
    """Returns a backbone that shares the parameters of the authors' `Infinity` (of InfinityStar too) or `VAR` instance and
    its tokenizer.

    `text` is a function from prompts to features, or the authors' pair (T5 tokenizer, T5 encoder); without it the backbone
    generates from features only. `pixel_budget` is Infinity's pn; the others know their scales. Sampling defaults to the
    released model's of these sizes.
    The tokenizer keeps its precision and memory format, because others would need a copy; vae.decoder.to(dtype,
    memory_format=torch.channels_last) beforehand is the faster choice.
    Raises UserError for a model of no known family.
    """
    kind = looks_like(model.state_dict())
    if kind not in _WRAPPED:
        raise UserError(f"wrap takes {' or '.join(_WRAPPED)}, this is {kind}; pass the authors' model object.")
    return _WRAPPED[kind](model, vae, _encoder(text), (pixel_budget, sampling)).with_graphs().with_keys()


def _infinity(model: nn.Module, vae: nn.Module, encoder: TextEncoder, options: tuple[str, Sampling | None]) -> Backbone:
    state = model.state_dict()
    _check_precision(state, "text, embeddings and head", lowered=BLOCKS)
    config = transformer_config(state)
    with torch.device("meta"):
        ours = Infinity(config)
    share_weights(ours, transformer_state(dict(state), config=config), what="an Infinity transformer")
    name, spec = _released(config) or (f"infinity-{config.width}x{config.depth}", None)
    sampling = options[1] or (spec.sampling if spec else Sampling())
    tokenizer = _bsq(vae, config.token_bits)
    return Backbone(name, ours.eval(), tokenizer, encoder, sampling, pixel_budget_schedules(options[0]))


def _bsq(vae: nn.Module, token_bits: int) -> BSQTokenizer:
    state = vae.state_dict()
    with torch.device("meta"):
        probe = BSQTokenizer(tokenizer_config(state, token_bits=token_bits), with_encoder=_has_encoder(state))
    share_weights(probe, tokenizer_state(dict(state), expected=probe.state_dict()), what="an Infinity tokenizer")
    return probe.eval()


def _star(model: nn.Module, vae: nn.Module, encoder: TextEncoder, options: tuple[str, Sampling | None]) -> Backbone:
    state, vae_state = model.state_dict(), vae.state_dict()
    config = star_config(model, state)
    _check_precision(state, "text, embeddings and heads", lowered=BLOCKS)
    _check_precision(vae_state, "the tokenizer's projections and magnitudes", lowered=NETWORKS)
    places = attribute(model, "detail_scale_min_tokens")
    with torch.device("meta"):
        ours = InfinityStar(config)
        sizes = video_tokenizer_config(vae_state, detail_places=places)
        tokenizer = VideoTokenizer(sizes, with_encoder=_has_encoder(vae_state))
    share_weights(ours, star_state(state, config=config), what="an InfinityStar transformer")
    share_weights(tokenizer, vae_state, what="an InfinityStar tokenizer")
    scales = len(config.image_repetitions)
    name, _ = _released(config) or (f"infinitystar-{config.width}x{config.depth}", None)
    sampling, schedule_for = options[1] or star_sampling(scales), video_schedules(scales)
    return Backbone(name, ours.eval(), tokenizer.eval(), encoder, sampling, schedule_for, caption=star_caption)


def _released(config: object) -> tuple[str, BackboneSpec] | None:
    return next(((name, spec) for name, spec in RELEASED.items() if spec.transformer == config), None)


def _check_precision(state: Mapping[str, torch.Tensor], what: str, *, lowered: tuple[str, ...]) -> None:
    """Raises UserError unless all but the `lowered` tensors are in float32."""
    for key, value in state.items():
        if not key.startswith(lowered) and value.dtype in (torch.float16, torch.bfloat16):
            found, rest = str(value.dtype).removeprefix("torch."), " and ".join(name.rstrip(".") for name in lowered)
            raise UserError(f"{what} must be in float32, as the authors load them, but {key} is {found}; convert {rest} alone.")


def _has_encoder(state: dict[str, torch.Tensor]) -> bool:
    return any(key.startswith("encoder.") for key in state)


def _encoder(text: TextEncoder | tuple[object, nn.Module] | None) -> TextEncoder:
    if isinstance(text, tuple):
        return T5TextEncoder.around(*text)
    return text or _no_text


def _no_text(prompts: Sequence[str]) -> Features:
    raise UserError("this wrapped model has no text encoder; pass text=(tokenizer, encoder) or a function to wrap.")


def _var(model: nn.Module, vae: nn.Module, encoder: TextEncoder, options: tuple[str, Sampling | None]) -> Backbone:
    state = state_without_masks(model.state_dict())
    config, vae_state = var_config(state), vae.state_dict()
    with torch.device("meta"):
        ours = VAR(config)
        tokenizer = VQTokenizer(vq_config(vae_state), with_encoder=_has_encoder(vae_state))
    share_weights(ours, state, what="a VAR transformer")
    share_weights(tokenizer, vae_state, what="a VAR tokenizer")
    name, _ = _released(config) or (f"var-{config.width}x{config.depth}", None)
    reader = partial(read_labels, classes=config.classes) if encoder is _no_text else encoder
    return Backbone(name, ours.eval(), tokenizer.eval(), reader, options[1] or VAR_SAMPLING, config.schedule_for)


_WRAPPED = {"an Infinity transformer": _infinity, "an InfinityStar transformer": _star, "a VAR transformer": _var}
