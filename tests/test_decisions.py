"""Decisions from the data against float64 loops, numpy's FFT and scipy's Sobel."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from autoprune.pruning.decisions import changed_share, discrepancy, latent_change, probe_decision, probe_features
from autoprune.rules import DISCREPANCIES, LATENT_SCORERS, ProbeRule


def pair(*shape: int, apart: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(shape, generator=generator)
    return first, first + apart * torch.randn(shape, generator=generator)


def turn(a: np.ndarray, b: np.ndarray) -> float:
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return 1 - a @ b / lengths if lengths else 0.0


def naive_discrepancy(cond: np.ndarray, uncond: np.ndarray, metric: str) -> float:
    if metric.startswith("mse"):
        return ((cond - uncond) ** 2).mean()
    if metric == "cos_hidden":
        return np.mean([turn(c, u) for c, u in zip(cond, uncond, strict=True)])
    terms = []
    for c, u in zip(cond.reshape(-1, 2), uncond.reshape(-1, 2), strict=True):
        p, q = 1 / (1 + math.exp(c[0] - c[1])), 1 / (1 + math.exp(u[0] - u[1]))
        terms.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    return np.mean(terms)


@pytest.mark.parametrize("metric", DISCREPANCIES)
def test_discrepancy_equals_a_naive_loop(metric: str) -> None:
    cond, uncond = pair(3, 7, 5) if metric.endswith("hidden") else pair(3, 7, 5, 2)
    expected = [naive_discrepancy(cond[i].double().numpy(), uncond[i].double().numpy(), metric) for i in range(3)]
    np.testing.assert_allclose(discrepancy(cond, uncond, metric=metric), expected, rtol=1e-5)


@pytest.mark.parametrize("metric", DISCREPANCIES)
def test_equal_branches_have_no_discrepancy(metric: str) -> None:
    cond, _ = pair(2, 3, 4, 2)
    cond = cond.flatten(2).bfloat16() if metric.endswith("hidden") else cond * 100
    assert torch.equal(discrepancy(cond, cond.clone(), metric=metric), torch.zeros(2))


def test_certain_bits_have_a_finite_divergence() -> None:
    cond = torch.tensor([[[[300.0, -300.0]]]])
    torch.testing.assert_close(discrepancy(cond, -cond, metric="kl_bits"), torch.tensor([600.0]))


def naive_change(a: np.ndarray, b: np.ndarray, metric: str) -> float:
    if metric == "latent_cos":
        return turn(a, b)
    length = math.sqrt(sum((b - a) ** 2))
    return length if metric == "latent_l2" else length / (math.sqrt(sum(a**2)) + 1e-6)


@pytest.mark.parametrize("metric", LATENT_SCORERS)
def test_latent_change_and_changed_share_equal_naive_loops(metric: str) -> None:
    previous, latest = pair(2, 4, 3, 5)
    previous[0, :, 1, 2] = 0
    latest[1, :, 0, 0] = 0
    a, b = previous.double().numpy(), latest.double().numpy()
    expected = [[[naive_change(a[i, :, y, x], b[i, :, y, x], metric) for x in range(5)] for y in range(3)] for i in range(2)]
    ours = latent_change(previous, latest, metric=metric)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    threshold = float(np.median(expected)) + 1e-4
    share = changed_share(previous, latest, metric=metric, threshold=threshold)
    np.testing.assert_allclose(share, (np.array(expected) > threshold).mean((1, 2)), rtol=1e-6)


def test_small_turns_keep_their_digits() -> None:
    previous, latest = pair(1, 8, 4, 4, apart=1e-4)
    a, b = previous[0].double().numpy(), latest[0].double().numpy()
    expected = [[turn(a[:, y, x], b[:, y, x]) for x in range(4)] for y in range(4)]
    np.testing.assert_allclose(latent_change(previous, latest, metric="latent_cos")[0], expected, rtol=5e-3)


@pytest.mark.parametrize("metric", LATENT_SCORERS)
def test_an_unchanged_latent_has_settled_everywhere(metric: str) -> None:
    latent, _ = pair(2, 4, 3, 3)
    latent[:, :, 0] = 0
    assert torch.equal(changed_share(latent, latest=latent.clone(), metric=metric, threshold=0.0), torch.zeros(2))


def naive_features(old: np.ndarray, new: np.ndarray, radius: float) -> list[float]:
    edges = []
    for image in (old, new):
        grey = image.mean(0)
        edges.append(np.hypot(*(ndimage.sobel(grey, axis=axis, mode="constant") for axis in (0, 1))))
    grey = new.mean(0)
    height, width = grey.shape
    amplitude = np.abs(np.fft.fftshift(np.fft.fft2(grey)))
    limit = int(radius * min(height, width) / 2)
    outside = sum(
        amplitude[y, x]
        for y in range(height)
        for x in range(width)
        if math.sqrt((y - height // 2) ** 2 + (x - width // 2) ** 2) > limit
    )
    return [np.abs(edges[1] - edges[0]).mean(), outside / amplitude.sum()]


@pytest.mark.parametrize(("size", "radius"), [((16, 16), 0.4), ((12, 20), 0.4), ((15, 9), 0.7), ((8, 8), 0.05)])
def test_probe_features_equal_numpy_and_scipy(size: tuple[int, int], radius: float) -> None:
    old, new = pair(2, 3, *size, apart=0.5)
    expected = [naive_features(old[i].double().numpy(), new[i].double().numpy(), radius) for i in range(2)]
    np.testing.assert_allclose(probe_features(old, new, radius=radius), expected, rtol=1e-4)


@pytest.mark.parametrize("level", [0.0, -1.0, 0.3])
def test_constant_images_have_no_edges_inside_and_no_high_frequencies(level: float) -> None:
    flat = torch.full((1, 3, 16, 16), level)
    torch.testing.assert_close(probe_features(flat, flat, radius=0.4), torch.zeros(1, 2), rtol=0, atol=1e-6)
    black = torch.zeros_like(flat)
    border = 4 * 14 * 4 + 4 * math.hypot(3, 3)
    expected = torch.tensor([[abs(level) * border / 256, 0.0]])
    torch.testing.assert_close(probe_features(black, flat, radius=0.4), expected, rtol=1e-4, atol=1e-6)


RULE = ProbeRule(
    scale=9,
    probe_scale=4,
    mean=(0.5, 0.25),
    deviation=(0.5, 2.0),
    weights=(1.0, -2.0),
    skip_cuts=(1.0, 2.0, 3.0),
    drop_cuts=(-1.0, 0.0, 0.5),
)


def test_probe_decisions_count_cuts_at_or_below_the_score() -> None:
    wanted = [-2.0, -1.0, 0.0, 0.75, 1.0, 2.5, 3.0]
    features = torch.tensor([[0.5 + 0.5 * z, 0.25] for z in wanted])
    skip, drop = probe_decision(features, RULE)
    assert skip.tolist() == [0, 0, 0, 0, 1, 2, 3]
    assert drop.tolist() == [0, 1, 2, 3, 0, 0, 0]
    assert skip.dtype == drop.dtype == torch.int64


def test_probe_decisions_weigh_both_features() -> None:
    features = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) * 4 - 1
    skip, drop = probe_decision(features, RULE)
    for (first, second), skipped, dropped in zip(features.tolist(), skip.tolist(), drop.tolist(), strict=True):
        z = (first - 0.5) / 0.5 - 2 * (second - 0.25) / 2
        assert skipped == sum(cut <= z for cut in RULE.skip_cuts)
        assert dropped == (0 if skipped else sum(cut <= z for cut in RULE.drop_cuts))


def test_a_probe_without_cuts_changes_nothing() -> None:
    rule = ProbeRule(scale=9, probe_scale=4, mean=(0, 0), deviation=(1, 1), weights=(1, 1))
    skip, drop = probe_decision(torch.ones(2, 2), rule)
    assert skip.tolist() == drop.tolist() == [0, 0]
