"""The comparison: the share of computed tokens against real runs, what a small one measures and writes, bad input, Ctrl-C."""

import json
import signal
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.transforms import Bbox
from PIL import Image, ImageSequence
from tiny_star import star

from autoprune import compare as command
from autoprune.backbones import Sampling, load_backbone
from autoprune.generation import Observer, generate
from autoprune.measure.flops import transformer_shape
from autoprune.policy import Policy
from autoprune.pruning.plan import compile_plan
from autoprune.rules import BranchRule, ScalePruning, StopRule
from autoprune.search.comparison import ComputedTokens, compare, computed_tokens, share_computed
from autoprune.search.comparison_figures import place_boxes, save_comparison_pictures
from autoprune.search.comparison_records import ComparisonSettings, file_candidates, preset_candidates
from autoprune.search.comparison_report import comparison_table, write_comparison
from autoprune.search.progress import NullProgress, RichProgress
from autoprune.search.prompt_files import read_prompts
from autoprune.search.space import SearchSpace, Target
from autoprune.search.space_file import read_space
from autoprune.testbed.captions import prompt_set

SPACE = Path(__file__).parent.parent / "search_spaces" / "fastvar.yaml"
FILES = {"comparison.json", "comparison.md", "comparison.png", "comparison-pictures.png"}
SMALL = ("weights=random", "search_spaces=fastvar", "prompts=3", "batch=2", "rounds=1", "per_prompt=1")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny", weights="random")


@pytest.fixture
def policy_file(backbone, tmp_path):
    pruned = Policy("tiny", backbone.depth, backbone.scale_schedule(), {6: ScalePruning(0.5, 4)}, BranchRule("cond", 5))
    return pruned.save(tmp_path / "policies" / "mine.json")


def target(backbone) -> Target:
    return Target("tiny", backbone.depth, backbone.scale_schedule())


def tokens_seen(backbone, policy: Policy | None, observer: Observer | None = None) -> int:
    """Counts tokens that enter a sublayer in real generations of two images, guidance rows included."""
    seen = []
    sublayers = [part for block in backbone.model.layers() for part in (block.sa, block.ca, block.ffn)]
    hooks = [part.register_forward_pre_hook(lambda _, given: seen.append(given[0][..., 0].numel())) for part in sublayers]
    generate(backbone, ["a red circle", "a blue ring"], policy=policy, observer=observer)
    for hook in hooks:
        hook.remove()
    return sum(seen)


@pytest.mark.parametrize(
    "decisions",
    [
        {"skip_last": 2},
        {"guidance": BranchRule("uncond", 4)},
        {"scales": {6: ScalePruning(0.37, 4, layers=(1, 3), sublayers=("sa", "ffn"))}},
        {"scales": {5: ScalePruning(0.6, 3), 6: ScalePruning(0.25, 4, granularity="scale")}, "guidance": BranchRule("cond", 6)},
        {"scales": {5: ScalePruning(0.5, 4, granularity="chunk", ranks=(0.2, 1.0, 0.5))}, "chunks": 3, "skip_last": 1},
        {"scales": {6: ScalePruning(0.5, reducer="merge", restorer="merged", sublayers=("sa",))}},
        {"scales": {6: ScalePruning(0.3, granularity="scale", restorer="zero_residual")}, "group_from": 5},
    ],
    ids=["skip", "one branch", "some sublayers", "mixed", "chunks", "merge", "group"],
)
def test_share_computed_is_what_a_real_run_computes(backbone, decisions):
    policy = Policy("tiny", backbone.depth, backbone.scale_schedule(), **decisions)
    plan = compile_plan(policy, policy.scale_schedule, policy.depth)
    counter = ComputedTokens(plan)
    seen = tokens_seen(backbone, policy, counter)
    assert share_computed(plan) == pytest.approx(seen / tokens_seen(backbone, None), abs=1e-12)
    assert 0 < share_computed(plan) < 1 and counter.tokens == seen


@pytest.mark.parametrize("batch", ["all", "split"])
@pytest.mark.parametrize(
    "decisions",
    [
        {"scales": {6: ScalePruning(0.9, 4, granularity="scale", select="threshold", threshold=0.3)}},
        {"stop": StopRule(3, threshold=100.0, share=0.5)},
        {"guidance": BranchRule("adaptive", 2, threshold=1e9), "scales": {6: ScalePruning(0.5, 4, sublayers=("ffn",))}},
    ],
    ids=["threshold", "stop", "adaptive branch"],
)
def test_tokens_are_counted_where_a_policy_decides_while_it_generates(backbone, decisions, batch):
    policy = Policy("tiny", backbone.depth, backbone.scale_schedule(), **decisions, batch=batch)
    plan = compile_plan(policy, policy.scale_schedule, policy.depth)
    counter = ComputedTokens(plan)
    assert tokens_seen(backbone, policy, counter) == counter.tokens < 2 * computed_tokens(plan)


