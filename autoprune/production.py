"""The generation that production calls: the loop of generation.py behind one look at whether the policy's numbers apply.

Search and measurements call the loop itself: dense policies are legitimate there, and numbers are being made, not trusted.
"""

import warnings
from collections.abc import Sequence

from torch import Tensor

from autoprune import generation
from autoprune.backbones import Backbone, Sampling
from autoprune.errors import UserError
from autoprune.generation import Observer
from autoprune.measure.device import device_conditions
from autoprune.measure.placement import with_fitting_keys
from autoprune.policy import Policy


def generate(
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    policy: Policy | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    observer: Observer | None = None,
) -> Tensor:
    """Generates one image a prompt, as generation.generate: float32 [B, 3, H, W] in [0, 1] on the backbone's device, or
    videos [B, 3, F, H, W].

    Warns, by Python's default once a policy and line of code, of a policy that prunes nothing and of one measured elsewhere.
    The size of the batch is the caller's traffic and not looked at.
    """
    backbone = with_fitting_keys(backbone, batch=max(1, len(prompts)))
    for sentence in doubts(policy, backbone) if policy is not None else ():
        warnings.warn(sentence, stacklevel=2)
    return generation.generate(backbone, prompts, policy=policy, seed=seed, sampling=sampling, observer=observer)


def doubts(policy: Policy, backbone: Backbone, *, batch: int | None = None) -> list[str]:
    """Returns why a policy's speed-up may not hold on this backbone, in a sentence each: it prunes nothing, or was
    measured under other conditions (at another `batch`, where one is given)."""
    try:
        policy.check_prunes()
    except UserError as error:
        return [str(error)]
    here = device_conditions(backbone.device, backbone.dtype) | ({} if batch is None else {"batch": batch})
    different = policy.mismatches(here) if policy.measured else []
    if not different:
        return []
    return [
        f"policy {policy.name!r} was measured under other conditions ({'; '.join(different)}), its speed-up may not hold here; "
        f"python -m autoprune.verify policy=FILE measures it, python -m autoprune backbone={backbone.name} searches here."
    ]
