"""Our InfinityStar against traces of the official code, every job and every recorded array of the goldens folder."""

import json
from dataclasses import replace

import numpy as np
import pytest
import star_goldens
import torch
from goldens import FOLDER, Job, jobs, read_meta, unpack_bits
from star_goldens import Recorder, request_of
from torch.overrides import TorchFunctionMode

from autoprune.backbones.infinitystar import STAR_8B_480P, InfinityStar
from autoprune.backbones.star_rope import step_rotation, text_rotation
from autoprune.backbones.star_schedules import TEMPLATES
from autoprune.backbones.video_tokenizer import VideoTokenizer, VideoTokenizerConfig
from autoprune.clips import Course
from autoprune.generation import generate_latent

INPUTS = ("text_kv_in", "neg_kv_in", "gt_bits.")
TOLERANCES = {"rope": 1e-6, "tokens.": 1e-6, "summed.": 1e-6, "latent": 1e-6, "logits_guided.": 2e-4}
TORCH_OF_TRACES = "2.13"
JOBS = jobs("infinitystar_tiny")
ENCODED = jobs("infinitystar_encode")


def test_there_are_traces_to_compare_with() -> None:
    assert len(JOBS) >= 4 and ENCODED


@pytest.fixture(scope="module", params=JOBS, ids=[f"{job.trace}:{job.name}" for job in JOBS])
def compared(request: pytest.FixtureRequest) -> tuple[Job, dict, dict]:
    job: Job = request.param
    arrays, loaded = job.arrays, star_goldens.backbone(job.weights)
    recorder, asked = Recorder(loaded.model), _portable(job, arrays)

    def draw(logits: torch.Tensor, step: int) -> torch.Tensor:
        recorder.found[f"bits.r{recorder.run}"] = asked.draw(logits, step)
        return recorder.found[f"bits.r{recorder.run}"]

    with torch.inference_mode():
        latent = generate_latent(loaded, replace(asked, draw=draw), recorder)
        recorder.remove()
        found = recorder.found | {"latent": latent} | _prefix(loaded.model, asked)
        if "decode_f32_crop16" in arrays:
            found |= {"frames": loaded.tokenizer.frames(latent), "video": loaded.tokenizer.decode(latent)}
    found |= {f"rope.r{run}": loaded.model.rotation(scale.step, job.schedule) for run, scale in enumerate(asked.plan.scales)}
    return job, arrays, found


def test_every_recorded_array_is_reproduced(compared: tuple[Job, dict, dict]) -> None:
    job, arrays, found = compared
    names = [name for name in arrays if not name.startswith(INPUTS) and name != "tokens.r0"]
    assert names
    for name in names:
        recorded = arrays[name]
        if name.startswith("bits."):
            ours = found[name]
            assert torch.equal(unpack_bits(recorded, ours.shape[1:]), ours), name
        elif name == "video_u8_bgr_stride4":
            assert np.abs(_bytes_bgr(found["video"]) - recorded.astype(np.int64)).max() <= 1
        else:
            ours = _as_recorded(name, found).reshape(recorded.shape)
            np.testing.assert_allclose(ours, recorded, rtol=0, atol=_tolerance(name), err_msg=name)
    assert "tokens.r0" not in arrays or not arrays["tokens.r0"].any()  # our first token is the embedding of zeros by itself


def test_each_run_sees_the_keys_that_were_recorded(compared: tuple[Job, dict, dict]) -> None:
    job, arrays, _ = compared
    loaded, watch = star_goldens.backbone(job.weights), _Attentions()
    with torch.inference_mode(), watch:
        generate_latent(loaded, _portable(job, arrays))
    assert watch.keys[loaded.depth :: loaded.depth] == [step["keys_seen"] for step in job.record["steps"]]  # after the text


