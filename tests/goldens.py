"""Reads traces of the official code: which files there are, their weights, and our model built to their sizes."""

import json
import os
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoprune.backbones import Backbone, Sampling
from autoprune.backbones.bsq_tokenizer import BSQTokenizer
from autoprune.backbones.infinity import Infinity
from autoprune.backbones.schedules import scale_schedule
from autoprune.backbones.sizes import tokenizer_config, transformer_config
from autoprune.backbones.text import TextFeatures
from autoprune.generation import Observer, Request
from autoprune.policy import Policy
from autoprune.pruning.plan import compile_plan
from autoprune.sampling import GeneratorStream, likeliest

FOLDER = Path(os.environ.get("AUTOPRUNE_GOLDENS", Path(__file__).parent / "data" / "goldens"))


@dataclass(frozen=True)
class Job:
    """One recorded generation: `record` is its settings, `arrays` what was recorded under its name."""

    trace: str
    name: str
    record: dict
    config: dict
    weights: str

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        prefix = self.name + "/"
        archive = np.load(FOLDER / f"{self.trace}.trace.npz")
        return {key.removeprefix(prefix): archive[key] for key in archive.files if key.startswith(prefix)}

    @property
    def schedule(self) -> tuple[tuple[int, int, int], ...]:
        recorded = self.record.get("schedule")
        if recorded is None:
            return scale_schedule(self.record["h_div_w"], self.record["pn"])
        return tuple(tuple(grid) for grid in recorded)


def jobs(prefix: str) -> list[Job]:
    """Lists the jobs of every trace file of the folder that starts with `prefix`."""
    found = []
    for path in sorted(FOLDER.glob(f"{prefix}*.trace.npz")):
        trace = path.name.removesuffix(".trace.npz")
        meta = read_meta(path)
        found += [Job(trace, name, record, meta["config"], meta.get("weights", trace)) for name, record in meta["jobs"].items()]
    return found


def read_meta(path: Path) -> dict:
    return json.loads(bytes(np.load(path)["meta_json"]).decode())


@lru_cache(maxsize=4)
def backbone(weights: str) -> Backbone:
    """Builds the backbone of a weights file in float32, with the text taken from the trace."""
    archive = np.load(FOLDER / f"{weights}.weights.npz")
    config = read_meta(FOLDER / f"{weights}.trace.npz")["config"]
    state = {key: torch.from_numpy(archive[key]) for key in archive.files if key != "meta_json"}
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    model = Infinity(transformer_config(_part(state, "infinity.")))
    model.load_state_dict(_part(state, "infinity."))
    with_encoder = any(key.startswith("vae.encoder.") for key in state)
    tokenizer = BSQTokenizer(
        tokenizer_config(_part(state, "vae."), token_bits=model.config.token_bits), with_encoder=with_encoder
    )
    tokenizer.load_state_dict(_part(state, "vae."))
    for part in (model, tokenizer):
        part.eval().requires_grad_(False)
    return Backbone(
        "golden",
        model,
        tokenizer,
        text_encoder=None,
        sampling=Sampling(),
        schedule_for=partial(scale_schedule, pixel_budget=config["pn"]),
    )


def text_of(arrays: dict[str, np.ndarray], kind: str = "text") -> TextFeatures | None:
    """Reads the given text features, `kind` text or neg."""
    if f"{kind}_kv_in" not in arrays:
        return None
    rows = torch.from_numpy(arrays[f"{kind}_kv_in"]).split(arrays[f"{kind}_lens"].tolist())
    return TextFeatures.from_rows(list(rows))


def unpack_bits(packed: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """Undoes np.packbits over the flattened trailing axes: [B, bytes] -> [B, *shape]."""
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(packed, axis=-1)[:, :count].astype(np.int64)).view(-1, *shape)


