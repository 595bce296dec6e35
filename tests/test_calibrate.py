"""Calibration: its maths against independent truths, the command end to end on random weights, and bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_star import star

from autoprune import calibrate
from autoprune.backbones import load_backbone
from autoprune.calibrate import ENERGIES, Depths, collect, decide
from autoprune.generation import Observer, generate
from autoprune.measure.calibration_fit import (
    ALWAYS,
    energy_ranks,
    faithful_level,
    fit_levels,
    joint_level,
    leave_one_out_accuracy,
    majority_share,
    quantiles,
)
from autoprune.policy import Policy, fingerprint
from autoprune.rules import DISCREPANCIES, LATENT_SCORERS, BranchRule, ProbeRule, StopRule
from autoprune.search.calibration import LEVELS, Calibration
from autoprune.search.prompt_files import read_prompts
from autoprune.search.rank_table import rank_table
from autoprune.search.space import SearchSpace, space_for
from autoprune.search.space_file import read_space
from tests.test_space import FILES

TEXTS = ["a red circle", "two striped squares"]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny", weights="random", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def samples(backbone):
    return collect(backbone, TEXTS, seed=1, batch=2)


def tokens_of_spectrum(spectrum: list[float], *, tokens: int, width: int, seed: int) -> np.ndarray:
    """Returns tokens [N, C] around a mean token whose centred matrix has these singular values."""
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((tokens, len(spectrum) + 1))
    left[:, 0] = 1.0
    left = np.linalg.qr(left)[0][:, 1:]
    right = np.linalg.qr(rng.standard_normal((width, len(spectrum))))[0]
    return left * spectrum @ right.T + rng.standard_normal(width) * 3


@pytest.mark.parametrize(("tokens", "width"), [(40, 12), (12, 40)])
def test_ranks_of_a_known_spectrum(tokens: int, width: int) -> None:
    spectrum = [8.0, 4.0, 2.0, 1.0]
    x = torch.from_numpy(np.stack([tokens_of_spectrum(spectrum, tokens=tokens, width=width, seed=seed) for seed in (0, 1)]))
    energies = (0.5, 64 / 85 - 1e-6, 64 / 85 + 1e-6, 80 / 85 - 1e-6, 80 / 85 + 1e-6, 84 / 85 + 1e-6)
    assert energy_ranks(x, energies).tolist() == [[1, 1, 2, 2, 3, 4]] * 2


def test_ranks_agree_with_a_singular_value_decomposition() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 30, 17)) @ rng.standard_normal((17, 17)) + 5
    energies = (0.999, 0.96, 0.9, 0.7)
    for row, ranks in zip(x, energy_ranks(torch.from_numpy(x), energies).tolist(), strict=True):
        squares = np.linalg.svd(row - row.mean(0), compute_uv=False) ** 2
        for energy, rank in zip(energies, ranks, strict=True):
            assert squares[:rank].sum() >= energy * squares.sum() > squares[: rank - 1].sum()


def test_equal_tokens_have_rank_one() -> None:
    assert energy_ranks(torch.ones(1, 9, 4), (0.96,)).tolist() == [[1]]


def test_label_is_the_most_aggressive_level_that_stays_faithful() -> None:
    ssim = torch.tensor([[0.9, 0.85, 0.7], [0.8, 0.9, 0.7], [0.9, 0.9, 0.84], [0.8, 0.8, 0.8]])
    assert faithful_level(ssim, 0.84).tolist() == [2, 2, 3, 0]
    assert faithful_level(torch.zeros(2, 0), 0.84).tolist() == [0, 0]


def test_a_branch_is_dropped_only_where_nothing_is_skipped() -> None:
    drop, skip = torch.tensor([0, 2, 3, 1]), torch.tensor([0, 0, 1, 2])
    assert joint_level(drop, skip, drops=3).tolist() == [0, 2, 4, 5]


def separable(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns features [n, 2] on very different scales and levels 0, 1, 3 that a line score separates."""
    rng = np.random.default_rng(0)
    levels = np.arange(count) % 3
    hidden = 4.0 * levels + rng.uniform(-1, 1, count)
    other = rng.standard_normal(count)
    features = np.stack([1e-3 * (hidden - other), 50.0 + 20 * other], axis=1)
    return features, np.where(levels == 2, 3, levels)


