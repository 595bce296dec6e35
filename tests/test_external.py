"""The external metric with a real program: a small Python script that scores, errs, crashes, hangs."""

import json
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoprune.errors import UserError
from autoprune.measure.metrics.contract import ImageBatch, MetricContext
from autoprune.measure.metrics.external import External
from autoprune.measure.metrics.external_program import read_scores, run_program
from autoprune.measure.metrics.external_recipe import Recipe
from autoprune.measure.metrics.suite import MetricSuite, check_metrics, check_shape

BRIGHTNESS = """
import json, pathlib, subprocess, sys, time
from PIL import Image
folder, prompts, output, mode = sys.argv[1:5]
asked = [json.loads(line) for line in open(prompts)]
assert sorted(path.name for path in pathlib.Path(folder).iterdir()) == sorted(one["image"] for one in asked)
with open(output, "w", buffering=1) as file:
    for index, one in enumerate(asked):
        if mode == "crash" and index == 2:
            file.write('{"image": "0000')
            file.flush()
            raise RuntimeError("out of memory")
        if mode == "hang" and index == 1:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            pathlib.Path(sys.argv[5]).write_text(str(child.pid))
            time.sleep(60)
        if mode == "wrong" and index == 1:
            others = [[1], {"image": "other.png", "score": 1}, {"score": 2}]
            others += [{"image": one["image"], "score": value} for value in (float("nan"), "9")]
            print("not json", *map(json.dumps, others), sep="\\n", file=file)
            continue
        score = Image.open(pathlib.Path(folder, one["image"])).convert("L").getpixel((0, 0))
        line = {"image": one["image"], "score": score + one.get("bonus", 0)}
        if mode == "parts":
            line = {"image": one["image"], "scores": {"light": score, "words": len(one["prompt"].split())}}
        print(json.dumps(line), file=file)
print("all done")
sys.exit(3 if mode == "exit" else 0)
"""
GREYS = (10, 200, 90, 40)


def greys(count: int = 4) -> ImageBatch:
    values = torch.tensor(GREYS[:count])[:, None, None, None] / 255
    return ImageBatch(values.expand(count, 3, 8, 8), [f"a grey number {index}" for index in range(count)])


def metric(folder: Path, mode: str, *, weights: dict[str, Path] | None = None, **options: object) -> External:
    """Returns the metric of a recipe file that runs BRIGHTNESS."""
    (folder / "score.py").write_text(BRIGHTNESS)
    command = f"{{python}} {{here}}/score.py {{images}} {{prompts}} {{output}} {mode} {{here}}/child"
    document = {"name": "light", "command": command, "source": "nowhere", "weights": {"python": "an interpreter"}} | options
    (folder / "light.yaml").write_text(json.dumps(document))
    paths = {"external": folder / "light.yaml", "python": Path(sys.executable)} if weights is None else weights
    return External(MetricContext(torch.device("cpu"), paths))


def test_a_program_scores_all_images_in_one_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    external, batch = metric(tmp_path, "count", lower=True, unit="levels"), greys()
    first = external.measure(ImageBatch(batch.images[:1], batch.prompts[:1]))
    rest = external.measure(ImageBatch(batch.images[1:], batch.prompts[1:], details=[{"bonus": 1000}, {}, {}]))
    with caplog.at_level(logging.INFO):
        scores = external.resolved(np.concatenate([rest, first]))
    assert scores.tolist() == [1200, 90, 40, 10] and scores.dtype == np.float64
    assert caplog.messages[-1] == "external light: 4 of 4 images"
    (tmp_path / "score.py").unlink()
    assert external.resolved(first).tolist() == [10]
    assert external.info.lower and external.info.unit == "levels" and not External.info.lower
    assert [need.key for need in external.info.needs] == ["external", "python"]


def test_dimensions_are_parts_and_their_mean_is_the_score(tmp_path: Path) -> None:
    external = metric(tmp_path, "parts", dimensions=["words", "light"])
    np.testing.assert_array_equal(external.resolved(external.measure(greys(2))), [[7, 4, 10], [102, 4, 200]])


