"""Policy files that anybody may have damaged or written: one sentence, or the policy they say, never anything else."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoprune.errors import UserError
from autoprune.policy import Policy
from autoprune.policy_reading import MOST_BYTES, MOST_WORDS
from autoprune.policy_text import policy_lines
from autoprune.rules import BranchRule, KeyRule, ProbeRule, ScalePruning, StopRule

ROOT = Path(__file__).parent.parent
SCHEDULE = ((1, 1, 1), (1, 2, 2), (1, 4, 4), (1, 8, 8), (1, 16, 16))
DAMAGED, CHANGED, SEALED = 4500, 2500, 4500  # files of each kind
RUNS_CODE = (
    "exec",
    "compile",
    "os.system",
    "os.exec",
    "subprocess.Popen",
    "pickle.find_class",
    "marshal.loads",
    "ctypes.dlopen",
)
_watch = {"on": False, "seen": []}


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _watch["on"] and event in RUNS_CODE:
        _watch["seen"].append(event)


sys.addaudithook(_audit)


@cache
def originals() -> tuple[str, ...]:
    shipped = [file.read_text() for file in sorted((ROOT / "outputs" / "published").rglob("policies/*.json"))]
    scale = ScalePruning(0.4, 2, {"structure": 0.5, "texture": 2.0}, "scale", select="threshold", threshold=0.2, floor=0.1)
    probe = ProbeRule(2, 1, (0.1, 0.2), (1.0, 2.0), (1.0, -1.0), (0.5,), (1.5,))
    plain = {3: ScalePruning(0.5, 2, layers=(1, 4)), 4: ScalePruning(0.25, 2, rows="shared", interpolation="bicubic")}
    chunks = {4: ScalePruning(0.5, 2, "delta", "chunk", restorer="cached_state", ranks=(0.5,) * 6, chunk=2)}
    rules = {"guidance": BranchRule("adaptive", 2, "extrapolate", "kl_bits", 0.1), "stop": StopRule(3, 0.1, 0.05)}
    made = [
        Policy("tiny", 6, SCHEDULE, plain, name="plain é", measured={"speed_up": 1.5, "loss_interval": [0.1, 0.2]}),
        Policy("tiny", 6, SCHEDULE, {3: scale}, probe=probe, keys=KeyRule(2, 1), batch="split", **rules),
        Policy("tiny", 6, SCHEDULE, chunks, skip_last=0, chunks=6, provenance={"deep": [[[{"a": None}]]]}),
        Policy("tiny", 6, SCHEDULE, group_from=3, tier="fast"),
    ]
    assert len(shipped) == 8  # four tiers of each published search
    return (*shipped, *(policy.to_json() for policy in made))


def sealed(document: dict[str, object]) -> str:
    document = {name: value for name, value in document.items() if name != "digest"}
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return json.dumps(document | {"digest": "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()})


def read(content: bytes | str) -> Policy | None:
    """Returns the policy in a file's content, None after one clear sentence; anything else fails the test."""
    _watch.update(on=True, seen=[])
    try:
        return Policy.from_json(
            content if isinstance(content, str) else content.decode("utf-8", "surrogateescape"), source="it"
        )
    except UserError as error:
        text = str(error)
        assert "\n" not in text and len(text) <= MOST_WORDS + 10 and text.endswith("."), text
        return None
    finally:
        _watch["on"] = False
        assert not _watch["seen"]


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from([10**30, -(10**400), 1e308, -1e308, 5e-324, 0.1, 0.5, 1.0, 2.0, float("nan"), float("inf"), -0.0]),
    st.sampled_from(["", "dc", "cond", "scale", "cached_state", "3", "__class__", "\ud800", "a\nb", "x" * 3000, "é\0"]),
    st.recursive(
        st.sampled_from([None, 0, 1.5, "dc", True]),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["keep", "0", "dc", ""]), inner, max_size=2)
        ),
        max_leaves=4,
    ),
    st.sampled_from([30, 3000]).map(lambda depth: json.loads("[" * depth + "]" * depth) if depth < 100 else [[1] * depth]),
)
NAMES = st.sampled_from(
    ["keep", "scales", "3", "03", " 3", "٣", "from_scale", "scorer", "cache_scale", "digest", "self", "é", ""]
)
PLACES = st.lists(st.integers(0, 40), min_size=1, max_size=4)
KINDS = st.sampled_from(["replace", "replace", "remove", "add", "double"])


