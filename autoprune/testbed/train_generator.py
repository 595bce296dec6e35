"""Train the embedded generator on encoded scenes: `python -m autoprune.testbed.train_generator`.

First the caption encoder alone, then the transformer with it, by teacher forcing with self-correction. Small scales
come first because a full step costs eight times as much; the clock, not a step count, drives the schedule.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from autoprune.testbed.distributed import Team, run_team
from autoprune.testbed.generator_checkpoint import GeneratorRun, load_tokenizer
from autoprune.testbed.generator_recipe import GeneratorRecipe
from autoprune.testbed.generator_session import GeneratorSession
from autoprune.testbed.latents import open_latents
from autoprune.testbed.lessons import IMAGE_LESSONS, LESSONS

SMOKE = {"minutes": 0.75, "images": 512, "text_steps": 20, "batch_share": 0.25}
VALIDATION_SEED_OFFSET = 1_000_003
VALIDATION_IMAGES = 128


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--world", choices=LESSONS, default=IMAGE_LESSONS.world.name)
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--tokenizer", type=Path, help="file of train_tokenizer")
    origin.add_argument("--start", type=Path, help="weights to begin with, of train_generator; their tokenizer is used")
    parser.add_argument("--out", type=Path, default=Path("outputs/training/tiny.safetensors"))
    parser.add_argument("--cache", type=Path, default=Path("outputs/training/latents"), help="folder of encoded scenes")
    parser.add_argument("--minutes", type=float, default=GeneratorRecipe.minutes, help="in all, encoding included")
    parser.add_argument("--images", type=int, default=GeneratorRecipe.images)
    parser.add_argument("--seed", type=int, default=GeneratorRecipe.seed)
    parser.add_argument("--processes", type=int, default=2, help="single-thread processes; 1 with a GPU")
    parser.add_argument("--resume", action="store_true", help="continue from the .state file beside --out")
    parser.add_argument("--smoke", action="store_true", help="under a minute: does it still learn?")
    options = parser.parse_args(arguments)
    recipe = GeneratorRecipe(minutes=options.minutes, images=options.images, seed=options.seed)
    if options.smoke:
        recipe = replace(recipe, **SMOKE)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lessons, files = LESSONS[options.world], (options.tokenizer, options.out, options.cache)
    run = GeneratorRun(recipe, *files, device, options.resume, lessons, options.start)
    run_team(train, run, processes=1 if device == "cuda" else options.processes)


def train(team: Team, run: GeneratorRun) -> None:
    """Work of one process."""
    started = time.monotonic()
    run.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(run)
    recipe = run.recipe
    seeds = {"training": recipe.seed, "held out": recipe.seed + VALIDATION_SEED_OFFSET}
    shared = {"team": team, "world": run.lessons.world}
    held_out = open_latents(run.cache, tokenizer, VALIDATION_IMAGES, seed=seeds["held out"], **shared)
    session = GeneratorSession(team, run, tokenizer)
    if session.progress < 1:
        latents = open_latents(run.cache, tokenizer, recipe.images, seed=seeds["training"], **shared)
        session.prepare(started)
    while session.progress < 1:
        session.step(latents)
        session.report(held_out)
    session.finish(held_out)


if __name__ == "__main__":
    main()
