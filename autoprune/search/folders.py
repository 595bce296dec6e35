"""Where the shipped YAML and JSON files lie: inside the package when installed, beside it in a checkout."""

from pathlib import Path

import autoprune


def shipped_folder(name: str) -> Path:
    """Returns the folder `conf` or `search_spaces`."""
    package = Path(autoprune.__file__).parent
    return next(path for path in (package / name, package.parent / name) if path.is_dir()).resolve()
