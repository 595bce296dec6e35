"""Builds our HART from a golden weights file and records what a generation computes, under the names of the traces."""

from functools import lru_cache

import numpy as np
import torch
from goldens import FOLDER, Job, read_meta
from torch import Tensor

from autoprune.backbones import Backbone, Sampling
from autoprune.backbones.context import ContextFeatures, RandomContext
from autoprune.backbones.hart import HART_SAMPLING, Hart, HartConfig, tokenizer_state, transformer_state
from autoprune.backbones.vq_tokenizer import VQConfig, VQTokenizer
from autoprune.generation import Observer, Request
from autoprune.pruning.plan import compile_plan
from autoprune.sampling import likeliest


def backbone_of(config: HartConfig, vae: VQConfig, state: dict[str, Tensor]) -> Backbone:
    """A float32 backbone for inference; `state` has keys hart.* and vae.*, none for random weights."""
    model = Hart(config)
    tokenizer = VQTokenizer(vae, with_encoder=any(key.startswith("vae.encoder.") for key in state))
    if state:
        masks = {"lvl_1L": torch.zeros(1, 9), "attn_bias_for_masking": torch.zeros(1, 1, 9, 9)}
        own = {key.removeprefix("hart."): value for key, value in state.items() if key.startswith("hart.")}
        model.load_state_dict(transformer_state(masks | own))
        tokenizer.load_state_dict(tokenizer_state(state | {"disc.weight": torch.zeros(1)}))
    for module in (model, tokenizer):
        module.eval().requires_grad_(False)
    text = RandomContext(config.context_tokens, config.context_width, device=torch.device("cpu"))
    return Backbone("hart", model, tokenizer, text, HART_SAMPLING, config.schedule_for)


@lru_cache(maxsize=4)
def backbone(weights: str) -> Backbone:
    """Builds the backbone of a weights file, every size read off its tensors but scales, heads and tokenizer levels."""
    archive = np.load(FOLDER / f"{weights}.weights.npz")
    state = {key: torch.from_numpy(archive[key]) for key in archive.files if key.startswith(("hart.", "vae."))}
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    meta = read_meta(FOLDER / f"{weights}.trace.npz")["config"]
    return backbone_of(_transformer_config(meta, state), _tokenizer_config(meta["vae_ch_mult"], state), state)


def features_of(arrays: dict[str, np.ndarray]) -> ContextFeatures:
    """Reads the recorded context."""
    positions = torch.from_numpy(arrays["context_position_ids"].astype(np.int64))
    return ContextFeatures(torch.from_numpy(arrays["context"]), positions)


def request_of(job: Job, arrays: dict[str, np.ndarray]) -> Request:
    """Turns a recorded job into a request that draws the likeliest codes."""
    loaded, features = backbone(job.weights), features_of(arrays)
    schedule = loaded.scale_schedule()
    return Request(
        text=features,
        plan=compile_plan(None, schedule, loaded.depth),
        draw=likeliest,
        guidance=Sampling(guidance=job.record["cfg"], ramp=True, held_end=True).guidance_for(len(schedule)),
        temperature=(1.0,) * len(schedule),
        samples=tuple(range(len(features))),
    )


class RecordedNoise:
    """The noise of a trace in place of addressed noise: rows [cond, uncond] of all tokens, the first half counts."""

    def __init__(self, noise: np.ndarray, batch: int) -> None:
        self.noise, self.batch = torch.from_numpy(noise), batch

    def __call__(self, step: int, shape: tuple[int, ...]) -> Tensor:
        rows = self.noise[step]
        return rows[: len(rows) // 2].view(self.batch, *shape)


class Recorder(Observer):
    """Collects what our run computes, under the names of the trace; hidden states and latents of every scale in full."""

    def __init__(self, loaded: Backbone) -> None:
        self.loaded, self.scale, self.found = loaded, 0, {}
        layers = loaded.model.layers()
        self.handles = [
            layers[0].register_forward_hook(lambda module, inputs, output: self._save("x_in", inputs[0])),
            layers[-1].register_forward_hook(self._last_block),
            loaded.model.decoder_norm.register_forward_hook(
                lambda module, inputs, output: self.found.update(diff_z=output.flatten(0, 1))
            ),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def scale_started(self, scale) -> None:  # noqa: ANN001
        self.scale = scale.index

    def scale_done(self, scale, logits: Tensor, bits: Tensor, latent: Tensor) -> None:  # noqa: ANN001
        self._save("logits_cfg", logits)
        self._save("idx", bits)
        self._save("f_hat", latent)

    def _last_block(self, module, inputs, output: Tensor) -> None:  # noqa: ANN001
        self._save("hidden", output)
        self._save("logits_raw", self.loaded.model.logits(output, inputs[3]))

    def _save(self, name: str, value: Tensor) -> None:
        self.found[f"{name}.s{self.scale}"] = value


def _transformer_config(meta: dict, state: dict[str, Tensor]) -> HartConfig:
    width, context_width = state["hart.context_embed.weight"].shape
    network = "hart.diffloss.net."
    return HartConfig(
        width=width,
        heads=meta["H"],
        depth=len({key.split(".")[2] for key in state if key.startswith("hart.blocks.")}),
        sides=tuple(meta["patch_nums"]),
        context_tokens=meta["ctx"],
        context_width=context_width,
        vocabulary=len(state["hart.head.weight"]),
        channels=state["hart.word_embed.weight"].shape[1],
        normed_attention="hart.blocks.0.attn.scale_mul_1H11" in state,
        normed_context="hart.context_norm.weight" in state,
        numbered_levels="hart.lvl_embed.mlp.0.weight" in state,
        diffusion_width=len(state[f"{network}input_proj.weight"]),
        diffusion_depth=len({key.split(".")[4] for key in state if key.startswith(f"{network}res_blocks.")}),
    )


def _tokenizer_config(multipliers: list[int], state: dict[str, Tensor]) -> VQConfig:
    vocabulary, channels = state["vae.quantize.embedding.weight"].shape
    return VQConfig(
        vocabulary=vocabulary,
        channels=channels,
        base=len(state["vae.decoder.norm_out.weight"]) // multipliers[0],
        channel_multipliers=tuple(multipliers),
        blocks=len({key.split(".")[5] for key in state if key.startswith("vae.decoder.up.0.block.")}) - 1,
        scales=len(state["vae.quantize.ema_vocab_hit_SV"]),
        phi_at_last=False,
    )
