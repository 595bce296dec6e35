"""The one exception a user may see: what rule was broken, by which value, and what to do."""


class UserError(ValueError):
    """Bad input described in one sentence. Command-line entries print it and exit with code 2."""


def unknown_name(kind: str, name: object, choices: object) -> UserError:
    """Returns the error for a name outside a closed list, e.g. `unknown scorer 'x'; choose from dc, random.`"""
    return UserError(f"unknown {kind} {name!r}; choose from {', '.join(map(str, choices))}.")