class FromTheFirstScale(ComputedTokens):
    """Drops what hooks saw of the text."""

    def __init__(self, plan, sublayers, seen: list[int]) -> None:
        super().__init__(plan, sublayers)
        self._seen = seen

    def scale_started(self, scale) -> None:
        if scale.step == 0:
            self._seen.clear()


@pytest.mark.parametrize(
    "decisions",
    [
        {},
        {"scales": {8: ScalePruning(0.5, 6, sublayers=("ffn",))}},
        {"scales": {7: ScalePruning(0.4, 6, granularity="scale")}, "fewer_repetitions": {8: 1}},
        {"scales": {7: ScalePruning(0.9, 6, granularity="scale", select="threshold", threshold=0.5)}},
        {"guidance": BranchRule("adaptive", 7, threshold=1e9), "scales": {7: ScalePruning(0.5, 6)}},
    ],
    ids=["dense", "one sublayer", "repetitions", "threshold", "adaptive branch"],
)
def test_tokens_of_videos_are_counted_run_by_run_where_blocks_have_two_sublayers(decisions):
    backbone, seen = star(), []
    policy = Policy(backbone.name, backbone.depth, backbone.scale_schedule(), **decisions)
    plan, sublayers = backbone.plan(policy), transformer_shape(backbone.model).sublayers
    for part in (part for block in backbone.model.layers() for part in (block.attn, block.mlp)):
        part.register_forward_pre_hook(lambda _, given: seen.append(given[0][..., 0].numel()))
    counter = FromTheFirstScale(plan, sublayers, seen)
    generate(backbone, ["a"], policy=policy, observer=counter)
    assert counter.tokens == sum(seen) <= computed_tokens(plan, sublayers)
    assert policy.adaptive or sum(seen) == computed_tokens(plan, sublayers)


def test_share_computed_by_hand():
    schedule = ((1, 1, 1), (1, 2, 2), (1, 4, 4))
    assert share_computed(compile_plan(None, schedule, 2)) == 1
    pruned = Policy("x", 2, schedule, {2: ScalePruning(0.5, 1, layers=(1, 1), sublayers=("ca",))}, BranchRule("cond", 2))
    both, last = 2 * 6 * (1 + 4), 6 * 16 - 8
    assert share_computed(compile_plan(pruned, schedule, 2)) == pytest.approx((both + last) / (2 * 6 * 21))


def test_two_presets_and_a_file_are_measured_alike_and_written(backbone, policy_file, tmp_path):
    presets = preset_candidates(SearchSpace(read_space(SPACE), target(backbone)))[:2]
    candidates = [*presets, *file_candidates(policy_file, target(backbone), taken=[])]
    settings = ComparisonSettings(prompts=3, batch=2, rounds=3, per_prompt=2, seed=5)
    comparison = compare(backbone, candidates, settings, progress=NullProgress())
    assert comparison.rounds == 3 and not comparison.interrupted
    paths = write_comparison(comparison, tmp_path / "deep" / "out", command="the command", left_out=["one is missing."])
    assert {path.name for path in paths} == FILES == {path.name for path in (tmp_path / "deep" / "out").iterdir()}

    record = json.loads(paths[0].read_text())
    assert record["schema"] == "autoprune.comparison/1" and record["machine"]["torch"] and record["machine"]["dtype"]
    dense, *rows = record["policies"]
    assert [row["name"] for row in rows] == [*(preset.name for preset in presets), "mine"]
    assert (dense["name"], dense["speed_up"], dense["score_drop"], dense["share_computed"]) == ("dense", 1, 0, 1)
    assert dense["loss"] == pytest.approx(0, abs=1e-6) and dense["psnr"] == 100
    for row, candidate in zip(rows, candidates, strict=True):
        assert Policy.from_json(json.dumps(row["policy"])) == candidate.policy
        assert row["speed_up"] == pytest.approx(dense["latency_p50"] / row["latency_p50"])
        assert row["latency_p50"] <= row["latency_p95"] and row["prompt_p50"] <= row["prompt_p95"]
        assert row["loss_interval"][0] <= row["loss"] <= row["loss_interval"][1]
        assert row["peak_memory_mb"] > 0 and row["prompts"] == 3 and row["batch"] == 2

    text = paths[1].read_text()
    assert all(f"| {name} |" in text for name in ("dense", *(candidate.name for candidate in candidates)))
    assert "`the command`" in text and "- one is missing." in text and comparison_table(comparison).row_count == 4
    assert np.asarray(Image.open(paths[2])).std() > 0
    assert np.asarray(Image.open(paths[3])).shape[1] > 4 * 160