def changed(document: object, kind: str, place: list[int], value: object, name: str) -> None:
    """Changes an object somewhere inside: follows the numbers of `place` down as far as there is something."""
    here = document
    for number in place[:-1]:
        children = [
            part for part in (here.values() if isinstance(here, dict) else here) if isinstance(part, dict | list) and part
        ]
        if not children:
            break
        here = children[number % len(children)]
    keys = list(here) if isinstance(here, dict) else list(range(len(here)))
    key = keys[place[-1] % len(keys)] if keys else None
    if kind == "add" or key is None:
        here.update({name: value}) if isinstance(here, dict) else here.append(value)
    elif kind == "remove":
        del here[key]
    elif kind == "double" and isinstance(here, list):
        here.append(here[key])
    else:
        here[key] = value


def fuzz(count: int) -> Callable:
    return settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


CUTS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "set", "cut", "insert", "repeat", "end"]), st.integers(0, 2**16), st.integers(0, 255)
    ),
    min_size=1,
    max_size=3,
)


@fuzz(DAMAGED)
@given(st.integers(0, 7), CUTS)
def test_a_damaged_file_is_refused_or_says_what_it_said(number: int, cuts: list[tuple[str, int, int]]) -> None:
    text = originals()[number]
    content = bytearray(text.encode())
    for kind, place, amount in cuts:
        place %= len(content) or 1
        if kind == "flip" and content:
            content[place] ^= 1 << amount % 8
        elif kind == "set" and content:
            content[place] = amount
        elif kind == "cut":
            del content[place : place + amount]
        elif kind == "insert":
            content[place:place] = bytes([amount]) * (amount % 5 + 1)
        elif kind == "repeat":
            content[place:place] = content[place : place + amount]
        elif kind == "end":
            del content[place:]
    found = read(bytes(content))
    assert found is None or found == Policy.from_json(text)


@fuzz(CHANGED)
@given(st.integers(0, 7), KINDS, PLACES, VALUES, NAMES)
def test_a_changed_document_with_the_old_digest_is_refused(
    number: int, kind: str, place: list[int], value: object, name: str
) -> None:
    text = originals()[number]
    document = json.loads(text)
    changed(document, kind, place, value, name)
    found = read(json.dumps(document))
    if json.dumps(document, sort_keys=True) == json.dumps(json.loads(text), sort_keys=True):
        assert found == Policy.from_json(text)
    else:
        assert found is None


def same(written: object, held: object) -> bool:
    """Returns whether a field holds what a file says, without any conversion."""
    if isinstance(written, list):
        return isinstance(held, list | tuple) and len(held) == len(written) and all(map(same, written, held))
    if isinstance(written, dict):
        return isinstance(held, dict) and {str(key) for key in held} == set(written)
    return type(written) is type(held) and (written == held or written != written)


