"""One training of the generator in progress: weights, averages, optimisers, clock; it survives being killed."""

import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.backbones.embedded import build_parts, embedded_parts
from autoprune.files import whole_file
from autoprune.testbed.distributed import Team
from autoprune.testbed.generator_checkpoint import GeneratorRun, read_record, save_weights
from autoprune.testbed.generator_recipe import Optimisers, pick_scales, scale_losses, total_loss
from autoprune.testbed.latents import LatentSet
from autoprune.testbed.precision import mixed
from autoprune.testbed.train_text import pretrain_text

REPORT_SECONDS = 20.0
SAVE_SECONDS = 150.0
VALIDATION_BATCH = 16


class GeneratorSession:
    """Every process holds the same weights; only the leader prints and writes."""

    def __init__(self, team: Team, run: GeneratorRun, tokenizer: nn.Module) -> None:
        self.team, self.run, self.recipe, self.tokenizer = team, run, run.recipe, tokenizer
        torch.manual_seed(self.recipe.seed)
        self.lessons = run.lessons
        self.parts = build_parts(run.lessons.spec) if run.start is None else embedded_parts(run.lessons.spec, run.start)[0]
        self.model, _, self.text = (part.to(run.device) for part in self.parts.values())
        self.origin = {} if run.start is None else {"start": read_record(run.start)}
        if run.start is None:
            self.lessons.initialise(self.model)
        self.averages = nn.ModuleList([deepcopy(self.model), deepcopy(self.text)]).requires_grad_(False)
        self.optimisers = Optimisers(self.model, self.text, self.recipe)
        self.steps = self.samples = self.full_samples = 0
        self.elapsed = self.prepared = self.place_accuracy = 0.0
        self.history: list[dict[str, object]] = []
        if run.resume and run.state_path.exists():
            self._restore()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *self.text.parameters()]

    @property
    def progress(self) -> float:
        """Share of the training time that is over; preparation does not count."""
        whole = 60 * self.recipe.minutes - self.prepared
        return (self.elapsed - self.prepared) / whole if whole > 0 else 1.0

    def prepare(self, started: float) -> None:
        """Teaches the caption encoder where it is new, and starts the clock; the run began at `started` (monotonic)."""
        if not self.prepared:
            if self.run.start is None:
                self.place_accuracy = pretrain_text(
                    self.team, self.text, steps=self.recipe.text_steps, seed=self.recipe.seed, exam=self.lessons.exam
                )
                self.averages[1].load_state_dict(self.text.state_dict())
            shared = self.team.average(torch.tensor([time.monotonic() - started], dtype=torch.float64))
            self.elapsed = self.prepared = float(shared)
        self.clock = time.monotonic() - self.elapsed
        self.reported = self.saved = self.elapsed

    def step(self, latents: LatentSet) -> None:
        """One update of everything."""
        recipe, team = self.recipe, self.team
        rng = np.random.default_rng([recipe.seed, self.steps])
        taught = 1.0 if self.run.start else self.progress  # what begins with weights has had its small scales
        count = pick_scales(taught, rng.random(), self.lessons.curriculum)
        rows = rng.integers(len(latents), size=recipe.batch_size(count, self.lessons.batch))
        generator = torch.Generator(self.run.device).manual_seed(int(rng.integers(2**40)) + team.rank)
        losses, targets = self._losses(latents, rows[team.rank :: team.size], count, generator)
        total_loss(losses, targets).backward()
        own = torch.zeros(1 + self.lessons.runs)
        own[0], own[1 : 1 + count] = time.monotonic() - self.clock, losses.detach().cpu()
        shared = team.average_gradients(self.parameters, own)
        self.elapsed, self.losses = float(shared[0]), shared[1 : 1 + count]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.rate = recipe.rate_factor(self.steps, self.progress)
        self.optimisers.step(self.rate)
        self._average_weights()
        self.steps += 1
        self.samples += len(rows)
        self.full_samples += len(rows) if count == self.lessons.runs else 0

    def _losses(
        self, latents: LatentSet, rows: np.ndarray, count: int, generator: torch.Generator
    ) -> tuple[Tensor, list[Tensor]]:
        features, words, lengths = latents.batch(rows)
        device, flip = self.run.device, self.recipe.max_flip
        teacher = self.lessons.teacher(self.tokenizer, features.to(device), count, max_flip=flip, generator=generator)
        dropped = torch.rand(len(lengths), generator=generator, device=device) < self.recipe.unconditional_share
        with mixed(device):
            text = self.text.encode(words.to(device), lengths)
            logits = self.lessons.logits(self.model, text, teacher.inputs, dropped=dropped)
        return scale_losses(logits, teacher.targets), teacher.targets

    @torch.no_grad()
    def _average_weights(self) -> None:
        rate = 1 - min(self.recipe.average_decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.averages.parameters()), self.parameters, rate)

    @torch.no_grad()
    def validate(self, held_out: LatentSet) -> list[float]:
        """Nats per bit of each scale with the averaged weights, no flips, captions kept; the team shares the images."""
        model, text = self.averages
        lessons, sums = self.lessons, torch.zeros(self.lessons.runs)
        rows = np.arange(len(held_out))[self.team.rank :: self.team.size]
        batches = np.split(rows, range(VALIDATION_BATCH, len(rows), VALIDATION_BATCH))
        for batch in batches:
            features, words, lengths = held_out.batch(batch)
            device = self.run.device
            generator = torch.Generator(device).manual_seed(0)
            features = features.to(device)
            teacher = lessons.teacher(self.tokenizer, features, lessons.runs, max_flip=0.0, generator=generator)
            with mixed(device):
                features_of_text = text.encode(words.to(device), lengths)
                logits = lessons.logits(model, features_of_text, teacher.inputs)
            sums += scale_losses(logits, teacher.targets).cpu() * len(batch) / len(rows)
        return [round(float(value), 4) for value in self.team.average(sums)]

    def report(self, held_out: LatentSet) -> None:
        """A line now and then; validation, state and weights now and then. Every process must call it."""
        if self.elapsed - self.reported > REPORT_SECONDS:
            self.reported = self.elapsed
            if self.team.leads:
                left = max(0, round(60 * self.recipe.minutes - self.elapsed))
                losses = " ".join(f"{value:.3f}" for value in self.losses.tolist())
                print(
                    f"step {self.steps:6d}  samples {self.samples} ({self.full_samples} full)  rate {self.rate:.3f}"
                    f"  {left // 60}:{left % 60:02d} left  loss {losses}",
                    flush=True,
                )
        if self.elapsed - self.saved > SAVE_SECONDS:
            self.saved = self.elapsed
            self._checkpoint(held_out)
            if self.team.leads:
                self._save_state()
                self.save(self.run.partial_path)

    def finish(self, held_out: LatentSet) -> None:
        """Last validation and the file to ship."""
        self._checkpoint(held_out)
        if self.team.leads:
            self._save_state()
            self.save(self.run.out)

    def save(self, path: Path) -> None:
        """Averaged weights with their record, which holds that of the weights it began with."""
        model, text = self.averages
        record = {
            "recipe": asdict(self.recipe),
            "processes": self.team.size,
            "device": self.run.device,
            "seconds": round(self.elapsed),
            "steps": self.steps,
            "samples": self.samples,
            "full_samples": self.full_samples,
            "place_accuracy": self.place_accuracy,
            "validation": self.history,
            **self.origin,
        }
        save_weights(path, dict(zip(self.parts, (model, self.tokenizer, text), strict=True)), record, self.lessons)

    def _checkpoint(self, held_out: LatentSet) -> None:
        validation = self.validate(held_out)
        self.history.append({"seconds": round(self.elapsed), "full_samples": self.full_samples, "nats_per_bit": validation})
        if self.team.leads:
            print("validation " + " ".join(f"{value:.3f}" for value in validation), flush=True)

    def _save_state(self) -> None:
        names = ("steps", "samples", "full_samples", "elapsed", "prepared", "place_accuracy", "history")
        state = {"numbers": {name: getattr(self, name) for name in names}, "optimisers": self.optimisers.state()}
        state |= {name: getattr(self, name).state_dict() for name in ("model", "text", "averages")}
        with whole_file(self.run.state_path) as temporary:
            torch.save(state, temporary)

    def _restore(self) -> None:
        state = torch.load(self.run.state_path, map_location=self.run.device, weights_only=True)
        for name in ("model", "text", "averages"):
            getattr(self, name).load_state_dict(state[name])
        self.optimisers.load(state["optimisers"])
        for name, value in state["numbers"].items():
            setattr(self, name, value)
