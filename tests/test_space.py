"""The map from flat vectors to canonical policies, and presets on every schedule."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

from autoprune.backbones.schedules import ASPECT_RATIOS, scale_schedule
from autoprune.errors import UserError
from autoprune.policy import BranchRule, Policy, ScalePruning, kept_count, token_count
from autoprune.search.neighbour import unseen_neighbour
from autoprune.search.space import SearchSpace, Target
from autoprune.search.space_file import read_space, space_from_document

FILES = sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml"))
TARGETS = {
    "tiny": Target("tiny", 6, scale_schedule(1.0, "0.06M")),
    "infinity2b": Target("infinity2b", 32, scale_schedule(1.0, "1M")),
    "infinity8b-quarter": Target("infinity8b", 40, scale_schedule(1.0, "0.25M")),
}


def space(name: str, target: str) -> SearchSpace:
    return SearchSpace(read_space(FILES[0].parent / f"{name}.yaml"), TARGETS[target])


def random_vectors(flat: dict, count: int) -> list[dict]:
    study = optuna.create_study(directions=["minimize"] * 2, sampler=optuna.samplers.RandomSampler(seed=0))
    return [study.ask(fixed_distributions=flat).params for _ in range(count)]


def test_fastvar_on_infinity_2b_at_1m_is_the_papers_setting_exactly() -> None:
    for name in ("fastvar", "unified"):
        preset = next(preset for preset in space(name, "infinity2b").presets() if preset.name == "fastvar")
        rule = {"cache_scale": 8, "scorer": "dc", "granularity": "sublayer", "layers": (3, 27), "rows": "per_branch"}
        published = Policy(
            backbone="infinity2b",
            depth=32,
            scale_schedule=TARGETS["infinity2b"].scale_schedule,
            scales={9: ScalePruning(keep=0.6, **rule), 10: ScalePruning(keep=0.5, **rule)},
            skip_last=2,
        )
        assert preset.policy == published.canonical()
        assert [kept_count(token_count(preset.policy.scale_schedule[k]), preset.policy.scales[k].keep) for k in (9, 10)] == [
            615,
            800,
        ]


def test_fastvar_layers_on_infinity_8b_are_those_of_the_known_port() -> None:
    target = Target("infinity8b", 40, scale_schedule(1.0, "1M"))
    preset = SearchSpace(read_space(FILES[0]), target).presets()[1]
    assert preset.policy.scales[9].layers == (4, 34)


def test_fastvar_on_the_embedded_schedule_keeps_its_relative_position() -> None:
    policy = next(preset for preset in space("unified", "tiny").presets() if preset.name == "fastvar").policy
    assert policy.skip_last == 1 and list(policy.scales) == [5]
    assert policy.scales[5].cache_scale == 4 and policy.scales[5].layers == (1, 4)
    assert policy.scales[5].keep == kept_count(144, 0.6) / 144


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("target", TARGETS)
def test_every_preset_lies_in_the_space_and_round_trips_through_its_vector(path: Path, target: str) -> None:
    here = SearchSpace(read_space(path), TARGETS[target])
    flat = here.distributions
    for preset in here.presets():
        if preset.vector is None:
            assert {pruning.scorer for pruning in preset.policy.scales.values()} == {"random"}
            continue
        assert set(preset.vector) == set(flat)
        for name, value in preset.vector.items():
            assert flat[name]._contains(flat[name].to_internal_repr(value))
        assert here.policy(preset.vector).key() == preset.policy.key()
    assert here.presets()[0].name == "dense" and here.presets()[0].policy.is_dense()


@pytest.mark.parametrize("ratio", sorted(ASPECT_RATIOS)[::3])
def test_presets_exist_on_other_aspect_ratios(ratio: float) -> None:
    target = Target("infinity2b", 32, scale_schedule(ratio, "1M"))
    policy = SearchSpace(read_space(FILES[0]), target).presets()[1].policy
    assert policy.skip_last == 2 and list(policy.scales) == [9, 10]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("target", TARGETS)
def test_every_vector_is_a_valid_canonical_policy(path: Path, target: str) -> None:
    here = SearchSpace(read_space(path), TARGETS[target])
    for vector in random_vectors(here.distributions, 150):
        policy = here.policy(vector)
        assert policy == policy.canonical() and Policy.from_json(policy.to_json()) == policy
        for index, pruning in policy.scales.items():
            tokens = token_count(policy.scale_schedule[index])
            assert pruning.keep * tokens == pytest.approx(round(pruning.keep * tokens)) and 0 < pruning.keep < 1
            assert pruning.cache_scale < min(policy.scales)


def test_inactive_fields_do_not_change_the_policy() -> None:
    here = space("unified", "tiny")
    dense = dict(here.presets()[0].vector)
    for changes in (
        {"branch": "uncond"},
        {"cache_before": 3},
        {"rows": "shared"},
        {"exempt_first": 2},
        {"interpolation": "nearest"},
    ):
        assert here.policy(dense | changes).is_dense()
    pruned = dense | {"keep_6": 0.5, "skip_last": 1}
    assert here.policy(pruned).key() == here.policy(dense | {"skip_last": 1}).key()
    scale = dense | {"keep_6": 0.5, "granularity": "scale"}
    assert here.policy(scale).key() == here.policy(scale | {"exempt_last": 2, "rows": "shared"}).key()
    single = dense | {"keep_6": 0.5, "single_branch_scales": 1}
    assert here.policy(single).key() == here.policy(single | {"rows": "shared"}).key()


def test_single_branch_counts_from_the_last_scale_that_runs() -> None:
    here = space("unified", "tiny")
    dense = dict(here.presets()[0].vector)
    assert here.policy(dense | {"single_branch_scales": 2, "skip_last": 1}).guidance == BranchRule("cond", 4)


def test_the_cache_scale_never_reaches_below_the_first_scale() -> None:
    short = SearchSpace(read_space(FILES[1]), Target("tiny", 6, ((1, 1, 1), (1, 2, 2), (1, 4, 4))))
    vector = {f"keep_{scale}": 0.5 for scale in short.prunable} | {"cache_before": 3}
    assert {pruning.cache_scale for pruning in short.policy(vector).scales.values()} == {0}


def test_different_active_choices_have_different_keys() -> None:
    here = space("unified", "tiny")
    dense = dict(here.presets()[0].vector)
    variants = [
        dense | {"pruned_scales": 1, "keep_6": 0.5, "interpolation": mode, "rows": rows, "cache_before": cache}
        for mode, rows, cache in itertools.product(("area", "nearest"), ("per_branch", "shared"), (1, 2))
    ]
    assert len({here.policy(vector).key() for vector in variants}) == len(variants)


def test_a_preset_outside_the_space_is_refused_by_name() -> None:
    definition = space("fastvar", "tiny").definition
    wide = replace(definition, presets=(replace(definition.presets[0], keep=(0.05,), of_scales=None),))
    with pytest.raises(UserError, match="preset fastvar sets keep_6 to 0.05, outside"):
        SearchSpace(wide, TARGETS["tiny"]).presets()
    other = replace(definition, presets=(replace(definition.presets[0], granularity="scale"),))
    with pytest.raises(UserError, match="granularity to scale, which this space does not free"):
        SearchSpace(other, TARGETS["tiny"]).presets()


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"name": "x", "dimension": {}}, "unknown key of search space 'dimension'; choose from"),
        (
            {"name": "x", "dimensions": {"keep": {"last_scales": 0.3, "low": 0.1, "step": 0.1}, "rows": ["odd"]}},
            "unknown rows 'odd'",
        ),
        ({"name": "x", "dimensions": {"keep": {"last_scales": 3, "low": 0.1, "step": 0.1}}}, "share and must be in"),
        ({"name": "x", "dimensions": {"keep": {"low": 0.1}}}, "missing"),
        (
            {
                "name": "x",
                "dimensions": {"keep": {"last_scales": 0.3, "low": 0.1, "step": 0.1}},
                "presets": {"p": {"source": "", "keep": [1.2]}},
            },
            r"keep ratio must be in \[0, 1\], got 1.2 in preset p",
        ),
    ],
)
def test_a_broken_file_is_described_in_one_sentence(document: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        space_from_document(document)


def test_the_identity_of_a_space_changes_with_its_content() -> None:
    definition = read_space(FILES[0])
    assert definition.sha256() == read_space(FILES[0]).sha256()
    assert replace(definition, dimensions=replace(definition.dimensions, skip_last=0.5)).sha256() != definition.sha256()


def test_neighbours_are_unseen_valid_vectors() -> None:
    here = space("unified", "tiny")
    flat, front = here.distributions, [dict(preset.vector) for preset in here.presets() if preset.vector]
    known = {here.policy(vector).key() for vector in front}
    for seed in range(30):
        vector = unseen_neighbour(here, front, known=known, seed=seed)
        assert all(flat[name]._contains(flat[name].to_internal_repr(value)) for name, value in vector.items())
        key = here.policy(vector).key()
        assert key not in known
        known.add(key)
    assert np.unique(list(known)).size == len(known)


def test_one_dimension_says_how_many_scales_are_pruned() -> None:
    here = space("unified", "tiny")
    vector = dict(here.presets()[0].vector) | {"keep_4": 0.5, "keep_5": 0.5, "keep_6": 0.5}
    pruned = [sorted(here.policy(vector | {"pruned_scales": count}).scales) for count in range(4)]
    assert pruned == [[], [6], [5, 6], [4, 5, 6]]
    assert sorted(here.policy(vector | {"pruned_scales": 1, "skip_last": 1}).scales) == [5]
