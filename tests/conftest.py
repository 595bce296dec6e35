"""Test helpers beside the tests are importable by name; Ctrl-C is heard by tests and by what they start."""

import importlib.util
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background deaf to it


@pytest.fixture(scope="module")
def command():  # noqa: ANN201
    """Returns the module behind `python -m autoprune.generate`, under another name than the function's, which it would hide."""
    path = Path(__file__).parent.parent / "autoprune" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate_command", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
