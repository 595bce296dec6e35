"""Policy files: round trip, canonical form, and one clear sentence for everything that is wrong with them."""

import hashlib
import json

import pytest

from autoprune import rules
from autoprune.errors import UserError
from autoprune.policy import SCHEMA, Policy, fingerprint, kept_count
from autoprune.pruning import RESTORERS, SCORERS
from autoprune.rules import BranchRule, KeyRule, ProbeRule, ScalePruning, StopRule

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
    assert tuple(SCORERS) == rules.SCORERS
    assert tuple(RESTORERS) == rules.RESTORERS


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


def test_every_rule_survives_the_file(tmp_path) -> None:
    scale = ScalePruning(
        0.4, 2, {"structure": 0.5, "texture": 2.0}, "scale", normalise="rank", select="threshold", threshold=0.2, floor=0.1
    )
    probe = ProbeRule(2, 1, (0.1, 0.2), (1.0, 2.0), (1.0, -1.0), (0.5,), (1.5,))
    policy = make(
        scales={3: scale},
        guidance=BranchRule("adaptive", 2, "extrapolate", "kl_bits", 0.1),
        stop=StopRule(3, 0.1, 0.05),
        probe=probe,
        keys=KeyRule(2, 1),
        batch="split",
    )
    assert Policy.load(policy.save(tmp_path / "p.json")) == policy and policy.adaptive


def test_files_of_before_the_wider_vocabulary_still_load() -> None:
    old = {"keep": 0.5, "cache_scale": 2, "scorer": "dc", "granularity": "sublayer", "layers": [1, 4], "rows": "per_branch"}
    document = json.loads(make().to_json())
    document["scales"] = {"3": old | {"restorer": "cached", "interpolation": "area"}}
    for name in ("chunks", "stop", "probe", "group_from", "keys", "batch", "digest"):
        document.pop(name)
    document["guidance"] = {"branch": "both", "from_scale": 0}
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    document["digest"] = "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
    assert Policy.from_json(json.dumps(document)) == make(scales={3: ScalePruning(0.5, 2, layers=(1, 4))})