def test_fit_of_separable_levels_is_exact() -> None:
    features, levels = separable(60)
    fit = fit_levels(features, levels)
    assert (fit.predict(features) == levels).all()
    assert leave_one_out_accuracy(features, levels) == 1.0
    assert list(fit.cuts) == sorted(fit.cuts)
    assert len(fit.cuts) == 3
    assert fit.cuts[1] == fit.cuts[2]
    assert majority_share(levels) == pytest.approx(1 / 3)


def test_levels_below_the_lowest_one_are_always_reached() -> None:
    features, levels = separable(30)
    fit = fit_levels(features, levels + 2)
    assert fit.cuts[:2] == (ALWAYS, ALWAYS)
    assert (fit.predict(features) == levels + 2).all()


def test_one_level_alone_needs_no_features() -> None:
    fit = fit_levels(np.zeros((4, 2)), np.array([0, 0, 0, 0]))
    assert fit.cuts == ()
    assert fit.deviation == (1.0, 1.0)


def test_fit_is_where_its_own_gradient_vanishes() -> None:
    rng = np.random.default_rng(1)
    features = rng.standard_normal((40, 2))
    levels = (features @ [1.0, -0.5] + rng.logistic(size=40) > 0).astype(int)
    fit = fit_levels(features, levels)
    z = (features - fit.mean) / fit.deviation
    odds = 1 / (1 + np.exp(fit.cuts[0] - z @ fit.weights))
    np.testing.assert_allclose(z.T @ (levels - odds), fit.weights, atol=1e-6)
    assert (levels - odds).sum() == pytest.approx(0, abs=1e-6)


def test_quantiles_run_from_smallest_to_largest() -> None:
    values = torch.tensor([[4.0, 1.0, float("inf")], [3.0, 2.0, float("nan")]])
    assert quantiles(values, (0.0, 0.5, 1.0)) == (1.0, 2.5, 4.0)


def test_the_decision_keeps_its_relative_position_and_precedes_what_it_affects() -> None:
    assert Depths.of(13) == Depths(decision=9, probe=4, levels=3, projected=10)
    for scales in (7, 10, 12, 13):
        depths = Depths.of(scales)
        assert 1 <= depths.levels <= 3
        assert 0 <= depths.probe < depths.decision <= scales - depths.levels - 1


