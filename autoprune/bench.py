"""`python -m autoprune.bench`: speed ratios measured side by side in one run, with the machine they were measured on.

Every candidate alternates with dense, so that other work on the machine slows both. The record is JSON.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from autoprune.arguments import run_command
from autoprune.backbones import Backbone, LoadArguments, load_backbone
from autoprune.backbones.attention import explicit_attention, sdpa_attention
from autoprune.errors import UserError, unknown_name
from autoprune.files import check_writable, write_whole
from autoprune.generation import generate
from autoprune.measure.bars import bars_table, measure_bars
from autoprune.measure.bars_case import bars_case, plain_case
from autoprune.measure.device import device_identity
from autoprune.measure.latency import Timing, interleaved
from autoprune.measure.loading import LoadingCase, measure_loading
from autoprune.measure.memory import PeakMemory
from autoprune.measure.memory_check import VIDEO, MemoryCase, check_memory
from autoprune.measure.overhead import OverheadCase, measure_overhead
from autoprune.measure.placement import PROMPT, loaded_or_planned, with_fitting_keys
from autoprune.measure.scale_table import memory_table, scale_table
from autoprune.measure.scales import measure_scales
from autoprune.measure.scaling_table import scaling_table
from autoprune.policy import Policy, policy_files, token_count
from autoprune.rules import BranchRule, ScalePruning

USAGE = "python -m autoprune.bench batch=16 policies=outputs/tiny-unified/policies"
SUITES = ("policies", "overhead", "loading", "search", "scaling", "storage", "scales", "memory", "bars")


@dataclass(frozen=True)
class Choices(LoadArguments):
    """The command line. `policies` is a policy file or a folder of them, timed beside the built-in probes.

    `suite` policies times whole generations of a backbone, overhead the selection and restoration of one large scale, loading
    measures host memory while a synthetic sharded checkpoint of 1 GB is read, search compares samplers (six minutes), scaling
    does so for up to 256 simulated workers (ten minutes), storage times the journal and the PostgreSQL server at `url`, scales
    reports FLOPs, time and memory of every scale (`presets=true`: of every preset too; `device=meta`, or random weights that do
    not fit: without times), memory compares predictions of images and a video, bars
    checks what runtime and search must reach, at sizes of its own whatever `backbone` and `batch` say (eight minutes). The
    record goes to the file `json`.
    """

    batch: int = 16
    rounds: int = 9
    policies: str = ""
    presets: str = ""
    json: str = "outputs/bench.json"
    suite: str = "policies"
    url: str = ""

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise unknown_name("suite", self.suite, SUITES)
        if self.presets not in ("", "true", "false"):
            raise UserError(f"presets must be true or false, got {self.presets!r}.")
        for name in ("batch", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")


def main(arguments: list[str]) -> int:
    """Runs the command; returns 0, 2 after bad input, 130 after Ctrl-C."""
    return run_command(Choices, arguments, usage=USAGE, command=_bench)


def probe_policies(backbone: Backbone) -> dict[str, Policy]:
    """Returns fixed policies that show each mechanism's cost on any schedule: pruning, skipping, dropping a branch."""
    schedule, depth = backbone.scale_schedule(), backbone.depth
    last, cache = len(schedule) - 1, len(schedule) - 3

    def pruned(keep: float, granularity: str) -> dict[int, ScalePruning]:
        return {scale: ScalePruning(keep=keep, cache_scale=cache, granularity=granularity) for scale in (last - 1, last)}

    base = partial(Policy, backbone.name, depth, schedule)
    probes = {
        "sublayer keep 0.5 on the last two scales": base(pruned(0.5, "sublayer")),
        "scale keep 0.5 on the last two scales": base(pruned(0.5, "scale")),
        "scale keep 0.25 on the last two scales": base(pruned(0.25, "scale")),
        "one branch at the last scale": base(guidance=BranchRule("cond", last)),
    }
    return probes | ({"last scale skipped": base(skip_last=1)} if backbone.skippable else {})


def loaded_policies(source: str) -> dict[str, Policy]:
    """Returns the policies of a file or folder by name, none for "". Raises UserError, also for one that changes nothing."""
    policies = {file.stem: Policy.load(file) for file in policy_files(source)} if source else {}
    for policy in policies.values():
        policy.check_prunes()
    return policies


