"""Released weights in every official layout, written small and at random, read back exactly; files that do not fit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from autoprune.backbones.bsq_tokenizer import BSQTokenizer, TokenizerConfig
from autoprune.backbones.catalogue import load_backbone
from autoprune.backbones.hart import HART_0_7B, Hart, HartConfig
from autoprune.backbones.infinity import Infinity, TransformerConfig
from autoprune.backbones.official import INFINITY_2B, RELEASED, hart_sized
from autoprune.backbones.released import BackboneSpec, Target, TextOptions, random_backbone, released_backbone
from autoprune.backbones.var import VAR, VAR_D16
from autoprune.backbones.vq_tokenizer import VQConfig, VQTokenizer
from autoprune.errors import UserError
from autoprune.generation import generate
from autoprune.policy import Policy, ScalePruning

SMALL = TransformerConfig(width=64, heads=2, depth=4, chunks=2, token_bits=8, text_width=128, text_max_length=16, levels=15)
TOKENIZER = TokenizerConfig(bits=8, base=32, channel_multipliers=(1, 1, 1, 1, 2), encoder_blocks=1, decoder_blocks=2)
SPEC = replace(INFINITY_2B, transformer=SMALL, tokenizer=TOKENIZER)
CPU = Target(torch.device("cpu"), torch.float32)
MODEL_FILE, VAE_FILE = INFINITY_2B.files.transformer[0], INFINITY_2B.files.tokenizer[0]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def states() -> tuple[State, State]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Infinity(SMALL).state_dict(), BSQTokenizer(TOKENIZER).state_dict()


def write(folder: Path, states: tuple[State, State], **changes: Callable[[Path, State], None]) -> Path:
    """Writes both files the simple way, or as `model` and `vae` say."""
    changes.get("model", lambda path, state: torch.save(state, path))(folder / MODEL_FILE, states[0])
    changes.get("vae", lambda path, state: torch.save({"vae": state}, path))(folder / VAE_FILE, states[1])
    return folder


def sharded(kind: str) -> Callable[[Path, State], None]:
    def save(path: Path, state: State) -> None:
        path.mkdir()
        keys, names = list(state), [f"part-{part}.{kind}" for part in range(3)]
        for part, name in enumerate(names):
            shard = {key: state[key].clone() for key in keys[part::3]}
            save_file(shard, path / name) if kind == "safetensors" else torch.save(shard, path / name)
        index = {"weight_map": {key: names[place % 3] for place, key in enumerate(keys)}}
        base = "model" if kind == "safetensors" else "pytorch_model"
        (path / f"{base}.{kind}.index.json").write_text(json.dumps(index))

    return save


def training_run(path: Path, state: State) -> None:
    torch.save({"trainer": {"gpt_fsdp": state, "cfg": {"lr": 0.1}}, "epoch": 3}, path)


def with_leftovers(path: Path, state: State) -> None:
    torch.save(state | {"lvl_1L": torch.zeros(1, 9), "attn_bias_for_masking": torch.zeros(1, 1, 9, 9)}, path)


def without_chunks(path: Path, state: State) -> None:
    size = SMALL.depth // SMALL.chunks

    def flat(key: str) -> str:
        if not key.startswith("block_chunks."):
            return key
        _, chunk, _, block, rest = key.split(".", 4)
        return f"blocks.{int(chunk) * size + int(block)}.{rest}"

    torch.save({flat(key): value for key, value in state.items()}, path)


def without_wrappers(path: Path, state: State) -> None:
    names = {key: key.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias") for key in state}
    names = {key: name.replace(".norm.weight", ".weight").replace(".norm.bias", ".bias") for key, name in names.items()}
    torch.save({"vae": {names[key]: value for key, value in state.items()}, "ema": {}}, path)


LAYOUTS = {
    "flat": {},
    "sharded bin": {"model": sharded("bin")},
    "sharded safetensors": {"model": sharded("safetensors")},
    "training run": {"model": training_run},
    "old leftovers": {"model": with_leftovers},
    "blocks in one list": {"model": without_chunks},
    "tokenizer without wrappers": {"vae": without_wrappers},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_official_layout_reads_back_exactly(tmp_path: Path, states: tuple[State, State], layout: str) -> None:
    folder = write(tmp_path, states, **LAYOUTS[layout])
    backbone = released_backbone("infinity2b", SPEC, folder, CPU, TextOptions())
    for module, state in ((backbone.model, states[0]), (backbone.tokenizer, states[1])):
        ours = module.state_dict()
        assert list(ours) == list(state)
        assert all(torch.equal(ours[key], state[key]) for key in state)
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_blocks_are_in_the_compute_precision_and_the_rest_in_float32(tmp_path: Path, states: tuple[State, State]) -> None:
    target = Target(torch.device("cpu"), torch.bfloat16)
    backbone = released_backbone("infinity2b", SPEC, write(tmp_path, states), target, TextOptions())
    for key, value in backbone.model.state_dict().items():
        assert value.dtype is (torch.bfloat16 if key.startswith("block_chunks") else torch.float32), key
    assert backbone.dtype is torch.bfloat16


def test_a_file_of_the_right_precision_stays_mapped(tmp_path: Path, states: tuple[State, State]) -> None:
    backbone = released_backbone("infinity2b", SPEC, write(tmp_path, states), CPU, TextOptions())
    assert str(tmp_path / MODEL_FILE) in Path("/proc/self/maps").read_text()
    assert torch.equal(backbone.model.pos_start, states[0]["pos_start"])


@pytest.mark.parametrize("length", [9, 25])
def test_the_unconditional_text_takes_our_length(tmp_path: Path, states: tuple[State, State], length: int) -> None:
    rows = torch.randn(length, SMALL.text_width)
    folder = write(tmp_path, (states[0] | {"cfg_uncond": rows}, states[1]))
    ours = released_backbone("infinity2b", SPEC, folder, CPU, TextOptions()).model.cfg_uncond
    shared = min(length, SMALL.text_max_length)
    assert ours.shape == (SMALL.text_max_length, SMALL.text_width) and torch.equal(ours[:shared], rows[:shared])


def refusal(folder: Path, spec: BackboneSpec = SPEC) -> str:
    with pytest.raises(UserError) as caught:
        released_backbone("infinity2b", spec, folder, CPU, TextOptions())
    return str(caught.value)


def test_missing_files_are_named_with_their_source(tmp_path: Path, states: tuple[State, State]) -> None:
    assert "infinity_2b_reg.pth" in refusal(tmp_path) and "FoundationVision/Infinity" in refusal(tmp_path)
    write(tmp_path, states)
    (tmp_path / VAE_FILE).unlink()
    assert "infinity_vae_d32reg.pth or infinity_vae_d32_reg.pth" in refusal(tmp_path)
    assert "is none" in refusal(tmp_path / "nowhere")


def test_keys_that_do_not_fit_are_listed(tmp_path: Path, states: tuple[State, State]) -> None:
    write(tmp_path, ({key: value for key, value in states[0].items() if ".0.ca." not in key}, states[1]))
    assert "14 keys are missing, first block_chunks.0.module.0.ca.v_bias" in refusal(tmp_path)
    write(tmp_path, (states[0] | {"extra.weight": torch.zeros(1)}, states[1]))
    assert "1 keys are unexpected, first extra.weight" in refusal(tmp_path)
    write(tmp_path, states)
    other = replace(SPEC, transformer=replace(SMALL, width=128, heads=4))
    assert "of other shapes" in refusal(tmp_path, other) and "(1, 1, 64) where (1, 1, 128) is wanted" in refusal(
        tmp_path, other
    )


def test_a_file_of_another_model_is_recognised(tmp_path: Path, states: tuple[State, State]) -> None:
    write(tmp_path, (states[1], states[1]))
    assert "it looks like an Infinity tokenizer" in refusal(tmp_path)
    write(tmp_path, ({"class_emb.weight": torch.zeros(1)}, states[1]))
    assert "it looks like a VAR transformer" in refusal(tmp_path)


class Surprise:
    def __reduce__(self) -> tuple:
        return (print, ("executed",))


def test_pickled_objects_are_never_executed(tmp_path: Path, states: tuple[State, State], capsys) -> None:  # noqa: ANN001
    write(tmp_path, states, model=lambda path, state: torch.save({"surprise": Surprise(), **state}, path))
    assert "more than tensors" in refusal(tmp_path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"not a checkpoint"])
def test_damaged_files_are_one_sentence(tmp_path: Path, states: tuple[State, State], content: bytes) -> None:
    write(tmp_path, states)
    (tmp_path / MODEL_FILE).write_bytes(content)
    assert refusal(tmp_path).startswith(f"weights {str(tmp_path / MODEL_FILE)!r}")


def test_a_shard_that_is_not_there_is_named(tmp_path: Path, states: tuple[State, State]) -> None:
    write(tmp_path, states, model=sharded("bin"))
    (tmp_path / MODEL_FILE / "part-1.bin").unlink()
    assert "names 1 files that are not there, first part-1.bin" in refusal(tmp_path)


def test_random_weights_have_the_true_shapes_and_generate(tmp_path: Path) -> None:
    backbone = random_backbone("infinity2b", SPEC, CPU)
    expected = {key: value.shape for key, value in Infinity(SMALL).state_dict().items()}
    assert {key: value.shape for key, value in backbone.model.state_dict().items()} == expected
    backbone = replace(backbone, schedule_for=lambda ratio: ((1, 1, 1), (1, 2, 2), (1, 4, 4)))
    images = generate(backbone, ["a", "a longer prompt"], seed=0)
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all()
    assert torch.equal(images, generate(random_backbone_again(backbone), ["a", "a longer prompt"], seed=0))


def random_backbone_again(like):  # noqa: ANN001, ANN201
    return replace(random_backbone("infinity2b", SPEC, CPU), schedule_for=like.schedule_for)


def test_without_a_folder_the_command_says_what_is_needed() -> None:
    with pytest.raises(UserError, match="infinity_8b_weights, infinity_vae_d56_f8_14_patchify.pth, flan-t5-xl"):
        load_backbone("infinity8b")


VAR_SMALL = replace(VAR_D16, width=64, heads=2, depth=2, sides=(1, 2, 3), classes=10, channels=8, vocabulary=40)
VQ_SMALL = VQConfig(vocabulary=40, channels=8, base=32, channel_multipliers=(1, 2), blocks=1)
VAR_SPEC = replace(RELEASED["var_d16"], transformer=VAR_SMALL, tokenizer=VQ_SMALL, schedule_for=VAR_SMALL.schedule_for)


@pytest.mark.parametrize("shared_aln", [False, True])
def test_var_files_read_back_exactly_without_their_masks_and_generate(tmp_path: Path, shared_aln: bool) -> None:
    spec = replace(VAR_SPEC, transformer=replace(VAR_SMALL, shared_aln=shared_aln))
    model, tokenizer = VAR(spec.transformer).state_dict(), VQTokenizer(VQ_SMALL).state_dict()
    torch.save(
        model | {"lvl_1L": torch.zeros(1, 14).long(), "attn_bias_for_masking": torch.zeros(1, 1, 14, 14)},
        tmp_path / "var_d16.pth",
    )
    torch.save(tokenizer, tmp_path / "vae_ch160v4096z32.pth")
    backbone = released_backbone("var_d16", spec, tmp_path, CPU, TextOptions())
    for module, state in ((backbone.model, model), (backbone.tokenizer, tokenizer)):
        assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items())
    policy = Policy("var_d16", 2, backbone.scale_schedule(), {2: ScalePruning(0.5, 1, granularity="scale")})
    together = generate(backbone, ["7", "3"], policy=policy, seed=1)
    later = replace(backbone.sampling, first_sample=1)
    torch.testing.assert_close(
        together[1:], generate(backbone, ["3"], policy=policy, seed=1, sampling=later), rtol=0, atol=1e-4
    )


def test_var_refuses_another_size_and_prompts_that_are_no_classes(tmp_path: Path) -> None:
    torch.save(VAR(VAR_SMALL).state_dict(), tmp_path / "var_d16.pth")
    torch.save(VQTokenizer(VQ_SMALL).state_dict(), tmp_path / "vae_ch160v4096z32.pth")
    deeper = replace(VAR_SPEC, transformer=replace(VAR_SMALL, depth=3))
    assert "are missing, first blocks.2" in refusal(tmp_path, deeper)
    with pytest.raises(UserError, match="class number from 0 to 999, got 'a cat'"):
        generate(released_backbone("var_d16", VAR_SPEC, tmp_path, CPU, TextOptions()), ["a cat"])


HART_SMALL = HartConfig(
    width=48, heads=2, depth=2, sides=(1, 2, 3), context_tokens=6, context_width=20, vocabulary=40, channels=8,
    diffusion_width=32, diffusion_depth=2,
)  # fmt: skip
HART_FIELDS = {
    "embed_dim": 48, "num_heads": 2, "depth": 2, "patch_nums": [1, 2, 3], "context_token": 6, "context_dim": 20,
    "attn_type": "llama", "mlp_type": "llama", "disable_aln": True, "diff_width": 32, "diff_depth": 2,
}  # fmt: skip


def write_hart(folder: Path, fields: dict) -> BackboneSpec:
    """Writes the folders of the release: config.json and the transformer in llm/, the tokenizer beside it under vae.*."""
    spec = hart_sized(RELEASED["hart"], HART_SMALL)
    vq = replace(VQ_SMALL, scales=3, phi_at_last=False)
    spec = replace(spec, tokenizer=vq)
    (folder / "llm").mkdir()
    (folder / "tokenizer").mkdir()
    (folder / "llm" / "config.json").write_text(json.dumps(fields))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        state = Hart(HART_SMALL).state_dict()
        torch.save(state | {"lvl_1L": torch.zeros(1, 19).long()}, folder / "llm" / "ema_model.bin")
        tokenizer = {f"vae.{key}": value for key, value in VQTokenizer(vq).state_dict().items()}
    save_file({key: value.clone() for key, value in tokenizer.items()}, folder / "tokenizer" / "model.safetensors")
    return replace(spec, transformer=HART_0_7B)


def test_hart_takes_its_sizes_from_the_released_configuration_and_reads_back(tmp_path: Path) -> None:
    spec = write_hart(tmp_path, HART_FIELDS | {"vocab_size": 40})
    small = replace(
        spec, family=replace(spec.family, configured=lambda spec, fields: replace(spec, transformer=of_small(fields)))
    )
    backbone = released_backbone("hart", small, tmp_path, CPU, TextOptions())
    written = torch.load(tmp_path / "llm" / "ema_model.bin", weights_only=True)
    ours = backbone.model.state_dict()
    assert set(written) - set(ours) == {"lvl_1L"} and all(torch.equal(value, written[key]) for key, value in ours.items())
    assert not backbone.skippable


def of_small(fields: dict) -> HartConfig:
    """The tokenizer's sizes are not in config.json: those of the small one are put in here."""
    return replace(HartConfig.from_fields(fields), vocabulary=40, channels=8)


def test_a_hart_configuration_that_was_never_released_is_refused(tmp_path: Path) -> None:
    spec = write_hart(tmp_path, HART_FIELDS | {"attn_type": "gpt2"})
    assert "attn_type of a HART config must be llama, got gpt2" in refusal(tmp_path, spec)
    (tmp_path / "llm" / "config.json").write_text("[]")
    assert "must hold named fields" in refusal(tmp_path, spec)
    (tmp_path / "llm" / "config.json").unlink()
    assert "lacks llm/config.json" in refusal(tmp_path, spec) and "mit-han-lab" in refusal(tmp_path, spec)
