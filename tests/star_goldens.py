"""Builds our InfinityStar from a golden weights file and records what a generation computes, under the names of the traces."""

from functools import lru_cache

import numpy as np
import torch
from goldens import FOLDER, Job, read_meta
from torch import Tensor

from autoprune.backbones import Backbone, Sampling
from autoprune.backbones.infinitystar import InfinityStar, StarConfig
from autoprune.backbones.text import TextFeatures
from autoprune.backbones.video_tokenizer import VideoTokenizer, VideoTokenizerConfig
from autoprune.generation import Observer, Request
from autoprune.policy import Policy
from autoprune.pruning.plan import compile_plan
from autoprune.sampling import GeneratorStream, likeliest


def star_config(meta: dict) -> StarConfig:
    return StarConfig(
        width=meta["C"],
        heads=meta["H"],
        key_heads=meta["KV"],
        depth=meta["depth"],
        chunks=meta["chunks"],
        image_repetitions=tuple(meta["image_rep"]),
        video_repetitions=tuple(meta["video_rep"]),
        semantic_scales=meta["semantic_scales"],
        token_bits=meta["d"],
        semantic_bits=meta["sem"],
        text_width=meta["Ct5"],
        text_max_length=meta["text_maxlen"],
    )


@lru_cache(maxsize=4)
def backbone(weights: str) -> Backbone:
    """Builds the backbone of a weights file in float32."""
    archive, meta = np.load(FOLDER / f"{weights}.weights.npz"), read_meta(FOLDER / f"{weights}.trace.npz")["config"]
    state = {key: torch.from_numpy(archive[key]) for key in archive.files if key != "meta_json"}
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    model, tokenizer = InfinityStar(star_config(meta)), VideoTokenizer(tokenizer_config(meta), with_encoder=False)
    for module, prefix in ((model, "star."), (tokenizer, "vae.")):
        module.load_state_dict({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
        module.eval().requires_grad_(False)
    return Backbone("star", model, tokenizer, None, Sampling(frames=1), None)


def tokenizer_config(meta: dict) -> VideoTokenizerConfig:
    widths = tuple(meta.get("vae_ch", (4, 4, 8, 8, 8)))
    return VideoTokenizerConfig(meta["d"], meta["sem"], meta["detail_min"], widths, blocks=1)


def text_of(arrays: dict[str, np.ndarray], kind: str) -> TextFeatures | None:
    return TextFeatures.from_rows([torch.from_numpy(arrays[kind])]) if kind in arrays else None


def request_of(job: Job, arrays: dict[str, np.ndarray], policy: Policy | None = None) -> Request:
    """Turns a recorded job into a request; a cap on repetitions is a policy that leaves the others out."""
    record, schedule, model = job.record, job.schedule, backbone(job.weights).model
    course, count = model.course(schedule), len(schedule)
    fewer = {scale: max(0, course.times(scale) - record["max_repeat_times"]) for scale in range(count)}
    policy = policy or Policy("star", model.depth, schedule, fewer_repetitions=fewer)
    given = [arrays[f"gt_bits.r{step}"] for step in range(len(arrays)) if f"gt_bits.r{step}" in arrays]
    return Request(
        text=text_of(arrays, "text_kv_in"),
        negative=text_of(arrays, "neg_kv_in"),
        plan=compile_plan(policy, schedule, model.depth, course),
        draw=likeliest if record["greedy"] else GeneratorStream(torch.Generator().manual_seed(record["g_seed"]), top_p=0.0),
        guidance=(float(record["cfg"]),) * count,
        temperature=tuple(record["tau_list"]),
        projected=record["apg_norm_threshold"] if record["use_apg"] else None,
        given_bits=tuple(torch.from_numpy(bits).flatten(1, 3).long() for bits in given),
    )


class Recorder(Observer):
    """Collects what our run computes; `run` numbers the runs of scales, -1 while the text runs."""

    def __init__(self, model: InfinityStar) -> None:
        self.found: dict[str, Tensor] = {}
        self.keys: list[tuple[int, ...]] = []
        self.run = -1
        layers, save = model.layers(), self._save
        parts = {"logits_raw": model.head, "hidden": layers[-1]}
        for number in (0, len(layers) - 1):
            block = layers[number]
            parts |= {f"blk{number}.attn": block.attn, f"blk{number}.mlp": block.mlp, f"blk{number}.out": block}
        self.handles = [part.register_forward_hook(save(name)) for name, part in parts.items()]
        self.handles += [
            model.semantic_head2.register_forward_hook(save("logits_raw")),
            model.word_embed.register_forward_hook(save("tokens", inputs=True)),
            layers[0].register_forward_hook(self._text("text_in", 0)),
            layers[-1].register_forward_hook(self._text("text_out", None)),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def scale_started(self, scale) -> None:  # noqa: ANN001
        self.run += 1

    def scale_done(self, scale, logits: Tensor, bits: Tensor, latent: Tensor) -> None:  # noqa: ANN001
        self.found[f"logits_guided.r{self.run}"] = logits[0]
        self.found[f"summed.r{self.run}"] = scale.clip(latent)

    def _save(self, name: str, *, inputs: bool = False):  # noqa: ANN202
        def hook(module, given, output) -> None:  # noqa: ANN001
            if self.run >= 0:
                self.found[f"{name}.r{self.run}"] = given[0] if inputs else output

        return hook

    def _text(self, name: str, place: int | None):  # noqa: ANN202
        def hook(module, given, output) -> None:  # noqa: ANN001
            if self.run < 0:
                self.found[name] = output if place is None else given[place]

        return hook