def bench_policies(backbone: Backbone, policies: dict[str, Policy], choices: Choices) -> dict[str, dict[str, float]]:
    """Times whole generations (text, blocks, decoder) of every policy against dense."""
    prompts = [PROMPT] * choices.batch
    runs: dict[str, Callable[[], Tensor]] = {"dense": partial(generate, backbone, prompts)}
    runs |= {name: partial(generate, backbone, prompts, policy=policy) for name, policy in policies.items()}
    timings = interleaved(runs, rounds=choices.rounds, warm_up=1, device=backbone.device)
    rows = {}
    for name, run in runs.items():
        with PeakMemory(backbone.device) as memory:
            run()
        rows[name] = _row(timings[name], timings["dense"]) | {"peak_memory_mb": memory.megabytes}
    return rows


def bench_attention(backbone: Backbone, choices: Choices) -> dict[str, dict[str, float]]:
    """Times the attention implementations on the shapes of the last scale: all its queries, all keys so far."""
    config, schedule = backbone.model.config, backbone.scale_schedule()
    width = config.width // config.heads
    shape = (2 * choices.batch, config.heads, sum(map(token_count, schedule)), width)
    k, v = (torch.randn(shape, device=backbone.device).to(backbone.dtype) for _ in range(2))
    q = k[:, :, -token_count(schedule[-1]) :]
    runs = {
        "explicit": lambda: explicit_attention(q, k, v, scale=1.0),
        "sdpa": lambda: sdpa_attention(q, k, v, scale=1.0),
    }
    timings = interleaved(runs, rounds=choices.rounds, warm_up=2, device=backbone.device)
    return {name: _row(timing, timings["explicit"]) for name, timing in timings.items()}


def _bench(choices: Choices) -> str:
    record = {
        "what": "seconds per batch; ratio is reference / this, the reference being dense, or explicit attention",
        "command": "python -m autoprune.bench " + " ".join(f"{key}={value}" for key, value in asdict(choices).items() if value),
        "batch": choices.batch,
        "rounds": choices.rounds,
    }
    suites = {"policies": _policies, "overhead": _overhead, "loading": _loading, "scales": _scales, "memory": _memory}
    suites |= {"bars": _bars, **dict.fromkeys(("search", "scaling", "storage"), _searching)}
    record |= suites[choices.suite](choices)
    path = Path(choices.json)
    try:
        write_whole(path, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"json {choices.json!r} cannot be written ({error.strerror}); choose another file.") from None
    return _table(record) + f"\nrecord: {path}"


def _policies(choices: Choices) -> dict[str, object]:
    backbone = with_fitting_keys(choices.load(), batch=choices.batch)
    policies = probe_policies(backbone) | loaded_policies(choices.policies)
    return {
        "machine": device_identity(backbone.device, backbone.dtype),
        "backbone": _described(backbone),
        "policies": bench_policies(backbone, policies, choices),
        "attention": bench_attention(backbone, choices),
    }


def _overhead(choices: Choices) -> dict[str, object]:
    backbone = load_backbone("tiny", weights="random", device=choices.device, dtype=choices.dtype)
    device, dtype, case = backbone.device, backbone.dtype, OverheadCase(batch=choices.batch)
    return {
        "what": "seconds of select + restore alone; ratio is their share of the pruned scale's seconds",
        "machine": device_identity(device, dtype),
        "case": asdict(case),
        "overhead": measure_overhead(case, device=device, dtype=dtype, rounds=choices.rounds),
    }


def _loading(choices: Choices) -> dict[str, object]:
    case = LoadingCase()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_loading(case, Path(folder))
    return {
        "what": "megabytes; ratio is (peak - kept) / largest shard: what loading needs besides the loaded model",
        "machine": device_identity(torch.device("cpu"), torch.float32),
        "case": asdict(case),
        "loading": rows,
    }


def _searching(choices: Choices) -> dict[str, object]:
    from autoprune.search.bench_suites import scaling_suite, search_suite, storage_suite

    check_writable(Path(choices.json).parent, what="json", remedy="choose another file")
    plot = Path(choices.json).with_suffix(".png")
    if choices.suite == "storage":
        return storage_suite(choices.url)
    return scaling_suite(plot) if choices.suite == "scaling" else search_suite(choices.load(), batch=choices.batch, plot=plot)


def _scales(choices: Choices) -> dict[str, object]:
    check_writable(Path(choices.json).parent, what="json", remedy="choose another file")
    backbone, left_out = loaded_or_planned(choices, batch=choices.batch)
    presets, missing = _presets(backbone) if choices.presets == "true" else ({}, [])
    left_out += missing
    policies = presets | loaded_policies(choices.policies)
    record = {
        "what": "2 FLOPs a multiply-accumulate, medians in milliseconds; share is achieved FLOP/s / the best matrix product's",
        "machine": device_identity(backbone.device, backbone.dtype),
        "backbone": _described(backbone),
        "scales": measure_scales(backbone, policies, batch=choices.batch, rounds=choices.rounds, prompt=PROMPT),
    }
    try:
        from autoprune.search.scale_figure import save_scale_plot

        save_scale_plot(record | {"batch": choices.batch, "rounds": choices.rounds}, Path(choices.json).with_suffix(".png"))
    except ModuleNotFoundError as error:
        left_out.append(f'the plot is left out: it needs {error.name}; run: pip install "autoprune[search]".')
    return record | {"left_out": left_out}


