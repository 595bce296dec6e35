"""The layers: imports go down only, and production runs where no search package exists."""

import ast
import subprocess
import sys
from pathlib import Path

import autoprune

PACKAGE = Path(autoprune.__file__).parent
LEVELS = dict.fromkeys(
    (
        "errors",
        "files",
        "video_files",
        "moving_pictures",
        "clips",
        "noise",
        "rules",
        "validity",
        "policy",
        "policy_reading",
        "policy_text",
        "policy_command",
        "arguments",
    ),
    0,
)
LEVELS |= {
    "pruning": 1,
    "backbones": 2,
    "sampling": 3,
    "state": 3,
    "generation": 3,
    "replay": 3,
    "prefix": 3,
    "measure": 4,
    "testbed": 4,
    "search": 5,
}
COMMANDS = ("generate", "bench", "calibrate", "calibrate_proxy", "compare", "production", "storage_proxy", "verify", "__main__")
LEVELS |= dict.fromkeys(COMMANDS, 5)
SEARCH_PACKAGES = ("optuna", "hydra", "omegaconf", "wandb", "torchmetrics", "pydantic", "rich", "PIL", "matplotlib")
SEARCH_PACKAGES += ("sklearn", "scipy", "threadpoolctl", "transformers", "av")


def imported(tree: ast.AST) -> set[str]:
    """Returns the part of autoprune (its first name below the package) that each import statement of a file reaches."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "autoprune" and part[1:]}


def test_imports_go_downwards_only():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if here == "__init__":
            continue
        for name in imported(ast.parse(path.read_text())):
            if name in LEVELS and LEVELS[name] > LEVELS[here]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_every_part_has_a_level():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert parts - {"__init__"} <= LEVELS.keys()


def run_without(packages: tuple[str, ...], code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs Python code in a process where these packages cannot be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n"
    return subprocess.run([sys.executable, "-c", block + code, *arguments], capture_output=True, text=True, timeout=120)


def test_load_and_generate_need_no_search_package(tmp_path):
    code = """
import autoprune
backbone = autoprune.load_backbone("tiny")
dense = autoprune.Policy(backbone.name, backbone.depth, backbone.scale_schedule())
path = dense.save(sys.argv[1])
images = autoprune.generate(backbone, ["a red circle"], policy=autoprune.Policy.load(path), seed=0)
print(tuple(images.shape))
"""
    done = run_without(SEARCH_PACKAGES, code, str(tmp_path / "dense.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 3, 128, 128)"


def test_importing_the_package_imports_neither_torch_nor_search():
    done = run_without((), "import autoprune\nprint(sorted({'torch', 'optuna', 'hydra'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_resolves():
    assert all(getattr(autoprune, name) is not None for name in autoprune.__all__)
    assert callable(autoprune.generate)