def test_a_suite_starts_the_program_once_for_a_policy_and_dense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metric(tmp_path, "parts", dimensions=["words", "light"])
    given = {"external": tmp_path / "light.yaml", "python": Path(sys.executable)}
    check_metrics(["external"], given)
    suite, batch = MetricSuite(["external"], MetricContext(torch.device("cpu"), given)), greys()
    halves = [ImageBatch(batch.images[part], batch.prompts[part]) for part in (slice(0, 2), slice(2, 4))]
    dense = [suite.measure_dense(ImageBatch(half.images * 0, half.prompts)) for half in halves]
    found = [suite.measure(half) for half in halves]
    with caplog.at_level(logging.INFO):
        value = suite.summed(["external"], found, dense)["external"]
    assert caplog.messages[-1].endswith("8 of 8 images")
    assert (value.value, value.dense, value.change, value.parts) == (44.5, 2, 42.5, (4, 85)) and value.n == 4
    with pytest.raises(UserError, match=r"needs weights\.python, got nothing"):
        check_metrics(["external"], {"external": tmp_path / "light.yaml"})


def test_parts_stay_where_one_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    external = metric(tmp_path, "parts", dimensions=["light", "absent"])
    np.testing.assert_array_equal(external.resolved(external.measure(greys(2))), [[np.nan, 10, np.nan], [np.nan, 200, np.nan]])
    assert "2 of 2 images have no score; the program did not write them" in caplog.text


@pytest.mark.parametrize(
    ("mode", "expected", "said"),
    [
        (
            "crash",
            [10, 200, np.nan, np.nan],
            "2 of 4 images have no score; the program ended with code 1, last said 'RuntimeErr",
        ),
        ("wrong", [10, np.nan, 90, 40], "1 of 4 images have no score; 6 lines were no scores of these images, first 'not js"),
        ("exit", [10, 200, 90, 40], "0 of 4 images have no score; the program ended with code 3, last said 'all done'"),
    ],
)
def test_what_was_written_counts_and_the_rest_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, expected: list[float], said: str
) -> None:
    external = metric(tmp_path, mode)
    np.testing.assert_array_equal(external.resolved(external.measure(greys())), expected)
    assert len(caplog.messages) == 1 and said in caplog.messages[0]


