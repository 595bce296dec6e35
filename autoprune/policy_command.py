"""`python -m autoprune.policy`: shows, validates, compares and migrates policy files; standard library only."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence

from autoprune.errors import UserError, unknown_name
from autoprune.policy import LABELS, SCHEMA, Policy, policy_files
from autoprune.policy_text import differences, policy_lines

USAGE = "python -m autoprune.policy show FILE"
_JSON = {"json=true": True, "json=false": False}


def main(arguments: Sequence[str]) -> int:
    """Runs the command on policy files or folders of them; with `json=true` it prints one JSON document.

    Returns 0; 1 when `diff` finds other decisions; 2 after bad input, which is one sentence on standard error, and when
    `validate` finds a bad file, told on its own line.
    """
    as_json = any(_JSON.get(argument, False) for argument in arguments)
    action, *sources = [argument for argument in arguments if argument not in _JSON] or [""]
    try:
        if action not in ACTIONS:
            raise unknown_name("action", action, ACTIONS)
        if not sources:
            raise UserError(f"at least one policy file must be given; for example {USAGE}.")
        document, lines, code = ACTIONS[action](sources)
    except UserError as error:
        print(f"autoprune: {error}", file=sys.stderr)
        return 2
    print(json.dumps(document, indent=2) if as_json else "\n".join(lines))
    return code


Told = tuple[object, list[str], int]  # the JSON document, the same as lines, the exit code


def _show(sources: Sequence[str]) -> Told:
    documents, lines = {}, []
    for file in _files(sources):
        title, *told = policy_lines(Policy.load(file))
        documents[file] = document = _document(file)
        lines += [f"{file}: {title}", *told, f"digest {document['digest']}", ""]
    return documents, lines[:-1], 0


def _validate(sources: Sequence[str]) -> Told:
    problems = {file: _problem(file) for file in _files(sources)}
    lines = [problem if problem else f"{file}: ok" for file, problem in problems.items()]
    return problems, lines, 2 if any(problems.values()) else 0


def _diff(sources: Sequence[str]) -> Told:
    files = _files(sources)
    if len(files) != 2:
        raise UserError(f"diff compares two policy files, got {len(files)}; name two.")
    one, other = (Policy.load(file) for file in files)
    found, equal = differences(one, other), one.key() == other.key()
    fields = {name: list(values) for name, values in found.items()}
    verdict = f"{'equal' if equal else 'different'} decisions, {len(found)} different fields"
    decisions = [name for name in found if name.partition(".")[0] not in LABELS]
    ordered = decisions + [name for name in found if name not in decisions]
    lines = [f"{name}: {_short(found[name][0])} -> {_short(found[name][1])}" for name in ordered]
    return {"equal_decisions": equal, "fields": fields}, [*lines, verdict], 0 if equal else 1


def _migrate(sources: Sequence[str]) -> Told:
    """Rewrites files as this version writes them; decisions and measurements stay, the digest follows the text."""
    states = {}
    for file in _files(sources):
        policy = Policy.load(file)
        current = json.loads(policy.to_json()) == _document(file)
        states[file] = f"is current ({SCHEMA})" if current else f"rewritten as {SCHEMA}, all fields written out"
        if not current:
            _save(policy, file)
    return states, [f"{file}: {state}" for file, state in states.items()], 0


ACTIONS: Mapping[str, Callable[[Sequence[str]], Told]] = {
    "show": _show,
    "validate": _validate,
    "diff": _diff,
    "migrate": _migrate,
}


def _files(sources: Sequence[str]) -> list[str]:
    return [str(file) for source in sources for file in policy_files(source)]


def _save(policy: Policy, file: str) -> None:
    try:
        policy.save(file)
    except OSError as error:
        raise UserError(f"policy file {file!r} must be writable ({error.strerror}); copy it elsewhere.") from None


def _problem(file: str) -> str:
    """Returns what is wrong with a policy file in one sentence that names it, empty for a good one."""
    try:
        Policy.load(file).check_prunes()
    except UserError as error:
        return str(error) if file in str(error) else f"{file}: {error}"
    return ""


def _document(file: str) -> dict[str, object]:
    with open(file) as opened:
        return json.load(opened)


def _short(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else json.dumps(value)