def test_inactive_fields_never_tell_two_policies_apart() -> None:
    plain = make(scales={3: ScalePruning(0.5, 2, granularity="scale")})
    inactive = {
        "layers": (1, 2),
        "sublayers": ("sa",),
        "ranks": (),
        "threshold": 0.5,
        "floor": 0.5,
        "cell": 3,
        "positions": "kept",
    }
    inactive |= {"recover_at": "codes", "similarity": 0.1, "chunk": 5, "region": 4, "normalise": "rank", "scorer": {"dc": 3.0}}
    assert make(scales={3: ScalePruning(0.5, 2, granularity="scale", **{"scorer": "dc"} | inactive)}).key() == plain.key()
    assert make(scales={3: ScalePruning(0.5, 1, granularity="scale")}).key() != plain.key()
    assert make(scales={3: ScalePruning(0.5, 1, granularity="scale", restorer="identity")}).key() == (
        make(scales={3: ScalePruning(0.5, granularity="scale", restorer="identity", interpolation="nearest")}).key()
    )


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
        (lambda: ScalePruning(keep=0.5, cache_scale=0, scorer="magic"), "choose from dc, structure"),
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
        (lambda: ScalePruning(0.5, 0, scorer={"dc": 0.0}), "not all 0"),
        (lambda: ScalePruning(0.5, 0, scorer={"dc": 1, "magic": 1}), "unknown scorer 'magic'"),
        (lambda: ScalePruning(0.5), "needs a cache scale"),
        (lambda: ScalePruning(0.5, 0, reducer="merge"), "merging goes with the restorer merged"),
        (lambda: ScalePruning(0.5, reducer="merge", restorer="merged", granularity="scale"), "merging works around sublayers"),
        (lambda: ScalePruning(0.5, 0, reducer="project"), "projection replaces tokens of a chunk or scale"),
        (lambda: ScalePruning(0.5, 0, reducer="project", granularity="chunk"), "set restorer to cached_state"),
        (lambda: ScalePruning(0.5, 0, restorer="cached_state"), "cached_state restores hidden states"),
        (lambda: ScalePruning(0.5, restorer="zero_residual"), "set granularity to scale"),
        (lambda: ScalePruning(0.5, restorer="anchor", granularity="scale"), "needs anchors"),
        (lambda: ScalePruning(0.5, restorer="identity", select="threshold"), "applied once a scale"),
        (lambda: ScalePruning(0.5, 0, ranks=(1.5,)), "ranks must be above 0 and at most 1"),
        (lambda: ScalePruning(0.5, 0, floor=2.0), "floor must be between 0 and 1"),
        (lambda: ScalePruning(0.5, 0, sublayers=()), "at least one of sa, ca, ffn"),
        (lambda: make(scales={3: ScalePruning(0.5, 2, granularity="chunk", ranks=(0.5, 0.5))}), "each of the 6 chunks, got 2"),
        (lambda: make(scales={3: ScalePruning(0.5, 2, scorer="delta", chunk=7)}), "must be below 6, got 7"),
        (lambda: make(scales={1: ScalePruning(0.5, 0, scorer="latent_l2")}), "use it from scale 2 on, got scale 1"),
        (
            lambda: make(scales={4: ScalePruning(0.5, 2, scorer="cond_uncond")}, guidance=BranchRule("cond", 3)),
            "needs both branches at the scale before",
        ),
        (lambda: make(group_from=0), "decoded together from a scale between 1 and 4, got 0"),
        (lambda: make(group_from=3), "set scale 3 to granularity scale and restorer zero_residual"),
        (lambda: make(scales={}, group_from=3, guidance=BranchRule("cond", 4)), "no branch can be dropped within the scales 3"),
        (lambda: BranchRule("uncond", 2, "extrapolate"), "set branch to cond or adaptive"),
        (lambda: StopRule(1, 0.1, 0.1), "stop from scale 2 on, got 1"),
        (lambda: ProbeRule(3, 4, (0, 0), (1, 1), (1, 1)), "must not be after the decision scale 3, got 4"),
        (lambda: ProbeRule(3, 2, (0, 0), (1, 1), (1, 1), (2.0, 1.0)), "must ascend"),
        (lambda: make(probe=ProbeRule(4, 2, (0, 0), (1, 1), (1, 1), (1.0, 2.0))), "before the first scale it can change (3)"),
        (lambda: KeyRule(first=1), "names both"),
        (lambda: KeyRule(first=1, last=1, budget=0.5), "either whole scales or a budget"),
        (lambda: make(batch="some"), "choose from all, split"),
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


def test_conditions_that_both_sides_know_are_compared_and_torch_by_its_minor_version() -> None:
    there = {"device": "cpu", "threads": 2, "torch": "2.13.0+cpu", "driver": "550.1", "batch": 16}
    policy = make(measured=there)
    assert policy.mismatches(there) == policy.mismatches({"torch": "2.13.1", "driver": "560.2", "dtype": "float16"}) == []
    assert policy.mismatches({"device": "cuda", "threads": 2, "torch": "2.12.0", "batch": 1}) == [
        "device cpu, here cuda",
        "torch 2.13, here 2.12",
        "batch 16, here 1",
    ]
    assert make().mismatches(there) == []


def test_a_policy_that_changes_nothing_on_another_schedule_is_found_there() -> None:
    policy = make(scales={4: ScalePruning(keep=0.9, cache_scale=1)}, name="small")
    policy.check_prunes()
    with pytest.raises(UserError, match="must change something on its schedule, 'small' runs every token of "):
        policy.for_schedule(tuple((1, min(3, h), min(3, w)) for _, h, w in SCHEDULE)).check_prunes()
