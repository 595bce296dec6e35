"""GenEval: rules on hand-made detections with known answers, the detector and the colours on small random models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_clip_metrics import pictures, pil
from tiny_clip import save_clip
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from autoprune.errors import UserError
from autoprune.measure.metrics.clip import Clip
from autoprune.measure.metrics.contract import ImageBatch, MetricContext
from autoprune.measure.metrics.geneval import CLIP, ColourReader, GenEval, cut_out
from autoprune.measure.metrics.geneval_detector import Mask2FormerDetector
from autoprune.measure.metrics.geneval_rules import CLASSES, COLOURS, Found, Task, is_right, read_tasks, relations, sure
from autoprune.measure.metrics.pretrained import PretrainedFolder

CPU = torch.device("cpu")


def seen(confidence: float = 0.8, x: float = 0, y: float = 0, size: float = 10) -> Found:
    return Found((x, y, x + size, y + size), confidence)


def verdict(line: dict[str, object], found: dict[str, list[Found]], colours: dict[Found, str] | None = None) -> bool:
    task = Task.read(line | {"prompt": "p"}, "p")
    return is_right(task, found, lambda name, objects: [(colours or {})[one] for one in objects])


def wanted(tag: str, *include: dict[str, object], exclude: list[dict[str, object]] | None = None) -> dict[str, object]:
    return {"tag": tag, "include": [{"count": 1} | clause for clause in include]} | ({"exclude": exclude} if exclude else {})


BENCH = wanted("single_object", {"class": "bench"})
TWO = wanted("two_object", {"class": "bench"}, {"class": "cat"})
THREE = wanted("counting", {"class": "cat", "count": 3}, exclude=[{"class": "cat", "count": 4}])
LEFT = wanted("position", {"class": "bench"}, {"class": "cat", "position": ["left of", 0]})
RED = wanted("colors", {"class": "cat", "color": "red"})
BOTH = wanted("color_attr", {"class": "cat", "color": "red"}, {"class": "bench", "color": "blue"})


def test_single_object_is_there_above_the_threshold() -> None:
    assert verdict(BENCH, {"bench": [seen(0.31)]}) and verdict(BENCH, {"bench": [seen(), seen()], "cat": [seen()]})
    assert not verdict(BENCH, {"bench": [seen(0.3)]}) and not verdict(BENCH, {"cat": [seen()]}) and not verdict(BENCH, {})


def test_two_objects_are_both_there() -> None:
    assert verdict(TWO, {"bench": [seen()], "cat": [seen(0.4)]})
    assert not verdict(TWO, {"bench": [seen(), seen()]}) and not verdict(TWO, {"cat": [seen()]})


@pytest.mark.parametrize(("sure_ones", "doubtful", "right"), [(3, 0, True), (3, 5, True), (2, 9, False), (4, 0, False)])
def test_counting_counts_the_sure_ones_exactly(sure_ones: int, doubtful: int, right: bool) -> None:
    cats = [seen(0.9)] * doubtful + [seen(0.91)] * sure_ones
    assert verdict(THREE, {"cat": cats}) is right


def test_position_is_of_the_surest_objects_alone() -> None:
    bench, left, right = seen(0.5, x=100), seen(0.9, x=0), seen(0.8, x=200)
    assert verdict(LEFT, {"bench": [bench], "cat": [right, left]})
    assert not verdict(LEFT, {"bench": [bench], "cat": [seen(0.7, x=0), right]})
    assert not verdict(LEFT, {"bench": [bench], "cat": [seen(0.9, x=100, y=100)]}), "below"
    assert not verdict(LEFT, {"cat": [left]}) and not verdict(LEFT, {"bench": [bench]})


def test_position_holds_between_every_pair() -> None:
    many = wanted("position", {"class": "bench", "count": 2}, {"class": "cat", "count": 2, "position": ["above", 0]})
    benches = [seen(0.9, y=100), seen(0.8, y=130)]
    assert verdict(many, {"bench": benches, "cat": [seen(), seen(y=10)]})
    assert not verdict(many, {"bench": benches, "cat": [seen(), seen(y=140)]})


def test_colours_are_of_the_surest_object_alone() -> None:
    sure_one, other = seen(0.9), seen(0.4)
    assert verdict(RED, {"cat": [other, sure_one]}, {sure_one: "red", other: "blue"})
    assert not verdict(RED, {"cat": [other, sure_one]}, {sure_one: "blue", other: "red"})


def test_colour_attribution_needs_both_colours_in_their_places() -> None:
    cat, bench = seen(), seen()
    found = {"cat": [cat], "bench": [bench]}
    assert verdict(BOTH, found, {cat: "red", bench: "blue"})
    for wrong in ({cat: "blue", bench: "red"}, {cat: "red", bench: "red"}, {cat: "blue", bench: "blue"}):
        assert not verdict(BOTH, found, wrong)


def test_at_most_sixteen_of_a_class_count_surest_first() -> None:
    objects = [seen(0.31 + index / 100) for index in range(20)]
    kept = sure({"cat": objects}, "two_object")["cat"]
    assert kept == objects[::-1][:16] and sure({"cat": objects}, "counting") == {"cat": []}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ((0, 40, 10, 50), {"left of"}),
        ((90, 40, 100, 50), {"right of"}),
        ((40, 0, 50, 10), {"above"}),
        ((40, 90, 50, 100), {"below"}),
        ((0, 0, 10, 10), {"left of", "above"}),
        ((100, 100, 110, 110), {"right of", "below"}),
        ((40, 40, 50, 50), set()),
        ((41.9, 40, 51.9, 50), set()),
        ((42.1, 40, 52.1, 50), set()),
        ((45, 40, 55, 50), {"right of"}),
        ((-160, 0, 250, 90), set()),
        ((80, 60, 90, 70), {"right of"}),
    ],
)
def test_relations_to_a_box_in_the_middle(own: tuple[float, ...], expected: set[str]) -> None:
    """To (40, 40, 50, 50): 0.1 of both sizes, 2 pixels here, are taken off; then half of the whole offset must be left."""
    assert relations(own, (40, 40, 50, 50)) == expected


def test_relations_of_a_wide_object_need_more_room() -> None:
    """Middles 30 apart; 0.1 * (190 + 10) = 20 leave 10, a third of the offset."""
    assert relations((-20, 40, 170, 50), (40, 40, 50, 50)) == set()
    assert relations((70, 40, 80, 50), (40, 40, 50, 50)) == {"right of"}


def test_the_names_are_those_of_the_benchmark() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80 and (CLASSES[0], CLASSES[3], CLASSES[64], CLASSES[79]) == (
        "person",
        "motorcycle",
        "computer mouse",
        "toothbrush",
    )


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"tag": "texture", "include": [{"class": "cat", "count": 1}]},
        {"tag": "counting", "include": []},
        {"tag": "counting", "include": [{"class": "unicorn", "count": 1}]},
        {"tag": "counting", "include": [{"class": "cat", "count": 0}]},
        {"tag": "counting", "include": [{"class": "cat"}]},
        {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "teal"}]},
        {"tag": "position", "include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]},
        {"tag": "position", "include": [{"class": "cat", "count": 1, "position": "left of"}]},
        {"tag": "position", "include": ["cat"]},
    ],
)
def test_a_prompt_without_a_task_is_one_sentence(line: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"metric geneval needs .*evaluation_metadata.jsonl .* of 'a cat' \(.*; give that file"):
        Task.read(line, "a cat")


def test_a_study_checks_all_tasks_first() -> None:
    assert [task.tag for task in read_tasks([BENCH, THREE], ["a", "b"])] == ["single_object", "counting"]
    with pytest.raises(UserError, match="of 'b'"):
        read_tasks([BENCH, {}], ["a", "b"])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mask2Former of width 32 that is sure of what it sees."""
    torch.manual_seed(0)
    backbone = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
    backbone |= {"image_size": 64, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    widths = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    counts = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 16, "num_queries": 5}
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, num_labels=80, **widths, **counts))
    with torch.no_grad():
        model.class_predictor.weight.mul_(100)
    folder = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(folder)
    return folder