def request_of(job: Job, arrays: dict[str, np.ndarray], *, policy: Policy | None = None) -> Request:
    """Turns a recorded job into a request."""
    record, schedule = job.record, job.schedule
    model = backbone(job.weights).model
    count = len(schedule)
    greedy = record["top_k"] == 1
    stream = GeneratorStream(torch.Generator().manual_seed(record.get("g_seed", 0)), record.get("top_p", 0.0))
    features = text_of(arrays)
    leak = range(record.get("gt_leak", 0))
    return Request(
        text=features,
        negative=text_of(arrays, "neg"),
        plan=compile_plan(policy, schedule, model.config.depth),
        draw=likeliest if greedy else stream,
        guidance=tuple(record.get("cfg_list") or [record["cfg"]] * count),
        temperature=tuple(record.get("tau_list") or [record["tau"]] * count),
        guidance_layers=tuple(record.get("cfg_insertion_layer", (0,))),
        given_bits=tuple(_token_bits(arrays[f"gt_bits.s{scale}"], schedule[scale]) for scale in leak),
        samples=tuple(range(len(features.lengths))),
    )


class Recorder(Observer):
    """Collects what our run computes, under the names of the trace."""

    def __init__(self, model: Infinity) -> None:
        self.found: dict[str, Tensor] = {}
        self.kept_sets: dict[int, list[Tensor]] = {}
        self.scale = 0
        layers = model.layers()
        self.handles = [
            model.text_norm.register_forward_hook(self._save("text_norm_out")),
            model.text_proj_for_sos.register_forward_hook(self._save("cond_BD")),
            model.text_proj_for_ca.register_forward_hook(self._save("text_kv")),
            model.shared_ada_lin.register_forward_hook(self._save("ada6")),
            model.word_embed.register_forward_hook(self._save_input("tokens.s")),
            model.head.register_forward_hook(self._save("logits_raw.s")),
            layers[0].register_forward_hook(self._save_input("x_in.s")),
            layers[-1].register_forward_hook(self._save("hidden.s")),
        ]
        for index in (0, len(layers) - 1):
            block = layers[index]
            self.handles.append(block.register_forward_hook(self._save(f"blk{index}.out.s")))
            for name in ("sa", "ca", "ffn"):
                self.handles.append(getattr(block, name).register_forward_hook(self._save(f"blk{index}.{name}.s")))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def watching(self, request: Request) -> Request:
        """Records what is drawn (given bits replace it afterwards)."""

        def draw(logits: Tensor, scale: int) -> Tensor:
            self.found[f"bits.s{scale}"] = request.draw(logits, scale)
            return self.found[f"bits.s{scale}"]

        return replace(request, draw=draw)

    def scale_started(self, scale) -> None:
        self.scale = scale.index

    def kept(self, scale: int, site: int, index: Tensor) -> None:
        self.kept_sets.setdefault(scale, []).append(index)

    def scale_done(self, scale, logits: Tensor, bits: Tensor, latent: Tensor) -> None:
        self.found[f"logits_cfg.s{scale.index}"] = logits
        self.found[f"summed.s{scale.index}"] = latent[:, :, None]
        self.found[f"min_gap.s{scale.index}"] = (logits[..., 1] - logits[..., 0]).abs().min()[None]

    def _save(self, name: str):
        def hook(module, inputs, output) -> None:
            self.found[self._key(name)] = output

        return hook

    def _save_input(self, name: str):
        def hook(module, inputs, output) -> None:
            self.found[self._key(name)] = inputs[0]

        return hook

    def _key(self, name: str) -> str:
        return name + str(self.scale) if name.endswith(".s") else name


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _token_bits(bits: np.ndarray, grid: tuple[int, int, int]) -> Tensor:
    """VAE-space bits (B, 1, H, W, d) -> the transformer's [B, N, token bits] (patchify folds 2x2 cells)."""
    planes = torch.from_numpy(bits)[:, 0].permute(0, 3, 1, 2).float()
    folded = torch.nn.functional.pixel_unshuffle(planes, planes.shape[-1] // grid[2])
    return folded.flatten(2).transpose(1, 2).long()
