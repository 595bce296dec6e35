"""Policy files: round trip, canonical form, and one clear sentence for everything that is wrong with them."""

import hashlib
import json

import pytest

from autoprune.errors import UserError
from autoprune.policy import (
    SCHEMA,
    BranchRule,
    Policy,
    ScalePruning,
    fingerprint,
    kept_count,
)
from autoprune.pruning import RESTORERS, SCORERS

SCHEDULE = ((1, 1, 1), (1, 2, 2), (1, 4, 4), (1, 8, 8), (1, 16, 16))


def make(**changes) -> Policy:
    scales = {3: ScalePruning(keep=0.5, cache_scale=2, layers=(1, 4)), 4: ScalePruning(keep=0.25, cache_scale=2)}
    return Policy(**({"backbone": "tiny", "depth": 6, "scale_schedule": SCHEDULE, "scales": scales} | changes))


@pytest.mark.parametrize(
    ("tokens", "removed", "kept"),
    [(1024, 0.4, 615), (1600, 0.5, 800), (2304, 0.5, 1152), (4096, 0.75, 1024), (10, 0.1, 9), (4, 0.99, 1)],
)
def test_kept_count_truncates_the_removed_tokens(tokens: int, removed: float, kept: int) -> None:
    assert kept_count(tokens, 1 - removed) == kept


def test_names_of_the_file_format_are_the_registered_ones() -> None:
    from autoprune import policy

    assert tuple(SCORERS) == policy.SCORERS
    assert tuple(RESTORERS) == policy.RESTORERS


def test_file_round_trip_keeps_everything(tmp_path) -> None:
    policy = make(guidance=BranchRule("cond", 4), skip_last=0, name="a", tier="high", measured={"speed_up": 1.5, "n": [1, 2]})
    path = policy.save(tmp_path / "deep" / "a.json")
    assert Policy.load(path) == policy
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


def test_file_is_standard_json_with_one_scale_a_line() -> None:
    text = make().to_json()
    document = json.loads(text)
    assert document["schema"] == SCHEMA
    assert document["fingerprint"] == fingerprint(SCHEDULE)
    assert sum(line.strip().startswith(('"3"', '"4"')) for line in text.splitlines()) == 2


def test_canonical_form_drops_what_has_no_effect() -> None:
    plain = make(skip_last=1, guidance=BranchRule("cond", 4))
    assert plain.canonical().scales.keys() == {3}
    assert plain.canonical().guidance == BranchRule()
    assert make(scales={4: ScalePruning(keep=0.999, cache_scale=1)}).is_dense()
    assert (
        make(scales={3: ScalePruning(keep=0.5, cache_scale=2, layers=(0, 5))}).key()
        == make(scales={3: ScalePruning(keep=0.495, cache_scale=2)}).key()
    )
    assert make().key() != make(skip_last=1).key()


def test_canonical_form_is_stable() -> None:
    once = make(scales={4: ScalePruning(keep=0.3333, cache_scale=2)}).canonical()
    assert once.canonical() == once


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ScalePruning(keep=1.2, cache_scale=0), "keep ratio must be above 0 and at most 1, got 1.2"),
        (lambda: ScalePruning(keep=0.0, cache_scale=0), "skip_last"),
        (lambda: ScalePruning(keep=0.5, cache_scale=0, scorer="magic"), "choose from dc, random"),
        (lambda: ScalePruning(keep=0.5, cache_scale=0, interpolation="cubic"), "unknown interpolation 'cubic'"),
        (lambda: BranchRule("neither"), "choose from both, cond, uncond"),
        (lambda: make(scales={2: ScalePruning(keep=0.5, cache_scale=3)}), "cache scale must be a dense scale before"),
        (
            lambda: make(scales={2: ScalePruning(keep=0.5, cache_scale=1), 3: ScalePruning(keep=0.5, cache_scale=2)}),
            "before the first pruned scale (2), got 2 at scale 3",
        ),
        (lambda: make(scales={9: ScalePruning(keep=0.5, cache_scale=1)}), "scales 0 to 4"),
        (lambda: make(scales={3: ScalePruning(keep=0.5, cache_scale=1, layers=(4, 6))}), "within 0 to 5"),
        (lambda: make(skip_last=5), "skip_last must be between 0 and 4"),
        (lambda: make().check_fits("other", 6, SCHEDULE), "for backbone 'tiny', not 'other'"),
        (lambda: make().check_fits("tiny", 8, SCHEDULE), "for 6 layers, the backbone has 8"),
        (lambda: make().check_fits("tiny", 6, SCHEDULE[:4]), "scale schedule"),
        (lambda: make().for_schedule(SCHEDULE[:3]), "must have 5 scales too"),
        (lambda: Policy.load("/nowhere/p.json"), "cannot be read"),
    ],
)
def test_a_broken_rule_is_one_sentence(build, words: str) -> None:
    with pytest.raises(UserError) as caught:
        build()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_edited_and_foreign_files_are_refused() -> None:
    text = make().to_json()
    with pytest.raises(UserError, match="not complete JSON"):
        Policy.from_json(text[: len(text) // 2])
    with pytest.raises(UserError, match="digest does not match"):
        Policy.from_json(text.replace('"keep": 0.25', '"keep": 0.20'))
    with pytest.raises(UserError, match="must have schema"):
        Policy.from_json(text.replace(SCHEMA, "autoprune.policy/9"))
    with pytest.raises(UserError, match="must have schema"):
        Policy.from_json("[1, 2]")


@pytest.mark.parametrize(
    "change", [{"scales": {"x": {}}}, {"scales": [1]}, {"scale_schedule": 3}, {"guidance": {"to": 1}}, {"depth": None}]
)
def test_sealed_files_with_wrong_fields_are_refused_in_one_sentence(change: dict) -> None:
    document = json.loads(make(guidance=BranchRule("cond", 4)).to_json()) | change
    document.pop("digest")
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    document["digest"] = "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
    with pytest.raises(UserError, match="does not have the fields"):
        Policy.from_json(json.dumps(document))


def test_a_policy_moves_to_another_aspect_ratio_without_its_measurements() -> None:
    wide = tuple((1, h, 2 * w) for _, h, w in SCHEDULE)
    moved = make(measured={"speed_up": 2.0}, tier="high").for_schedule(wide)
    moved.check_fits("tiny", 6, wide)
    assert not moved.measured
    assert not moved.tier