def context(**weights: Path) -> MetricContext:
    return MetricContext(CPU, weights)


def of(path: Path, key: str = "geneval_detector") -> PretrainedFolder:
    from autoprune.measure.metrics.geneval import DETECTOR

    return PretrainedFolder("geneval", DETECTOR if key == DETECTOR.key else CLIP, context(**{key: path}))


def naive_detections(folder: Path, image: Tensor) -> list[tuple[str, float, tuple[int, ...], Tensor]]:
    """Every pair of query and class above 0.3 in a picture of 64 x 96 read at 32 x 48 and padded to 32 x 64, one by one."""
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    small = functional.interpolate(image[None], (32, 48), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    padded = torch.zeros(1, 3, 32, 64)
    padded[..., :48] = (small - mean) / std
    with torch.inference_mode():
        output = model(pixel_values=padded)
    found = []
    for query, logits in enumerate(output.class_queries_logits[0]):
        masks = functional.interpolate(output.masks_queries_logits[:, query : query + 1], (32, 64), mode="bilinear")
        mask = functional.interpolate(masks[..., :48], (64, 96), mode="bilinear")[0, 0]
        inside = mask > 0
        mean_inside = float(mask[inside].sigmoid().mean()) if inside.any() else 0.0
        rows, columns = np.nonzero(inside.numpy())
        for label, share in enumerate(logits.softmax(-1)[:80].tolist()):
            if share * mean_inside > 0.3:
                box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                found.append((CLASSES[label], share * mean_inside, tuple(map(int, box)), inside))
    return found


def test_the_detector_is_the_naive_loop(detector: Path) -> None:
    image = pictures(1, 64, 96)[0]
    found = Mask2FormerDetector(of(detector), sides=(32, 64))(image)
    truth = naive_detections(detector, image)
    assert truth and sum(map(len, found.values())) == len(truth)
    ours = [(name, one.confidence, one.box, one.mask) for name, objects in found.items() for one in objects]
    ours.sort(key=lambda one: one[:2])
    for (name, confidence, box, mask), expected in zip(ours, sorted(truth, key=lambda one: one[:2]), strict=True):
        assert name == expected[0] and confidence == pytest.approx(expected[1], abs=1e-4)
        assert np.abs(np.subtract(box, expected[2])).max() <= 1 and (mask != expected[3]).sum() <= 2


def test_nothing_seen_is_no_detection(detector: Path) -> None:
    model = Mask2FormerDetector(of(detector), sides=(32, 64))
    model._model.class_predictor.weight.zero_()
    assert model(pictures(1, 64, 96)[0]) == {}


@pytest.mark.parametrize(("size", "shape"), [((1024, 1024), (800, 800)), ((768, 1536), (672, 1344)), ((100, 100), (800, 800))])
def test_images_are_read_at_the_published_size(detector: Path, size: tuple[int, int], shape: tuple[int, int]) -> None:
    pixels, inner = Mask2FormerDetector(of(detector))._resized(torch.zeros(3, *size))
    assert tuple(pixels.shape) == (1, 3, *shape)
    assert inner == ((667, 1333) if shape[0] == 672 else shape)
    assert pixels[:, :, inner[0] :].eq(0).all() and pixels[:, :, :, inner[1] :].eq(0).all()


def test_colours_are_clips_zero_shot_choice(clip: Path) -> None:
    image = pictures(1, 64, 64)[0]
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 10:50, 5:40] = True
    masks[1, 20:60, 30:64] = torch.rand(40, 34, generator=torch.Generator().manual_seed(0)) > 0.3
    objects = [Found((5, 10, 40, 50), 0.9, masks[0]), Found((30, 20, 64, 60), 0.8, masks[1])]
    found = ColourReader(Clip(of(clip, "geneval_clip")))(image, "cat", objects)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessorPil.from_pretrained(clip)
    from PIL import Image

    grey, expected = Image.new("RGB", (64, 64), color="#999"), []
    for one in objects:
        alone = Image.composite(pil(image), grey, Image.fromarray(one.mask.numpy())).crop(one.box)
        pixels, sums = processor(alone, return_tensors="pt")["pixel_values"], []
        for colour in COLOURS:
            sentences = [f"a photo of a {colour} cat", f"a photo of a {colour}-colored cat", f"a photo of a {colour} object"]
            tokens = tokenizer(sentences, padding=True, return_tensors="pt")
            with torch.inference_mode():
                output = model(**{key: tokens[key] for key in ("input_ids", "attention_mask")}, pixel_values=pixels)
            mean = output.text_embeds.mean(0)
            sums.append(float(mean @ output.image_embeds[0] / mean.norm()))
        expected.append(COLOURS[int(np.argmax(sums))])
    assert found == expected


