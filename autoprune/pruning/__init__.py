"""Token pruning as data: scorers, restorers, the plan and the sandwich around any function of tokens."""

from autoprune.pruning import restoration, scorers

SCORERS = {
    "dc": scorers.dc,
    "structure": scorers.structure,
    "texture": scorers.texture,
    "latent_cos": scorers.latent_cos,
    "latent_l2": scorers.latent_l2,
    "latent_relative": scorers.latent_relative,
    "spatiotemporal": scorers.spatiotemporal,
    "delta": scorers.delta,
    "norm": scorers.norm,
    "cond_uncond": scorers.cond_uncond,
    "random": scorers.random,
}
RESTORERS = {
    "cached": restoration.cached,
    "cached_state": restoration.cached_state,
    "nearest": restoration.nearest,
    "anchor": restoration.anchor,
    "merged": restoration.merged,
    "zero_residual": restoration.identity,
    "identity": restoration.identity,
}
