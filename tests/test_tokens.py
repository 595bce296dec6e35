"""Token agreement, counted by hand and on real generations."""

import numpy as np
import pytest
import torch

from autoprune.backbones import load_backbone
from autoprune.generation import generate
from autoprune.measure.metrics import ImageBatch, MetricContext
from autoprune.measure.metrics.tokens import NOT_DRAWN, TokenAgreement, TokenRecorder
from autoprune.policy import BranchRule, Policy
from autoprune.rules import StopRule

PROMPTS = ["a red circle", "a blue square", "a green triangle"]


@pytest.fixture(scope="module")
def backbone():  # noqa: ANN201
    return load_backbone("tiny", weights="random")


def agreement(own: tuple[torch.Tensor, ...], dense: tuple[torch.Tensor, ...]) -> np.ndarray:
    images = torch.zeros(len(dense[0]), 3, 8, 8)
    batch = ImageBatch(images, PROMPTS, dense=images, tokens=own, dense_tokens=dense)
    return TokenAgreement(MetricContext(torch.device("cpu"))).measure(batch)


def drawn(backbone, policy: Policy | None, dense: tuple[torch.Tensor, ...] = ()) -> tuple[torch.Tensor, ...]:  # noqa: ANN001
    recorder = TokenRecorder()
    generate(backbone, PROMPTS, policy=policy, seed=3, observer=recorder)
    return recorder.tokens(dense)


def test_agreement_counts_equal_bits_over_all_and_by_scale() -> None:
    rng = np.random.default_rng(0)
    own, dense = ([rng.integers(0, 2, (2, tokens, 5)) for tokens in (1, 4, 9)] for _ in range(2))
    found = agreement(*(tuple(map(torch.from_numpy, scales)) for scales in (own, dense)))
    for sample in range(2):
        equal = [
            sum(a == b for a, b in zip(x[sample].ravel(), y[sample].ravel(), strict=True))
            for x, y in zip(own, dense, strict=True)
        ]
        assert found[sample] == pytest.approx([sum(equal) / 70, equal[0] / 5, equal[1] / 20, equal[2] / 45])


def test_codes_agree_as_whole_numbers() -> None:
    own, dense = (
        (torch.tensor([[7], [8]]), torch.tensor([[1, 2], [3, 4]])),
        (torch.tensor([[7], [9]]), torch.tensor([[1, 5], [3, 4]])),
    )
    np.testing.assert_allclose(agreement(own, dense), [[2 / 3, 1, 0.5], [2 / 3, 0, 1]])


def test_a_policy_agrees_up_to_where_it_differs_and_skipped_scales_agree_with_nothing(backbone) -> None:  # noqa: ANN001
    dense = drawn(backbone, None)
    schedule = backbone.scale_schedule()
    assert [scale.shape[:2] for scale in dense] == [(3, height * width) for _, height, width in schedule]
    policy = Policy("tiny", backbone.depth, schedule, guidance=BranchRule("cond", 4), skip_last=1)
    own = drawn(backbone, policy, dense)
    assert (own[-1] == NOT_DRAWN).all() and own[-1].shape == dense[-1].shape
    found = agreement(own, dense)
    assert (found[:, 1:5] == 1).all() and (found[:, -1] == 0).all()
    assert ((found[:, 5] < 1) & (found[:, 5] > 0)).all()


def test_samples_that_are_split_up_are_put_together_again(backbone) -> None:  # noqa: ANN001
    dense = drawn(backbone, None)
    stop = StopRule(from_scale=6, metric="latent_l2", threshold=1e9, share=1.0)
    policy = Policy("tiny", backbone.depth, backbone.scale_schedule(), stop=stop, batch="split")
    found = agreement(drawn(backbone, policy, dense), dense)
    assert found.shape == (3, 8) and (found[:, -1] == 0).all() and (found[:, 1] == 1).all()