def test_pictures_of_videos_move_under_the_names_of_their_policies(tmp_path):
    red, green = torch.zeros(2, 3, 2, 16, 32), torch.zeros(2, 3, 2, 16, 32)
    red[1, 0, 1], green[0, 1, 0] = 1.0, 1.0
    comparison = SimpleNamespace(pictures={"dense": red, "mine": green}, texts=("one", "two"), frame_rate=8.0)
    path = save_comparison_pictures(comparison, tmp_path / "comparison-pictures.png")
    assert path == tmp_path / "comparison-pictures.webp"
    with Image.open(path) as moving:
        sheets = [np.asarray(sheet.convert("RGB")) for sheet in ImageSequence.Iterator(moving)]
        assert moving.info["duration"] == 125
    height, width = sheets[0].shape[:2]
    corners = [(height - 48 - row * 88, width - 88 - column * 168) for row in (1, 0) for column in (1, 0)]
    shown = np.array([[sheet[corner] for corner in corners] for sheet in sheets])
    expected = [[(0, 0, 0), (0, 255, 0), (0, 0, 0), (0, 0, 0)], [(0, 0, 0), (0, 0, 0), (255, 0, 0), (0, 0, 0)]]
    np.testing.assert_allclose(shown, expected, atol=8)


def test_fidelity_is_that_of_the_same_prompts_and_noise_generated_directly(backbone, policy_file):
    candidates = file_candidates(policy_file, target(backbone), taken=[])
    settings = ComparisonSettings(prompts=3, batch=2, rounds=1, per_prompt=0, seed=5)
    comparison = compare(backbone, candidates, settings, progress=NullProgress())
    row = comparison.policies[1]
    texts = [prompt.text for prompt in prompt_set("held_out", 3, seed=5)]

    def images(policy: Policy | None) -> np.ndarray:
        parts = []
        for first in (0, 2):
            sampling = Sampling(backbone.sampling.guidance, backbone.sampling.temperature, first_sample=first)
            given = {"policy": policy, "seed": row.measurement.seed, "sampling": sampling}
            parts.append(generate(backbone, texts[first : first + 2], **given).double().cpu().numpy())
        return np.concatenate(parts)

    squares = ((images(None) - images(candidates[0].policy)) ** 2).mean((1, 2, 3))
    assert row.measurement.psnr == pytest.approx((-10 * np.log10(squares)).mean(), abs=0.01)
    assert row.prompt_quantiles is None and len(row.candidate.policy.scales) == 1
    assert torch.equal(comparison.pictures["dense"].cpu(), torch.from_numpy(images(None)[:2]).float())


def test_the_command_compares_every_preset_of_a_space_and_a_folder(policy_file, tmp_path, capsys):
    Policy.load(policy_file).save(policy_file.with_name("dense.json"))
    folder = tmp_path / "out"
    assert command.main([*SMALL, f"policies={policy_file.parent}", f"output={folder}"]) == 0
    names = [row["name"] for row in json.loads((folder / "comparison.json").read_text())["policies"]]
    presets = [preset.name for preset in read_space(SPACE).presets if not preset.videos]
    assert names == ["dense", *presets, "dense.json", "mine"]
    shown = capsys.readouterr().out
    assert all(name in shown for name in names) and "comparison-pictures.png" in shown