class _Attentions(TorchFunctionMode):
    """Notes how many keys every attention sees."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.keys.append(args[1].shape[2])
        return func(*args, **(kwargs or {}))


def _portable(job: Job, arrays: dict):  # noqa: ANN202
    """The official random stream repeats on the torch version of the traces only; elsewhere its bits are given."""
    request = request_of(job, arrays)
    if job.record["greedy"] or torch.__version__.startswith(TORCH_OF_TRACES):
        return request
    shapes = [(int(np.prod(step["thw"])), step["bits_dim"]) for step in job.record["steps"]]
    given = [unpack_bits(arrays[f"bits.r{run}"], shape) for run, shape in enumerate(shapes)]
    return replace(request, given_bits=tuple(given))


def _prefix(model: InfinityStar, request) -> dict[str, torch.Tensor]:  # noqa: ANN001
    guided = any(weight != 1 for weight in request.guidance)
    text = model.with_unconditional(request.text, request.negative) if guided else request.text
    first, last = (model.condition(text).keys[layer] for layer in (0, -1))
    length = request.text.values.shape[1]
    rotation = text_rotation(length, model.config.head_width)
    return {"text_k_first": first[0], "text_v_first": first[1], "text_k_last": last[0], "rope_text": rotation}


def _as_recorded(name: str, found: dict) -> np.ndarray:
    if name == "decode_f32_crop16":
        return found["frames"][..., 8:24, 8:24].numpy()
    if name == "decode_mean_std":
        frames = found["frames"]
        return torch.stack((frames.mean(), frames.std(), (frames.abs() >= 1).float().mean())).numpy()
    if name == "decode_frame_means":
        return found["frames"].mean(dim=(1, 3, 4)).numpy()
    if name.startswith("rope"):
        return _cosines_and_sines(found[name])
    return found[name].numpy()


def _cosines_and_sines(factors: torch.Tensor) -> np.ndarray:
    return torch.stack((factors[0][..., ::2], factors[1][..., 1::2])).numpy()


def _tolerance(name: str) -> float:
    return next((value for start, value in TOLERANCES.items() if name.startswith(start)), 1e-4)


def _bytes_bgr(video: torch.Tensor) -> np.ndarray:
    pixels = ((video + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 4, 1).flip(-1)
    return pixels[:, :, ::4, ::4].numpy().astype(np.int64)


@pytest.mark.parametrize("trace", sorted({job.trace for job in JOBS}))
def test_axis_tables_of_rotary_positions_are_the_official_ones(trace: str) -> None:
    archive, meta = np.load(FOLDER / f"{trace}.trace.npz"), read_meta(FOLDER / f"{trace}.trace.npz")["config"]
    tables = {name: archive[f"rope_tables/freqs_{name}"] for name in ("scales", "frames", "height", "width", "text")}
    width, first = meta["C"] // meta["H"], meta["text_maxlen"]
    sizes = {name: table.shape[1] for name, table in tables.items()}

    def rotation(grid: tuple[int, int, int], position: int = 0) -> np.ndarray:
        return _cosines_and_sines(step_rotation((grid,), 0, position=position, head_width=width))

    runs = np.concatenate([rotation((1, 1, 1), first + run) for run in range(sizes["scales"])], axis=1)
    video, columns = rotation((sizes["frames"], 1, 1)), rotation((1, 1, sizes["width"]))
    ours = {"scales": runs, "frames": video, "height": rotation((1, sizes["height"], 1)), "width": columns}
    for axis, (name, found) in enumerate(ours.items()):
        quarter = found[..., axis * width // 8 : (axis + 1) * width // 8]
        np.testing.assert_allclose(quarter, tables[name], rtol=0, atol=1e-6, err_msg=name)
    text = text_rotation(first, width)
    np.testing.assert_allclose(_cosines_and_sines(text), tables["text"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("trace", sorted({job.trace for job in JOBS}))
def test_all_fifteen_templates_are_the_official_ones(trace: str) -> None:
    table = read_meta(FOLDER / f"{trace}.trace.npz")["schedule_table"]
    assert {ratio: [list(grid) for grid in grids] for ratio, grids in TEMPLATES.items()} == {
        float(ratio): grids for ratio, grids in table.items()
    }


@pytest.mark.parametrize("job", ENCODED, ids=[f"{job.trace}:{job.name}" for job in ENCODED])
def test_features_become_the_recorded_bits(job: Job) -> None:
    arrays, meta = job.arrays, job.config
    tokenizer = VideoTokenizer(star_goldens.tokenizer_config(meta), with_encoder=False)
    clips = len(job.schedule) // len(meta["image_rep"])
    course = Course((*meta["image_rep"], *meta["video_rep"] * (clips - 1)), by_clip=True)
    features = torch.from_numpy(arrays["features"])
    steps = list(tokenizer.quantisation_steps(features, job.schedule, course))
    given = tokenizer.quantise(features, job.schedule, course)
    assert len(steps) == job.record["steps"] == len(given)
    for run, (step, bits) in enumerate(zip(steps, given, strict=True)):
        recorded = torch.from_numpy(arrays[f"bits.r{run}"])
        sure = (step.residual.abs() > 1e-5).movedim(1, -1)
        assert torch.equal(bits.view(recorded.shape)[sure], recorded.long()[sure])
        if f"residual.r{run}" in arrays:
            np.testing.assert_allclose(step.residual.numpy(), arrays[f"residual.r{run}"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(steps[-1].latent.numpy(), arrays["latent_end"], rtol=0, atol=1e-6)


def test_full_size_state_dicts_match_the_official_manifest() -> None:
    path = FOLDER / "key_manifests_infinitystar.npz"
    if not path.exists():
        pytest.skip("no key manifests in this goldens folder")
    archive = np.load(path)
    with torch.device("meta"):
        models = {
            "infinitystar_8b": InfinityStar(STAR_8B_480P),
            "infinitystar_videovae": VideoTokenizer(VideoTokenizerConfig()),
        }
    for name, model in models.items():
        manifest = json.loads(bytes(archive[name]).decode())
        ours = {key: list(value.shape) for key, value in model.state_dict().items()}
        assert ours == {key: list(shape) for key, shape in manifest.items()}