def _described(backbone: Backbone) -> dict[str, object]:
    described = {"name": backbone.name, "weights": backbone.revision, "scale_schedule": backbone.scale_schedule()}
    return described | {"keys": backbone.keys}


def _presets(backbone: Backbone) -> tuple[dict[str, Policy], list[str]]:
    """Returns the presets of the unified space and a sentence for each that is left out, or one for all."""
    try:
        from autoprune.search.comparison_records import preset_candidates
        from autoprune.search.folders import shipped_folder
        from autoprune.search.space import space_for
        from autoprune.search.space_file import read_space

        space = space_for(read_space(shipped_folder("search_spaces") / "unified.yaml"), backbone)
    except ModuleNotFoundError as error:
        return {}, [f'presets are left out: they need {error.name}; run: pip install "autoprune[search]".']
    return {candidate.name: candidate.policy for candidate in preset_candidates(space)}, list(space.missing)


def _memory(choices: Choices) -> dict[str, object]:
    cases = {"infinity": MemoryCase(), "infinitystar 480p": VIDEO}
    rows = {name: check_memory(case) for name, case in cases.items()}
    return {
        "what": "MB above the loaded model of one generation; ratio is predicted / measured",
        "batch": 1,
        "machine": device_identity(torch.device("cpu"), torch.float32),
        "cases": {name: asdict(case) for name, case in cases.items()},
        "memory": {f"{name}, {policy}": row for name, table in rows.items() for policy, row in table.items()},
    }


def _bars(choices: Choices) -> dict[str, object]:
    check_writable(Path(choices.json).parent, what="json", remedy="choose another file")
    backbone = load_backbone("tiny", device=choices.device, dtype=choices.dtype)
    device, dtype = backbone.device, backbone.dtype
    case = bars_case(device, dtype)
    bars, left_out = measure_bars(case, device=device, rounds=choices.rounds), []
    try:
        from autoprune.search.sampler_bench import BARRED, SamplerCase, sampler_bars
        from autoprune.search.trial_bar import TrialCase, trial_bar

        bars |= trial_bar(backbone, TrialCase()) | sampler_bars(backbone, SamplerCase(samplers=BARRED))
    except ModuleNotFoundError as error:
        left_out.append(f'bars of the search are left out: they need {error.name}; run: pip install "autoprune[search]".')
    return {
        "what": "value against bar; seconds are medians of a generation without its decoder unless a name says more",
        "machine": device_identity(device, dtype),
        "batch": ", ".join(map(str, case.batches)),
        "case": plain_case(case),
        "bars": bars,
        "left_out": left_out,
    }


def _row(timing: Timing, reference: Timing) -> dict[str, float]:
    return {"seconds": timing.median, "spread": timing.spread, "ratio": reference.median / timing.median}


def _table(record: dict) -> str:
    machine = record["machine"]
    lines = [f"{machine['device_name']}, {machine['threads']} threads, {machine['dtype']}, batch {record['batch']}"]
    for name, row in record.get("loading", {}).items():
        lines.append(f"  {name:10s}" + "".join(f" {key} {value:.2f}" for key, value in row.items()))
    for name, curve in record.get("samplers", {}).items():
        reached = next((place for place, share in enumerate(curve["trials"], start=1) if share >= 0.9), None)
        end, seconds = curve["trials"][-1], curve["seconds"][-1]
        lines.append(f"  {name:8s} {end:.3f} after {len(curve['trials'])} trials, {seconds:.0f} s; 0.9 after {reached} trials")
    lines += scale_table(record["scales"]) if "scales" in record else []
    lines += scaling_table(record["scaling"]) if "scaling" in record else []
    if "storages" in record:
        from autoprune.search.storage_bench import storage_table

        lines += storage_table(record["storages"])
    lines += memory_table(record["memory"]) if "memory" in record else []
    lines += bars_table(record["bars"]) if "bars" in record else []
    lines += [f"left out: {sentence}" for sentence in record.get("left_out", ())]
    for part in (part for part in ("policies", "attention", "overhead") if part in record):
        lines.append(f"{part:44s} {'ms':>8s} {'+-':>6s} {'ratio':>6s}")
        for name, row in record[part].items():
            lines.append(f"  {name:42s} {1000 * row['seconds']:8.1f} {1000 * row.get('spread', 0):6.1f} {row['ratio']:6.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
