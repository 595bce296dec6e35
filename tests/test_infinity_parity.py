"""Our Infinity against traces of the official code, every job and every recorded array of the goldens folder."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from goldens import FOLDER, Job, Recorder, backbone, jobs, request_of, unpack_bits

from autoprune.backbones.infinity import Infinity, TransformerConfig
from autoprune.backbones.official import INFINITY_2B, INFINITY_8B
from autoprune.generation import Observer, generate_latent

INPUTS = ("scale_schedule", "cfg_list", "tau_list", "text_kv_in", "text_lens", "neg_kv_in", "neg_lens", "gt_bits.")
TOLERANCES = {"latent": 1e-5, "summed.": 1e-5, "tokens.": 1e-5, "decode_": 5e-4, "min_gap.": 4e-4}
TORCH_OF_TRACES = "2.13"
JOBS = jobs("infinity_")
JOB_IDS = [f"{job.trace}:{job.name}" for job in JOBS]


def test_there_are_traces_to_compare_with() -> None:
    assert len(JOBS) >= 4


@pytest.fixture(scope="module", params=JOBS, ids=JOB_IDS)
def compared(request: pytest.FixtureRequest) -> tuple[Job, dict, dict]:
    job: Job = request.param
    arrays = job.arrays
    loaded = backbone(job.weights)
    recorder = Recorder(loaded.model)
    with torch.inference_mode():
        latent = generate_latent(loaded, recorder.watching(_portable(job, arrays)), recorder)
        image = loaded.tokenizer.decode(latent)
    recorder.remove()
    return job, arrays, recorder.found | {"latent": latent, "decoded": image}


def test_every_recorded_array_is_reproduced(compared: tuple[Job, dict, dict]) -> None:
    job, arrays, found = compared
    names = [name for name in arrays if not name.startswith(INPUTS)]
    assert names
    for name in names:
        recorded = arrays[name]
        if name.startswith("bits."):
            ours = found[name]
            assert torch.equal(unpack_bits(recorded, ours.shape[1:]), ours), name
        elif name.startswith("image_u8_bgr"):
            assert np.abs(_bytes_bgr(found["decoded"], name) - recorded.astype(np.int64)).max() <= 1, name
        else:
            ours = _as_recorded(name, found, recorded.shape, job)
            np.testing.assert_allclose(ours, recorded, rtol=0, atol=_tolerance(name), err_msg=name)


def _portable(job: Job, arrays: dict):
    """The official random stream repeats on the torch version of the traces only; elsewhere its bits are given."""
    request = request_of(job, arrays)
    if job.record["top_k"] == 1 or torch.__version__.startswith(TORCH_OF_TRACES):
        return request
    bits = backbone(job.weights).tokenizer.token_bits
    given = [unpack_bits(arrays[f"bits.s{scale}"], (h * w, bits)) for scale, (_, h, w) in enumerate(job.schedule)]
    return replace(request, given_bits=tuple(given))


def _tolerance(name: str) -> float:
    return next((value for start, value in TOLERANCES.items() if name.startswith(start)), 2e-4)


def _as_recorded(name: str, found: dict, shape: tuple[int, ...], job: Job) -> np.ndarray:
    if name == "decode_f32_crop48":
        return found["decoded"][..., :48, :48].numpy()
    if name == "decode_mean_std":
        image = found["decoded"]
        return torch.stack((image.mean(), image.std(), (image.abs() >= 1).float().mean())).numpy()
    ours = found[name]
    if name in ("text_norm_out", "text_kv"):
        lengths = _row_lengths(job, len(ours))
        ours = torch.cat([rows[:length] for rows, length in zip(ours, lengths, strict=True)])
    if name.startswith("x_in.") and len(ours) != shape[0]:
        ours = ours[: shape[0]]
    return ours.reshape(shape).numpy()


def _row_lengths(job: Job, rows: int) -> list[int]:
    arrays = job.arrays
    lengths = arrays["text_lens"].tolist()
    return lengths + arrays.get("neg_lens", arrays["text_lens"]).tolist() if rows > len(lengths) else lengths


def _bytes_bgr(image: torch.Tensor, name: str) -> np.ndarray:
    stride = int(name.rpartition("stride")[2]) if "stride" in name else 1
    pixels = ((image + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1).flip(-1)
    return pixels[:, ::stride, ::stride].numpy().astype(np.int64)


@pytest.mark.parametrize("name", sorted({job.trace for job in JOBS}))
def test_batch_of_two_equals_two_batches_of_one(name: str) -> None:
    job = _plain_job(name)
    loaded, pair = backbone(job.weights), _two_prompts(job)
    with torch.inference_mode():
        together = generate_latent(loaded, pair)
        for index in range(2):
            alone = generate_latent(loaded, _row(pair, index))
            torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-5)


def test_generations_interleaved_in_threads_equal_themselves_alone() -> None:
    job = _plain_job(JOBS[0].trace)
    loaded, pair = backbone(job.weights), _two_prompts(job)
    requests = [_row(pair, 0), _row(pair, 1)]
    alone = [_run(loaded, entry, Observer()) for entry in requests]
    turns, results = threading.Barrier(2), {}

    class TakingTurns(Observer):
        def scale_started(self, scale) -> None:
            turns.wait(timeout=60)

    def work(index: int) -> None:
        results[index] = _run(loaded, requests[index], TakingTurns())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results[0], alone[0])
    assert torch.equal(results[1], alone[1])


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("infinity_2b", INFINITY_2B.transformer),
        ("infinity_8b", INFINITY_8B.transformer),
        ("infinity_layer12", TransformerConfig(width=768, heads=8, depth=12, chunks=4, token_bits=32)),
        ("infinity_layer24", TransformerConfig(width=1536, heads=16, depth=24, chunks=4, token_bits=32)),
    ],
)
def test_full_size_state_dict_matches_the_official_manifest(model: str, config: TransformerConfig) -> None:
    path = FOLDER / "key_manifests.npz"
    if not path.exists():
        pytest.skip("no key manifests in this goldens folder")
    manifest = json.loads(bytes(np.load(path)[model]).decode())
    with torch.device("meta"):
        ours = {key: list(value.shape) for key, value in Infinity(config).state_dict().items()}
    assert ours == {key: list(shape) for key, shape in manifest.items()}


def _plain_job(trace: str) -> Job:
    """A greedy job of one prompt without special settings."""
    plain = {"top_k": 1, "B": 1, "gt_leak": 0, "cfg_insertion_layer": [0]}
    candidates = [job for job in JOBS if job.trace == trace and all(job.record[key] == plain[key] for key in plain)]
    return next(job for job in candidates if "neg_kv_in" not in job.arrays)


def _run(loaded, request, observer: Observer) -> torch.Tensor:
    with torch.inference_mode():
        return generate_latent(loaded, request, observer)


def _two_prompts(job: Job):
    """The job's text and a shorter, different one in a batch."""
    request = request_of(job, job.arrays)
    rows = request.text.values[0]
    text = type(request.text).from_rows([rows, -rows[: max(1, len(rows) - 3)]])
    return replace(request, text=text, samples=(0, 1))


def _row(request, index: int):
    text = request.text
    length = text.lengths[index]
    single = type(text)(text.values[index : index + 1, :length], (length,))
    return replace(request, text=single, samples=(index,))