def test_a_program_that_hangs_is_stopped_with_its_children(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    external, started = metric(tmp_path, "hang", seconds=3), time.monotonic()
    np.testing.assert_array_equal(external.resolved(external.measure(greys())), [10, np.nan, np.nan, np.nan])
    assert time.monotonic() - started < 20
    assert "3 of 4 images have no score; the program was stopped after 3 s" in caplog.text
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not running(child):
            break
        time.sleep(0.1)
    assert not running(child)


def running(process: int) -> bool:
    """Says whether a process still runs; one that has ended and waits for its parent does not."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_no_score_at_all_is_said_and_nothing_else_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    external = metric(tmp_path, "crash", command="{python} -c \"raise SystemExit('no GPU')\" {output}")
    assert np.isnan(external.resolved(external.measure(greys()))).tolist() == [True] * 4
    assert "4 of 4 images have no score; the program ended with code 1, last said 'no GPU'" in caplog.text
    assert "did not start (No such file" in run_program(["/no/such/program"], tmp_path / "scores", seconds=1)


def test_a_missing_program_is_one_sentence_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="external program '/no/such/program' of light must be there to run"):
        metric(tmp_path, "", command="/no/such/program {output}")


def test_no_shell_reads_prompts_paths_or_the_command(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    evil = tmp_path / f"in ter; touch {trap.name}; $(touch {trap.name})"
    evil.mkdir()
    external = metric(evil, f"'; touch {trap}' | touch {trap} `touch {trap}` > {trap}")
    prompts = [f"a cat; touch {trap}", f"$(touch {trap})", f"`touch {trap}` && {{output}}", "'\"\n| cat"]
    scores = external.resolved(external.measure(ImageBatch(greys().images, prompts)))
    assert scores.tolist() == list(GREYS)
    assert not trap.exists() and not (Path.cwd() / trap.name).exists()


def test_placeholders_are_replaced_within_one_argument() -> None:
    recipe = Recipe("x", "p --in={images} 'two words' {output}{k}", "nowhere", {"k": "a key"})
    paths = {name: Path(f"/a b/{name}; x") for name in ("images", "output", "k", "here", "prompts")}
    assert recipe.arguments(paths) == ["p", "--in=/a b/images; x", "two words", "/a b/output; x/a b/k; x"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("name: x\ncommand: p {output}\nsource: s\nextra: 1", "must be YAML with keys out of name, command"),
        ("- 1", "must be YAML with keys"),
        ("name: x\ncommand: p {output}\nsource: s\nweights: [a]", "must be YAML with keys"),
        ("name: [", "must be YAML with keys"),
        ("name: x\ncommand: p {outptu}\nsource: s", r"^external recipe x must .* got placeholder \{outptu\}"),
        ("name: x\ncommand: p\nsource: s", r"must have \{output\} in its command"),
        ("name: x\ncommand: p {output}\nsource: s\nseconds: 0", "with 0 seconds"),
    ],
)
def test_a_broken_recipe_is_one_sentence(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(UserError, match=match):
        Recipe.read(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="cannot be split"):
        Recipe("x", "p 'open {output}", "s").arguments({})


def test_missing_weights_of_a_recipe_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metric external needs weights\.external, got nothing"):
        External(MetricContext(torch.device("cpu")))
    metric(tmp_path, "")
    with pytest.raises(
        UserError, match=r"metric external \(light\) needs weights\.python, got nothing; .*an interpreter, from nowhere"
    ):
        External(MetricContext(torch.device("cpu"), {"external": tmp_path / "light.yaml"}))


def test_later_lines_add_and_replace(tmp_path: Path) -> None:
    lines = [{"image": "a", "score": 1}, {"image": "a", "scores": {"x": 2}}, {"image": "a", "score": 3, "scores": {"y": 4}}]
    (tmp_path / "s").write_text("\n\n".join(map(json.dumps, lines)))
    found = read_scores(tmp_path / "s", ["a", "b"])
    assert found.whole == {"a": 3} and found.parts == {"a": {"x": 2, "y": 4}, "b": {}} and not found.wrong
    assert read_scores(tmp_path / "none", ["a"]).whole == {}


def test_progress_follows_the_file(tmp_path: Path) -> None:
    code = "import sys, time\nfor _ in range(3):\n  print(0, file=open(sys.argv[1], 'a'))\n  time.sleep(0.5)"
    seen: list[int] = []
    output = tmp_path / "s"
    assert run_program([sys.executable, "-c", code, str(output)], output, seconds=30, progress=seen.append) == ""
    assert seen == sorted(set(seen)) and seen[-1] == 3 and len(seen) >= 2


def test_images_are_whole_png_files(tmp_path: Path) -> None:
    image = torch.rand(1, 3, 6, 9)
    (tmp_path / "keep.py").write_text(
        "import json, shutil, sys\nshutil.copy(sys.argv[1] + '/000000.png', sys.argv[3])\n"
        "open(sys.argv[2], 'w').write(json.dumps({'image': '000000.png', 'score': 1}))"
    )
    external = metric(tmp_path, "", command="{python} {here}/keep.py {images} {output} {here}/kept.png")
    external.resolved(external.measure(ImageBatch(image, ["x"])))
    kept = torch.from_numpy(np.array(Image.open(tmp_path / "kept.png"))).permute(2, 0, 1)
    assert torch.equal(kept, (image[0] * 255).round().byte()) and os.listdir(external._folder.name) == []


WATCH = """
import json, sys
import numpy as np
from PIL import Image, ImageSequence
for one in [json.loads(line) for line in open(sys.argv[2])]:
    with Image.open(sys.argv[1] + "/" + one["image"]) as video:
        frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(video)]
        scores = {"frames": len(frames), "last": int(frames[-1][0, 0, 0]), "milliseconds": video.info["duration"]}
    print(json.dumps({"image": one["image"], "scores": scores}), file=open(sys.argv[3], "a"))
