"""The public generate: the loop's images, and one warning where a policy's numbers do not apply."""

import warnings
from dataclasses import replace

import pytest
import torch

import autoprune
from autoprune import generation
from autoprune.backbones import load_backbone
from autoprune.measure.device import device_conditions
from autoprune.policy import Policy
from autoprune.rules import ScalePruning

PROMPTS = ["a red circle"]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny", weights="random")


@pytest.fixture
def policy(backbone):
    here = device_conditions(backbone.device, backbone.dtype)
    return Policy("tiny", backbone.depth, backbone.scale_schedule(), skip_last=2, name="fast", measured=here | {"batch": 16})


def told(backbone, policy) -> list[str]:
    """Returns the warnings of three generations, with Python's own filter of repeated ones."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            autoprune.generate(backbone, PROMPTS, policy=policy)
    return [str(entry.message) for entry in caught]


def test_a_policy_measured_here_generates_the_loops_images_without_a_word(backbone, policy):
    assert told(backbone, policy) == told(backbone, None) == []
    assert torch.equal(
        autoprune.generate(backbone, PROMPTS, policy=policy, seed=4),
        generation.generate(backbone, PROMPTS, policy=policy, seed=4),
    )


def test_a_policy_measured_elsewhere_warns_once_and_says_what_to_run(backbone, policy):
    elsewhere = replace(policy, measured=policy.measured | {"device_name": "Other", "torch": "1.13.1"})
    (warning,) = told(backbone, elsewhere)
    assert "device_name Other, here " in warning and "torch 1.13, here " in warning
    assert "python -m autoprune.verify policy=FILE" in warning and "python -m autoprune backbone=tiny" in warning


def test_a_policy_that_prunes_nothing_warns_once_and_gives_the_dense_image(backbone, policy):
    nothing = replace(policy, skip_last=0, scales={6: ScalePruning(0.999, 4)})
    (warning,) = told(backbone, nothing)
    assert warning.startswith("a policy must change something on its schedule, ")
    assert torch.equal(generation.generate(backbone, PROMPTS, policy=nothing), autoprune.generate(backbone, PROMPTS))
