"""Train the embedded model's tokenizer on rendered scenes: `python -m autoprune.testbed.train_tokenizer`.

Encoder, quantiser and decoder learn together (straight-through over the whole sum of scales); in the last part of
the time the encoder rests and the decoder learns alone, also from codes with a few bits turned over.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoprune.errors import unknown_name
from autoprune.files import whole_file
from autoprune.testbed.convolution_optimiser import ConvolutionOptimiser
from autoprune.testbed.distributed import Team, run_team
from autoprune.testbed.image_store import open_images
from autoprune.testbed.precision import mixed
from autoprune.testbed.reconstruction import Reconstruction, reconstruct, reconstruction_psnr
from autoprune.testbed.worlds import IMAGES, WORLDS, World

VALIDATION_SEED_OFFSET = 1_000_003
VALIDATION_IMAGES = 96
REPORT_SECONDS = 15.0
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, recorded in the checkpoint."""

    config: object = IMAGES.config
    minutes: float = 18.0
    images: int = 30_000
    batch: int = 12
    steps: int | None = None
    learning_rate: float = 1.5e-3
    matrix_learning_rate: float = 4e-3
    weight_decay: float = 1e-3
    warmup_steps: int = 50
    encoder_share: float = 0.75
    flip_rate: float = 0.05
    average_decay: float = 0.998
    magnitude_decay: float = 0.02
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """A recipe and where it runs."""

    recipe: Recipe
    out: Path
    cache: Path
    resume: bool
    device: str
    world: World = IMAGES


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default=IMAGES.name)
    parser.add_argument("--out", type=Path, default=Path("outputs/training/tokenizer.safetensors"))
    parser.add_argument("--cache", type=Path, default=Path("outputs/training/images"), help="folder of the renders")
    parser.add_argument("--minutes", type=float, default=Recipe.minutes, help="training time after rendering")
    parser.add_argument("--steps", type=int, help="updates instead of minutes, to compare variants")
    parser.add_argument("--matrix-learning-rate", type=float, default=Recipe.matrix_learning_rate)
    parser.add_argument("--images", type=int, default=Recipe.images)
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="images per step, all processes together")
    parser.add_argument("--processes", type=int, default=2, help="single-thread processes; 1 with a GPU")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--config", type=json.loads, default="{}", help="fields of its configuration to change, as JSON")
    parser.add_argument("--resume", action="store_true", help="continue from the .state file beside --out")
    parser.add_argument("--smoke", action="store_true", help="one minute, 1000 images: does it still learn?")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.minutes, options.images = min(options.minutes, 1.0), min(options.images, 1000)
    world = WORLDS[options.world]
    names = [field.name for field in fields(world.config)]
    for name in options.config:
        if name not in names:
            parser.error(str(unknown_name("tokenizer field", name, names)))
    recipe = Recipe(
        config=replace(world.config, **options.config),
        minutes=options.minutes,
        steps=options.steps,
        matrix_learning_rate=options.matrix_learning_rate,
        images=options.images,
        batch=options.batch,
        seed=options.seed,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(recipe, options.out, options.cache, options.resume, device, world)
    run_team(train, run, processes=1 if device == "cuda" else options.processes)


def train(team: Team, run: Run) -> None:
    """Work of one process."""
    run.out.parent.mkdir(parents=True, exist_ok=True)
    images = open_images(run.cache, run.recipe.images, seed=run.recipe.seed, team=team, world=run.world)
    held_out_seed = run.recipe.seed + VALIDATION_SEED_OFFSET
    held_out = open_images(run.cache, VALIDATION_IMAGES, seed=held_out_seed, team=team, world=run.world)
    session = _Session(team, run)
    while session.progress < 1:
        batch = _batch(images, session, team)
        losses = session.step(batch)
        if team.leads:
            session.report(losses, held_out)
    if team.leads:
        session.save(run.out, held_out)


class _Session:
    """Model, averaged model, optimiser and clock; resumable."""

    def __init__(self, team: Team, run: Run) -> None:
        self.team, self.run, self.recipe = team, run, run.recipe
        torch.manual_seed(self.recipe.seed)
        self.model = run.world.tokenizer(self.recipe.config).to(run.device)
        _silence_second_convolutions(self.model)
        self.average = run.world.tokenizer(self.recipe.config).to(run.device).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self._optimise(self.model)
        self.steps, self.elapsed = 0, 0.0
        self.state_path = run.out.with_suffix(".state")
        if run.resume and self.state_path.exists():
            self._restore()
        self.clock = time.monotonic() - self.elapsed
        self.reported = self.saved = self.elapsed

    def _optimise(self, part: nn.Module) -> None:
        """From now on train `part` only, with a fresh optimiser."""
        self.part = part
        self.parameters = list(part.parameters())
        use_muon = self.recipe.matrix_learning_rate > 0
        self.optimiser = ConvolutionOptimiser(part, self.recipe.weight_decay, use_muon=use_muon)

    @property
    def progress(self) -> float:
        """Share of the budget spent: of the steps if the recipe counts them, else of the time."""
        if self.recipe.steps is not None:
            return self.steps / self.recipe.steps
        return self.elapsed / (60 * self.recipe.minutes)

    @property
    def decoder_alone(self) -> bool:
        return self.progress >= self.recipe.encoder_share

    def step(self, batch: Tensor) -> Tensor:
        """One update; returns the averaged (loss, squared error)."""
        torch.manual_seed((self.recipe.seed << 32) + self.steps * self.team.size + self.team.rank)
        if self.decoder_alone and self.part is self.model:
            self._optimise(self.model.decoder)
        with mixed(self.run.device):
            result = reconstruct(
                self.model,
                batch,
                train_encoder=not self.decoder_alone,
                flip_rate=self.recipe.flip_rate if self.decoder_alone else 0.0,
                world=self.run.world,
            )
        self.model.zero_grad(set_to_none=True)
        result.loss.backward()
        self._update(result)
        return self.statistics

    def _update(self, result: Reconstruction) -> None:
        own = torch.tensor([time.monotonic() - self.clock, result.loss.item(), result.squared_error.item()])
        shared = self.team.average_gradients(self.parameters, torch.cat([own, result.residual_sizes.cpu()]))
        self.elapsed, self.statistics = float(shared[0]), shared[1:3]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate = self._schedule()
        self.optimiser.step(self.recipe.learning_rate * rate, self.recipe.matrix_learning_rate * rate)
        self.steps += 1
        if hasattr(self.model, "magnitudes") and not self.decoder_alone:
            sizes = self.run.world.by_scale(shared[3:]).to(self.model.magnitudes.device)
            self.model.magnitudes[: len(sizes)].lerp_(sizes, max(self.recipe.magnitude_decay, 1 / self.steps))
        self._average_weights()

    @torch.no_grad()
    def _average_weights(self) -> None:
        rate = 1 - min(self.recipe.average_decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), rate)
        if hasattr(self.model, "magnitudes"):
            self.average.magnitudes.copy_(self.model.magnitudes)

    def _schedule(self) -> float:
        """Factor of the learning rates: linear warm-up, cosine to zero."""
        warm = min(1.0, (self.steps + 1) / self.recipe.warmup_steps)
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress)))

    def report(self, statistics: Tensor, held_out: np.ndarray) -> None:
        """Progress line now and then; state and weights now and then."""
        if self.elapsed - self.reported > REPORT_SECONDS:
            self.reported = self.elapsed
            left = max(0, round(60 * self.recipe.minutes - self.elapsed))
            psnr = 10 * math.log10(4 / max(float(statistics[1]), 1e-9))
            phase = "decoder" if self.decoder_alone else "all"
            print(
                f"step {self.steps:5d}  {phase:7s}  loss {float(statistics[0]):.4f}  PSNR {psnr:.2f} dB"
                f"  {left // 60}:{left % 60:02d} left",
                flush=True,
            )
        if self.elapsed - self.saved > SAVE_SECONDS:
            self.saved = self.elapsed
            self._keep_state()
            self.save(self.run.out.with_stem(f"{self.run.out.stem}_partial"), held_out)

    def save(self, path: Path, held_out: np.ndarray) -> None:
        """Averaged weights with their record as safetensors metadata."""
        psnr = reconstruction_psnr(self.average, held_out, world=self.run.world)
        print(f"PSNR on fresh renders, cut after each scale: {' '.join(f'{value:.2f}' for value in psnr)}", flush=True)
        record = {
            "config": json.dumps(asdict(self.recipe.config)),
            "recipe": json.dumps(asdict(self.recipe)),
            "seconds": f"{self.elapsed:.0f}",
            "steps": str(self.steps),
            "psnr_by_last_scale": json.dumps([round(value, 3) for value in psnr]),
            "data_version": self.run.world.version,
        }
        state = {key: value.cpu().clone() for key, value in self.average.state_dict().items()}
        with whole_file(path) as temporary:
            save_file(_at_unit_scale(state, self.run.world), temporary, record)

    def _keep_state(self) -> None:
        state = {"model": self.model.state_dict(), "average": self.average.state_dict()}
        state["optimiser"] = self.optimiser.state_dict()
        state |= {"decoder_alone": self.part is not self.model, "steps": self.steps, "elapsed": self.elapsed}
        with whole_file(self.state_path) as temporary:
            torch.save(state, temporary)

    def _restore(self) -> None:
        state = torch.load(self.state_path, map_location=self.run.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.steps, self.elapsed = state["steps"], state["elapsed"]
        if state["decoder_alone"]:
            self._optimise(self.model.decoder)
        self.optimiser.load_state_dict(state["optimiser"])


def _batch(images: np.ndarray, session: _Session, team: Team) -> Tensor:
    """This process's share of the step's images, float [b, 3, (F,) h, w] in [-1, 1]."""
    recipe = session.recipe
    picked = np.random.default_rng((recipe.seed, session.steps)).integers(len(images), size=recipe.batch)
    return session.run.world.batch(images[np.sort(picked[team.rank :: team.size])], session.run.device)


def _at_unit_scale(state: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """The same function with code magnitudes of about one together: training leaves the scale of features free.

    Measured drift: latents of root mean square 62 after 18 minutes. A power of two keeps every output bit-identical.
    """
    if "magnitudes" not in state:
        return state
    used = state["magnitudes"][: len({grid[1] for grid in world.runs})]
    factor = 2.0 ** -round(math.log2(float(used.square().sum().sqrt())))
    scaled = dict(state, magnitudes=state["magnitudes"] * factor)
    for key in ("encoder.conv_out", "encoder.still.conv_out"):  # differences of pairs have the spread of the magnitudes
        scaled |= {name: value * factor for name, value in state.items() if name.startswith(f"{key}.")}
    scaled["decoder.conv_in.conv.weight"] = state["decoder.conv_in.conv.weight"] / factor
    return scaled


def _silence_second_convolutions(model: nn.Module) -> None:
    """Every residual block starts as the identity."""
    for name, parameter in model.named_parameters():
        if ".conv2." in name:
            nn.init.zeros_(parameter)


if __name__ == "__main__":
    main()