def test_what_is_cut_out_is_the_object_on_grey() -> None:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 1:3] = True
    cut = cut_out(torch.ones(3, 4, 4), Found((1, 1, 3, 3), 1.0, mask))
    assert cut.tolist() == torch.tensor([[1.0, 1.0], [0.6, 0.6]]).expand(3, 2, 2).tolist()


def test_the_metric_scores_each_image_against_its_own_line(detector: Path, clip: Path) -> None:
    metric = GenEval(context(geneval_detector=detector, geneval_clip=clip))
    metric._detector = Mask2FormerDetector(of(detector), sides=(32, 64))
    image = pictures(1, 64, 96)
    names = sorted({name for name, *_ in naive_detections(detector, image[0])})
    absent = next(name for name in CLASSES if name not in names)
    details = [wanted("single_object", {"class": names[0]}), wanted("single_object", {"class": absent})]
    lines = [json.loads(json.dumps(line)) for line in details]
    found = metric.measure(ImageBatch(image.expand(2, -1, -1, -1), ["a", "b"], details=lines))
    assert found.tolist() == [1.0, 0.0] and found.dtype == np.float64 and metric.info.passes
    with pytest.raises(UserError, match="give that file as prompts"):
        metric.measure(ImageBatch(image, ["a cat"]))


def test_missing_and_other_weights_are_one_sentence(detector: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"geneval needs weights\.geneval_detector, got nothing; .*mask2former-swin-small"):
        GenEval(context(geneval_clip=clip))
    with pytest.raises(UserError, match=r"metric geneval needs weights\.geneval_clip, got nothing; .*openai"):
        GenEval(context(geneval_detector=detector))
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector)
    config = model.config
    config.num_labels = 7
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="must detect the 80 classes of COCO instances, got 7 labels"):
        GenEval(context(geneval_detector=tmp_path, geneval_clip=clip))