@fuzz(SEALED)
@given(st.integers(0, 7), st.lists(st.tuples(KINDS, PLACES, VALUES, NAMES), min_size=1, max_size=2))
def test_a_changed_document_with_a_right_digest_is_refused_or_read_as_it_is(
    number: int, changes: list[tuple[str, list[int], object, str]]
) -> None:
    document = json.loads(originals()[number])
    for change in changes:
        changed(document, *change)
    found = read(sealed(document))
    if found is None:
        return
    assert Policy.from_json(found.to_json()).to_json() == found.to_json() and found.key() and policy_lines(found)
    assert found.canonical().canonical() == found.canonical()
    rules = {"guidance": found.guidance, "stop": found.stop, "probe": found.probe, "keys": found.keys}
    rules |= {f"scale {index}": rule for index, rule in found.scales.items()}
    entries = {name: document.get(name) for name in ("guidance", "stop", "probe", "keys")}
    entries |= {f"scale {index}": entry for index, entry in document.get("scales", {}).items()}
    assert rules.keys() == entries.keys()
    for name, entry in entries.items():
        for field, value in (entry or {}).items():
            value = {value: 1.0} if field == "scorer" and isinstance(value, str) else value
            assert same(value, getattr(rules[name], field)), (name, field)
    for field in document.keys() - {"schema", "digest", "fingerprint", "scales", *rules}:
        assert same(document[field], getattr(found, field)), field


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": 1, "schema": 2}', "field 'schema' is there twice"),
        ('{"a": 1' + "0" * 5000 + "}", "not the JSON of a policy"),
        ('{"depth": 1' + "0" * 50 + "}", "a number has 51 digits"),
        ("[" * 100_000, "not the JSON of a policy"),
        ("[" * 60 + "]" * 60, "must nest at most 24 levels deep"),
        ('{"a": "\\ud800"}', "no Unicode"),
        ('{"\\ud800": 1}', "not the JSON of a policy"),
        (" " * (MOST_BYTES + 1), "must have at most 262144 bytes"),
    ],
    ids=["twice", "long number", "large number", "deep", "nested", "surrogate", "surrogate name", "long"],
)
def test_what_no_policy_has_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Policy.from_json(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 6.0}, "depth must be int, got 6.0"),
        ({"depth": True}, "depth must be int, got true"),
        ({"depth": 10**9}, "a backbone has 1 to 1000 layers"),
        ({"skip_last": "1"}, 'skip_last must be int, got "1"'),
        ({"scale_schedule": [[1, 1, 1.5]]}, "scale_schedule must be"),
        ({"scale_schedule": [[1, 1, 10**9]]}, "sides of a scale must be between 1 and 65536"),
        ({"scales": {"03": {"keep": 0.5, "cache_scale": 2}}}, "scales must be named by numbers, got '03'"),
        ({"scales": {"3": {"keep": float("nan"), "cache_scale": 2}}}, "keep must be float, got NaN"),
        ({"fingerprint": "0" * 16}, "names another scale schedule than it holds"),
        ({"measured": {"speed_up": "fast"}}, 'measured speed_up must be a number, got "fast"'),
        ({"measured": {"latency": 1.0}}, "latency and dense_latency must both be there"),
    ],
)
def test_a_value_of_another_type_is_never_converted(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Policy.from_json(sealed(json.loads(originals()[4]) | change))


PEAK = """
import json, sys, tracemalloc
sys.path.insert(0, ROOT)
from autoprune.errors import UserError
from autoprune.policy import Policy
from autoprune.policy_reading import MOST_BYTES

def full(start, part, end):
    return start + ",".join([part] * ((MOST_BYTES - len(start + end)) // (len(part) + 1))) + end

names = ",".join(f'"{number}":{{}}' for number in range(MOST_BYTES // 11))
ours = '{"schema":"autoprune.policy/1","digest":"",'
texts = [full("[", "{}", "]"), full("[", "[]", "]"), full("[", "1.5", "]"), full('{"a":[', '{"a":[]}', "]}")]
texts += [full(ours + '"measured":[', "{}", "]}"), full(ours + '"name":"', "x", '"}'), "[" * MOST_BYTES]
texts += ["{" + names + "}", ours + '"measured":{' + names[: MOST_BYTES - 80].rpartition(",")[0] + "}}"]
texts += ['"' + "\\u0041" * (MOST_BYTES // 7) + '"']
assert all(len(text) <= MOST_BYTES for text in texts)
open(FILE, "wb").truncate(3 * 10**9)
readers = [lambda text=text: Policy.from_json(text) for text in texts]
readers += [lambda: Policy.load(FILE), lambda: Policy.load("/dev/zero")]
tracemalloc.start()
refused = 0
for reader in readers:
    try:
        reader()
    except UserError:
        refused += 1
print(json.dumps([refused == len(readers), tracemalloc.get_traced_memory()[1] / 2**20]))
"""


def test_no_file_takes_more_than_50_mb_to_refuse(tmp_path: Path) -> None:
    code = PEAK.replace("ROOT", repr(str(ROOT))).replace("FILE", repr(str(tmp_path / "large.json")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    refused, megabytes = json.loads(done.stdout)
    assert refused and 1 < megabytes < 50