def test_a_run_of_two_prompts_fills_the_file(backbone, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "tiny.json"
    assert calibrate.main(["weights=random", "prompts=2", "batch=1", "target_ssim=0.1", f"output={path}"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert str(path) in said
    found = Calibration.load(path)
    assert found.fits(scale_schedule=fingerprint(backbone.scale_schedule()), weights=backbone.revision)
    assert found.prompts == 2
    assert set(found.discrepancies) == set(DISCREPANCIES)
    assert set(found.changes) == set(LATENT_SCORERS)
    assert all(set(rows) == set(range(7)) for rows in found.discrepancies.values())
    assert all(set(rows) == set(range(2, 7)) for rows in found.changes.values())


def test_the_command_takes_prompts_of_a_file(tmp_path, capsys) -> None:
    own, path = tmp_path / "own.txt", tmp_path / "tiny.json"
    own.write_text("\n".join(f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "ring")))
    arguments = ["weights=random", f"prompts_file={own}", "batch=2", "target_ssim=0.1", f"output={path}"]
    count = len(read_prompts(own).prompts)
    assert calibrate.main([*arguments, "prompts=2"]) == 0
    assert json.loads(path.read_text())["prompts"] == 2
    assert calibrate.main([*arguments, f"prompts={count}"]) == 2
    assert f"the search split of the {count} prompts" in capsys.readouterr().err


def test_ranks_grow_with_the_energy_and_cover_every_chunk(samples, backbone) -> None:
    decision = decide(samples, Depths.of(7), target=0.84)
    found = calibrate.summary(backbone, samples, decision, prompts=2)
    assert list(found.ranks) == [f"{energy:g}" for energy in ENERGIES]
    table = np.array(list(found.ranks.values()))
    assert table.shape == (12, 6)
    assert (np.diff(table, axis=0) <= 0).all()
    assert set(samples.ranks) == set(range(6))
    assert found.rank_scale == 5
    assert len(found.discrepancies["kl_bits"][6]) == len(LEVELS)


def test_measurements_do_not_depend_on_the_batch(samples, backbone) -> None:
    alone = collect(backbone, TEXTS, seed=1, batch=1)
    for name in ("skipped", "dropped", "features"):
        torch.testing.assert_close(torch.cat(getattr(alone, name)), torch.cat(getattr(samples, name)), rtol=0, atol=1e-4)


def test_skipping_nothing_extra_is_what_generation_does(samples, backbone) -> None:
    dense = generate(backbone, TEXTS, seed=1)
    skipped = generate(backbone, TEXTS, seed=1, policy=Policy("tiny", 6, backbone.scale_schedule(), skip_last=2))
    from autoprune.measure.metrics.similarity import ssim

    torch.testing.assert_close(samples.skipped[0][:, 1], ssim(skipped, dense), rtol=0, atol=1e-5)


class ScaleCount(Observer):
    """Counts the scales that ran."""

    def __init__(self) -> None:
        self.count = 0

    def scale_done(self, scale, logits, bits, latent) -> None:
        self.count += 1


def test_generation_decides_by_the_features_that_were_measured(samples, backbone) -> None:
    features = samples.features[0].double()
    axis = int((features[0] - features[1]).abs().argmax())
    weights = (1.0, 0.0) if axis == 0 else (0.0, 1.0)
    depths, between = Depths.of(7), float(features[:, axis].mean())
    rule = ProbeRule(depths.decision, depths.probe, (0.0, 0.0), (1.0, 1.0), weights, skip_cuts=(-1.0, between))
    policy = Policy("tiny", 6, backbone.scale_schedule(), probe=rule)
    for row, text in enumerate(TEXTS):
        watch = ScaleCount()
        sampling = replace(backbone.sampling, first_sample=row)
        generate(backbone, [text], seed=1, policy=policy, sampling=sampling, observer=watch)
        assert watch.count == (5 if features[row, axis] >= between else 6)


def test_another_length_has_a_calibration_of_its_own_schedule(video_backbone, tmp_path) -> None:
    path = tmp_path / "tiny_video.json"
    arguments = ["backbone=tiny_video", "weights=random", "prompts=2", "batch=2", "frames=1", f"output={path}"]
    assert calibrate.main(arguments) == 0
    found = Calibration.load(path)
    assert found.fits(scale_schedule=fingerprint(video_backbone.scale_schedule(frames=1)), weights="")
    assert found.rank_scale == 3 and set(found.changes["latent_l2"]) == {2, 3}


MOVING = ["a red circle moving left", "a green ring growing"]


@pytest.fixture(scope="module")
def video_backbone():
    return load_backbone("tiny_video", weights="random", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def of_videos(video_backbone):
    return collect(video_backbone, MOVING, seed=1, batch=2)


class Rows(Observer):
    """Notes the rows that the runs of each scale had."""

    def __init__(self) -> None:
        self.of: dict[int, int] = {}

    def forward_done(self, scale, rows, tokens) -> None:
        self.of[scale.index] = rows


def rows_of(backbone, row: int, **decisions) -> dict[int, int]:
    watch = Rows()
    policy = Policy("tiny_video", backbone.depth, backbone.scale_schedule(), **decisions)
    sampling = replace(backbone.sampling, first_sample=row)
    generate(backbone, MOVING[row : row + 1], seed=1, policy=policy, sampling=sampling, observer=watch)
    return watch.of


@pytest.mark.parametrize("metric", LATENT_SCORERS)
def test_a_video_stops_by_the_changes_of_its_clip_that_were_measured(video_backbone, of_videos, metric: str) -> None:
    (changes,) = of_videos.changes[metric, 7]
    assert changes.shape == (2, 3 * 8 * 8)
    for row, largest in enumerate(changes.amax(1).tolist()):
        for factor, last in ((1.001, 6), (0.999, 7)):
            rule = StopRule(7, threshold=factor * largest, share=0.001, metric=metric)
            assert max(rows_of(video_backbone, row, stop=rule)) == last


@pytest.mark.parametrize("metric", DISCREPANCIES)
def test_a_branch_of_a_video_is_dropped_by_the_differences_of_every_run(video_backbone, of_videos, metric: str) -> None:
    runs = torch.stack(of_videos.differences[metric, 6])
    assert runs.shape == (2, 2)
    for row, least in enumerate(runs.amin(0).tolist()):
        for factor, left in ((1.001, 1), (0.999, 2)):
            rule = BranchRule("adaptive", 6, metric=metric, threshold=factor * least)
            assert rows_of(video_backbone, row, guidance=rule)[7] == left


def test_ranks_of_videos_are_of_the_last_clip_and_the_chunks_that_a_study_prunes() -> None:
    backbone = star()
    found = calibrate.summary(backbone, collect(backbone, ["a"], seed=1, batch=1), None, prompts=1)
    chunks = space_for(read_space(FILES[0].parent / "unified.yaml"), backbone).target.chunks
    assert chunks == 2 and rank_table(found, chunks) == found.ranks["0.96"]
    assert found.rank_scale == 8 and found.probe is None


def test_the_command_measures_videos_and_says_what_they_do_not_have(video_backbone, tmp_path, capsys) -> None:
    path = tmp_path / "tiny_video.json"
    assert calibrate.main(["backbone=tiny_video", "weights=random", "prompts=2", "batch=2", f"output={path}"]) == 0
    assert "scales of tiny_video see no other scale of their clip and are not probed" in capsys.readouterr().out
    found = Calibration.load(path)
    assert set(found.discrepancies) == set(DISCREPANCIES) and set(found.changes) == set(LATENT_SCORERS)
    assert all(set(rows) == set(range(8)) for rows in found.discrepancies.values())
    assert all(set(rows) == {2, 3, 6, 7} for rows in found.changes.values())
    plain = space_for(read_space(FILES[0].parent / "unified.yaml"), video_backbone)
    known = SearchSpace(plain.definition, plain.target, found)
    gained = {preset.name for preset in known.presets()} - {preset.name for preset in plain.presets()}
    assert "ld-pruning" in gained
    assert any(said.startswith("preset skipvar is left out: scales of tiny_video") for said in known.missing)
    assert not any("needs a calibration" in said for said in known.missing)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prompts=1"], "prompts must be at least 2"),
        (["batch=0"], "batch must be at least 1"),
        (["frames=-1"], "frames must be at least 0"),
        (["weights=random", "frames=9"], "tiny makes images only"),
        (["target_ssim=high"], "target_ssim must be a number"),
        (["target_ssim=1.5"], "above 0 and below 1"),
        (["alpha=0.9"], "choose from backbone"),
        (["backbone=giant"], "giant"),
        (
            ["backbone=infinitystar_480p", "weights=random"],
            "makes videos, which scenes do not ask for; give prompts",
        ),
        (["weights=random", "output=/proc/nowhere/tiny.json"], "must be writable"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two(arguments: list[str], words: str, capsys) -> None:
    assert calibrate.main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(calibrate, "find_spec", lambda name: None if name == "rich" else object())
    assert calibrate.main(["weights=random"]) == 2
    assert "calibration needs rich" in capsys.readouterr().err