def test_prompts_of_a_file_are_compared_without_scores(policy_file, tmp_path, capsys):
    own = tmp_path / "own.txt"
    own.write_text("\n".join(f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "ring", "square")))
    folder = tmp_path / "out"
    arguments = [*SMALL, f"policies={policy_file}", f"prompts_file={own}", f"output={folder}"]
    assert command.main([*arguments, "prompts=2"]) == 0
    record = json.loads((folder / "comparison.json").read_text())
    assert record["prompts_sha256"] == read_prompts(own).sha256()
    for row in record["policies"]:
        assert row["score"] is row["score_drop"] is row["score_drop_interval"] is None and row["prompts"] == 2
    assert "| mine | file |" in (folder / "comparison.md").read_text()
    assert command.main([*arguments, "prompts=6"]) == 2
    assert "prompts must be at most " in capsys.readouterr().err
    own.write_text("a red circle\na purple ring\n" * 2 + "\n".join(f"a purple ring {'of ' * count}" for count in range(9)))
    assert command.main([*arguments, "prompts=3"]) == 2
    assert "the embedded text encoder knows a closed vocabulary, got 'purple'; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["speed=1"], "unknown argument 'speed'; choose from backbone, "),
        (["rounds=many"], "rounds must be a whole number, got 'many'."),
        (["prompts=0"], "prompts must be at least 1, got 0."),
        (["batch=0"], "batch must be at least 1, got 0."),
        (["rounds=0"], "rounds must be at least 1, got 0."),
        (["per_prompt=-1"], "per_prompt must be at least 0, got -1."),
        (["backbone=huge"], "unknown backbone 'huge'; choose from tiny"),
        (
            ["backbone=infinitystar_720p", "weights=random"],
            "makes videos, which scenes do not ask for; give prompts",
        ),
        (["search_spaces=best"], "unknown search space 'best'; choose from "),
        (["policies=missing.json"], "policy file 'missing.json' cannot be read (FileNotFoundError); "),
        (["policies=EMPTY"], "policies must be a policy file or a folder with some, "),
        (["policies=OTHER"], "other.json: the policy is for backbone 'other', not 'tiny'; "),
        (["policies=BROKEN"], "broken.json is not complete JSON"),
        (["policies=NOTHING"], "nothing.json: a policy must change something on its schedule, 'this one' runs every token of "),
        (["prompts_file=missing"], "prompts 'missing' cannot be read (No such file or directory); "),
        (["prompts=own.txt"], "prompts must be a whole number, got 'own.txt'."),
        (["output=/dev/null/x"], "output '/dev/null/x' must be writable (Not a directory); choose another folder."),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2_before_any_work(tmp_path, policy_file, capsys, arguments, sentence):
    text = policy_file.read_text()
    places = {name: tmp_path / f"{name.lower()}.json" for name in ("OTHER", "BROKEN", "NOTHING")} | {
        "EMPTY": tmp_path / "empty"
    }
    places["EMPTY"].mkdir()
    places["BROKEN"].write_text(text[: len(text) // 2])
    replace(Policy.load(policy_file), scales={}, guidance=BranchRule()).save(places["NOTHING"])
    Policy("other", 6, ((1, 1, 1), (1, 2, 2)), skip_last=1).save(places["OTHER"])
    for name, place in places.items():
        arguments = [argument.replace(f"policies={name}", f"policies={place}") for argument in arguments]
    assert command.main([*SMALL, f"output={tmp_path / 'out'}", *arguments]) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(("rounds", "written"), [(0, set()), (1, FILES)], ids=["before a round", "after a round"])
def test_ctrl_c_keeps_the_rounds_that_are_done(tmp_path, capsys, monkeypatch, rounds, written):
    class PressesCtrlC(RichProgress):
        runs, steps = 0, 0

        def phase(self, name: str, total: int) -> None:
            self.runs = self.runs or total

        def step(self) -> None:
            self.steps += 1
            if self.steps == self.runs * (1 + rounds) + 2:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("autoprune.search.progress.RichProgress", PressesCtrlC)
    assert command.main([*SMALL, f"output={tmp_path}"]) == 130
    assert {path.name for path in tmp_path.iterdir()} == written
    shown = capsys.readouterr().err
    assert ("1 of 2 rounds were finished" if written else "nothing was written") in shown
    if written:
        record = json.loads((tmp_path / "comparison.json").read_text())
        assert (record["interrupted"], record["rounds"]) == (True, 1)
        assert {(row["prompts"], row["prompt_p50"]) for row in record["policies"]} == {(2, None)}


def test_labels_of_crowded_points_do_not_overlap():
    random = np.random.default_rng(0)
    points = np.concatenate([random.normal((300, 200), 15, (15, 2)), random.uniform((50, 50), (750, 450), (15, 2))])
    sizes = random.uniform((60, 12), (140, 16), (30, 2))
    markers = [Bbox.from_bounds(x - 13, y - 13, 26, 26) for x, y in points]
    frame = Bbox.from_bounds(0, 0, 800, 500)
    bars = [Bbox.from_bounds(x - 1, y - 60, 2, 120) for x, y in points]
    boxes = place_boxes(points, sizes, taken=markers, crossed=bars, frame=frame)
    for one, other in [*combinations(boxes, 2), *((box, marker) for box in boxes for marker in markers)]:
        assert one.x1 <= other.x0 or other.x1 <= one.x0 or one.y1 <= other.y0 or other.y1 <= one.y0
    for box, (width, height) in zip(boxes, sizes, strict=True):
        assert box.width == pytest.approx(width) and box.height == pytest.approx(height)
        assert box.x0 >= 0 and box.x1 <= 800 and box.y0 >= 0 and box.y1 <= 500
