"""The format of search_spaces/*.yaml: references, identity, and every mistake in one sentence."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from autoprune.errors import UserError
from autoprune.search.space_file import read_space, space_from_document

FILES = sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml"))


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
        ({"name": "x", "dimensions": {"keeps": {}}}, "unknown key of dimensions 'keeps'; choose from keep, "),
        ({"name": "x", "dimensions": {}, "presets_of": ["nothing"]}, "unknown search space in presets_of 'nothing'"),
        ({"name": "x", "dimensions": {}, "presets_of": ["skip", "skip"]}, "preset skip-1 is written twice"),
        ({"name": "x", "dimensions": {"threshold": {"low": 1, "high": 0.1}}}, "threshold needs low < high and no step"),
        ({"name": "x", "dimensions": {"similarity": {"low": 0, "high": 1}}}, "similarity needs low < high and a step"),
        ({"name": "x", "dimensions": {"similarity": "high"}}, "similarity must be a number or low, high and step"),
        ({"name": "x", "dimensions": {"floor": 2}}, "floor must be a number between 0.0 and 1.0, got 2"),
        ({"name": "x", "dimensions": {"rows": []}}, "rows must list at least one of per_branch, shared"),
        ({"name": "x", "dimensions": {}, "presets": {"p": {"source": "", "skip_last": 1}}}, "unknown key of preset p"),
        ({"name": "x", "dimensions": {}, "presets": {"p": {"source": "", "restorer": "odd"}}}, "preset p: unknown restorer"),
        ({"name": "x", "dimensions": {}, "presets": {"p": {"keep": [0]}}}, "preset p of the search space is not valid"),
        (
            {"name": "x", "dimensions": {}, "presets": {"p": {"source": "", "floor": {"quantile": 0.5}}}},
            "preset p: only drop_threshold, stop_threshold, threshold may be a quantile",
        ),
    ],
)
def test_a_broken_file_is_described_in_one_sentence(document: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        space_from_document(document)


def test_the_identity_of_a_space_changes_with_its_content() -> None:
    definition = read_space(FILES[0])
    assert definition.sha256() == read_space(FILES[0]).sha256()
    assert replace(definition, dimensions={**definition.dimensions, "skip_last": 0.5}).sha256() != definition.sha256()
    assert replace(definition, presets=definition.presets[:-1]).sha256() != definition.sha256()


def test_a_composed_document_finds_the_shipped_files_and_an_installation_holds_them() -> None:
    document = {"name": "x", "dimensions": {}, "presets_of": ["skip"]}
    assert [preset.name for preset in space_from_document(document).presets][:2] == ["skip-1", "skip-2"]
    folder = FILES[0].parent
    project = tomllib.loads((folder.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = {path for pattern in project["package-data"]["autoprune.search_spaces"] for path in folder.glob(pattern)}
    assert packed == {path for path in folder.rglob("*") if path.suffix in (".yaml", ".json")}


def test_references_are_read_beside_the_file_that_makes_them(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ndimensions: {}\npresets: {p: {source: me, keep: [0]}}\n")
    (tmp_path / "all.yaml").write_text("name: all\ndimensions: {}\npresets_of: [mine]\n")
    assert [preset.name for preset in read_space(tmp_path / "all.yaml").presets] == ["p"]