"""


def test_videos_are_whole_files_of_the_recipes_kind_and_speed(tmp_path: Path) -> None:
    (tmp_path / "watch.py").write_text(WATCH)
    dimensions = ["frames", "last", "milliseconds"]
    options = {"command": "{python} {here}/watch.py {images} {prompts} {output}", "dimensions": dimensions}
    external = metric(tmp_path, "", **options, videos=".webp", fps=8)
    videos = torch.arange(0, 100, 10).view(2, 1, 5, 1, 1).expand(2, 3, 5, 8, 8) / 255
    found = external.resolved(external.measure(ImageBatch(videos, ["a", "b"])))
    assert found[:, 1:].tolist() == [[5, 40, 125], [5, 90, 125]] and os.listdir(external._folder.name) == []


def test_programs_get_what_they_are_made_for_or_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric(tmp_path, "")
    given = {"external": tmp_path / "light.yaml", "python": Path(sys.executable)}
    check_shape(["external"], (1, 3, 8, 8), given)
    with pytest.raises(UserError, match=r"^metric external takes images only, got videos of 9 frames; leave it out of "):
        check_shape(["external"], (1, 3, 9, 8, 8), given)
    with pytest.raises(UserError, match=r"^external recipe light must have videos out of \.webp, .* got '\.avi' and 16"):
        metric(tmp_path, "", videos=".avi")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        UserError, match=r"^a video as \.mp4 needs PyAV, which is not installed; pip install 'autoprune\[video\]'\.$"
    ):
        metric(tmp_path, "", videos=".mp4")


def test_no_shell_sees_what_is_in_paths_and_prompts(tmp_path: Path) -> None:
    folder = tmp_path / "it's $(touch pwned); `touch pwned` \"&& touch pwned #"
    folder.mkdir()
    child = folder / "a b;c"
    (folder / "score.py").write_text(
        "import json, os, sys\n"
        "asked = [json.loads(line) for line in open(sys.argv[2])]\n"
        "lines = [json.dumps({'image': one['image'], 'score': len(one['prompt'])}) for one in asked]\n"
        "open(sys.argv[3], 'w').write('\\n'.join(lines) + '\\n')\n"
        "seen = {'arguments': sys.argv[4:], 'prompts': [one['prompt'] for one in asked], 'folder': os.getcwd()}\n"
        "json.dump(seen, open(sys.argv[4], 'w'))\n"
    )
    literal = "'; touch pwned' '$(touch pwned)' '`touch pwned`' '| cat' '*' '~' '$HOME' '>pwned'"
    command = "{python} {here}/score.py {images} {prompts} {output} {here}/seen.json {child} " + literal
    weights = {"python": "an interpreter", "child": "a file"}
    document = {"name": "literal", "command": command, "source": "nowhere", "weights": weights}
    (folder / "literal.yaml").write_text(json.dumps(document))
    child.write_text("")
    given = {"external": folder / "literal.yaml", "python": Path(sys.executable), "child": child}
    external = External(MetricContext(torch.device("cpu"), given))
    prompts = ["$(touch pwned)", "'; touch pwned; echo '", 'say "no"\nand `touch pwned`', "-rf *"]
    scores = external.resolved(external.measure(ImageBatch(greys().images, prompts)))
    seen = json.loads((folder / "seen.json").read_text())
    assert scores.tolist() == [len(prompt) for prompt in prompts] and seen["prompts"] == prompts
    wanted = ["; touch pwned", "$(touch pwned)", "`touch pwned`", "| cat", "*", "~", "$HOME", ">pwned"]
    assert seen["arguments"] == [str(folder / "seen.json"), str(child), *wanted]
    assert not list(tmp_path.rglob("pwned")) and not (Path(seen["folder"]) / "pwned").exists()
