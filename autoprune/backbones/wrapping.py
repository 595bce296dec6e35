"""A backbone around a model that is loaded and running already: the authors' own objects, their tensors, no copy.

Recognised by the state dict, so the authors' package is never imported.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from autoprune.backbones.backbone import Backbone, Sampling
from autoprune.backbones.bsq_tokenizer import BSQTokenizer
from autoprune.backbones.checkpoints import looks_like
from autoprune.backbones.family import Features
from autoprune.backbones.infinity import Infinity
from autoprune.backbones.loading import share_weights
from autoprune.backbones.official import RELEASED
from autoprune.backbones.released import BLOCKS, TextEncoder
from autoprune.backbones.schedules import pixel_budget_schedules
from autoprune.backbones.sizes import tokenizer_config, tokenizer_state, transformer_config, transformer_state
from autoprune.backbones.t5_text import T5TextEncoder
from autoprune.backbones.var import VAR, VAR_SAMPLING, read_labels, state_without_masks
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
    """Returns a backbone that shares the parameters of the authors' `Infinity` (or `VAR`) instance and its tokenizer.

    `text` is a function from prompts to features, or the authors' pair (T5 tokenizer, T5 encoder); without it the backbone
    generates from features only. `pixel_budget` is their pn; sampling defaults to the released model's of these sizes.
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
    odd = [key for key, value in state.items() if not key.startswith(BLOCKS) and value.dtype in (torch.float16, torch.bfloat16)]
    if odd:
        raise UserError(
            f"text, embeddings and head must be in float32, as the authors load them, but {odd[0]} is "
            f"{str(state[odd[0]].dtype).removeprefix('torch.')}; convert the blocks alone."
        )
    config = transformer_config(state)
    with torch.device("meta"):
        ours = Infinity(config)
    share_weights(ours, transformer_state(dict(state), config=config), what="an Infinity transformer")
    known = [(name, spec) for name, spec in RELEASED.items() if spec.transformer == config]
    name = known[0][0] if known else f"infinity-{config.width}x{config.depth}"
    sampling = options[1] or (known[0][1].sampling if known else Sampling())
    tokenizer = _bsq(vae, config.token_bits)
    return Backbone(name, ours.eval(), tokenizer, encoder, sampling, pixel_budget_schedules(options[0]))


def _bsq(vae: nn.Module, token_bits: int) -> BSQTokenizer:
    state = vae.state_dict()
    with torch.device("meta"):
        probe = BSQTokenizer(tokenizer_config(state, token_bits=token_bits), with_encoder=_has_encoder(state))
    share_weights(probe, tokenizer_state(dict(state), expected=probe.state_dict()), what="an Infinity tokenizer")
    return probe.eval()


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
    name = next((name for name, spec in RELEASED.items() if spec.transformer == config), f"var-{config.width}x{config.depth}")
    reader = partial(read_labels, classes=config.classes) if encoder is _no_text else encoder
    return Backbone(name, ours.eval(), tokenizer.eval(), reader, options[1] or VAR_SAMPLING, config.schedule_for)


_WRAPPED = {"an Infinity transformer": _infinity, "a VAR transformer": _var}
