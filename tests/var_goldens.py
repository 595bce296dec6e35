"""Builds our VAR from a golden weights file and records what a generation computes, under the names of the traces."""

from functools import lru_cache

import numpy as np
import torch
from goldens import FOLDER, Job, read_meta
from torch import Tensor

from autoprune.backbones import Backbone, Sampling
from autoprune.backbones.var import VAR, VAR_SAMPLING, ClassLabels, VARConfig, read_labels, state_without_masks
from autoprune.backbones.vq_tokenizer import VQConfig, VQTokenizer
from autoprune.generation import Observer, Request
from autoprune.pruning.plan import compile_plan
from autoprune.sampling import GeneratorStream, likeliest

TORCH_OF_TRACES = "2.13"


def backbone_of(config: VARConfig, vae: VQConfig, state: dict[str, Tensor]) -> Backbone:
    """A float32 backbone for inference; `state` has keys var.* and vae.*, none for random weights."""
    model = VAR(config)
    tokenizer = VQTokenizer(vae, with_encoder=any(key.startswith("vae.encoder.") for key in state))
    if state:
        model.load_state_dict(state_without_masks(part(state, "var.")))
        tokenizer.load_state_dict(part(state, "vae."))
    for module in (model, tokenizer):
        module.eval().requires_grad_(False)
    return Backbone("golden", model, tokenizer, read_labels, VAR_SAMPLING, config.schedule_for)


@lru_cache(maxsize=4)
def backbone(weights: str) -> Backbone:
    """Builds the backbone of a weights file, every size read off its tensors but the scales."""
    archive = np.load(FOLDER / f"{weights}.weights.npz")
    state = {key: torch.from_numpy(archive[key]) for key in archive.files if key.startswith(("var.", "vae."))}
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    meta = read_meta(FOLDER / f"{weights}.trace.npz")["config"]
    assert meta.get("attn_l2_norm", True), "released models normalise queries and keys"
    return backbone_of(_transformer_config(meta["patch_nums"], state), _tokenizer_config(meta["vae_ch_mult"], state), state)


def request_of(job: Job, arrays: dict[str, np.ndarray]) -> Request:
    """Turns a recorded job into a request. Away from the traces' torch version its random numbers do not repeat: given."""
    record, loaded = job.record, backbone(job.weights)
    schedule = loaded.scale_schedule()
    labels = torch.from_numpy(arrays["label"].astype(np.int64))
    greedy = record["top_k"] == 1
    stream = GeneratorStream(torch.Generator().manual_seed(record.get("g_seed", 0)), record["top_p"], record["top_k"])
    portable = greedy or torch.__version__.startswith(TORCH_OF_TRACES)
    given = [] if portable else [arrays[f"idx.s{scale}"].astype(np.int64) for scale in range(len(schedule))]
    return Request(
        text=ClassLabels(labels),
        plan=compile_plan(None, schedule, loaded.depth),
        draw=likeliest if greedy else stream,
        guidance=Sampling(guidance=record["cfg"], ramp=True).guidance_for(len(schedule)),
        temperature=(1.0,) * len(schedule),
        given_bits=tuple(torch.from_numpy(numbers) for numbers in given),
        samples=tuple(range(len(labels))),
    )


class Recorder(Observer):
    """Collects what our run computes, under the names of the trace. Both halves pass the head, guided or not."""

    def __init__(self, loaded: Backbone) -> None:
        self.loaded, self.scale, self.found = loaded, 0, {}
        layers = loaded.model.layers()
        self.handles = [
            layers[0].register_forward_hook(lambda module, inputs, output: self._save("x_in", inputs[0])),
            layers[-1].register_forward_hook(
                lambda module, inputs, output: self._save("logits_raw", loaded.model.logits(output, inputs[3]))
            ),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def scale_started(self, scale) -> None:  # noqa: ANN001
        self.scale, self.schedule = scale.index, self.loaded.scale_schedule()

    def scale_done(self, scale, logits: Tensor, bits: Tensor, latent: Tensor) -> None:  # noqa: ANN001
        self._save("logits_cfg", logits)
        self._save("idx", bits)
        self._save("f_hat", latent)
        if scale.index + 1 < len(self.schedule):
            grid = self.schedule[scale.index + 1]
            tokens = self.loaded.tokenizer.next_tokens(latent, grid)
            self._save("next_token_map", tokens.transpose(1, 2).unflatten(2, grid[1:]))

    def _save(self, name: str, value: Tensor) -> None:
        self.found[f"{name}.s{self.scale}"] = value


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _transformer_config(sides: list[int], state: dict[str, Tensor]) -> VARConfig:
    classes, width = state["var.class_emb.weight"].shape
    return VARConfig(
        width=width,
        heads=state["var.blocks.0.attn.scale_mul_1H11"].shape[1],
        depth=len({key.split(".")[2] for key in state if key.startswith("var.blocks.")}),
        sides=tuple(sides),
        shared_aln="var.blocks.0.ada_gss" in state,
        classes=classes - 1,
        channels=state["var.word_embed.weight"].shape[1],
        vocabulary=len(state["var.head.weight"]),
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
    )
