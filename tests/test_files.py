"""Files are written whole or not at all, by one module; and nothing that is read can run code."""

import ast
import errno
import multiprocessing
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import autoprune
from autoprune.errors import UserError
from autoprune.files import no_space, whole_file, write_whole

PACKAGE = Path(autoprune.__file__).parent
WRITERS = ("write_text", "write_bytes", "savefig", "save_file", "save", "savez", "touch", "to_csv", "tofile", "dump", "memmap",
           "open_memmap", "NamedTemporaryFile", "mkstemp", "symlink_to", "copyfile", "copytree", "move")  # fmt: skip
JUSTIFIED = {
    "files.py": "temporary.write_bytes",
    "calibrate.py": "summary(backbone, samples, decision, prompts=choices.prompts).save",  # Calibration.save is write_whole
    "policy_command.py": "policy.save",
    "search/export.py": "policy.save",
    "search/folder.py": "(self.path / 'study.lock').open",  # a lock, empty
    "search/journal_file.py": "self._guard.open self._path.open",  # a lock; appended under it
    "search/report_page.py": "film.save",  # to memory
    "search/tracking.py": "grid.save",  # to memory
    "search/workers.py": "self.log.open",  # a log, appended to
    "measure/memory.py": "_CLEAR_REFS.write_text",  # a switch of the kernel
    "measure/metrics/external.py": "Image.fromarray(pixels).save",  # a temporary folder of its own
    "measure/metrics/external_program.py": "(output.parent / 'log.txt').open",
    "measure/loading.py": "torch.save (folder / 'pytorch_model.bin.index.json').write_text",
    "testbed/latents.py": "np.lib.format.open_memmap",  # valid only once the file `done` is there
    "testbed/image_store.py": "np.memmap",
    "testbed/train_tokenizer.py": "session.save self.save",
    "testbed/generator_session.py": "self.save",
}
RUNS_CODE = ("eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load",
             "yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "shelve.open", "dill.load", "load_pickle",
             "os.system", "os.popen")  # fmt: skip

IMPORTS_CODE = re.compile(
    r"^\s*(from pickle import (?!UnpicklingError$)|(from|import) (dill|joblib|marshal|shelve|cloudpickle)\b)", re.M
)


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, tuple[str, ...]]]:
    """Yields every call with the names that `with whole_file(...) as NAME` around it bound."""

    def walk(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[ast.Call, tuple[str, ...]]]:
        if isinstance(node, ast.With):
            names += tuple(
                item.optional_vars.id for item in node.items if ast.unparse(item.context_expr).startswith("whole_file(")
            )
        if isinstance(node, ast.Call):
            yield node, names
        for child in ast.iter_child_nodes(node):
            yield from walk(child, names)

    return walk(tree, ())


def writes(call: ast.Call) -> bool:
    """Returns whether a call can create or change a file."""
    name = ast.unparse(call.func)
    if name.rpartition(".")[2] != "open":
        return name.rpartition(".")[2] in WRITERS
    given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [node.value for node in given if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return any(set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes)


def test_no_file_is_written_but_through_files() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = str(path.relative_to(PACKAGE))
        for call, temporary in calls(ast.parse(path.read_text())):
            name = ast.unparse(call.func)
            if not writes(call) or any(ast.unparse(value) in temporary for value in call.args):
                continue
            if name not in JUSTIFIED.get(place, ""):
                found.append(f"{place}:{call.lineno} {name}")
    assert not found, "write with autoprune.files.write_whole or whole_file"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("path.write_text('x')", True),
        ("open(p, 'w')", True),
        ("open(p, mode='ab')", True),
        ("p.open('r+b')", True),
        ("np.save(p, x)", True),
        ("open(p)", False),
        ("p.open('rb')", False),
        ("Image.open('wax.png')", False),
    ],
)
def test_the_walk_knows_writes_from_reads(code: str, expected: bool) -> None:
    assert writes(ast.parse(code).body[0].value) is expected


def test_nothing_that_is_read_can_run_code() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        assert not re.search(
            r"^\s*(from pickle import (?!UnpicklingError$)|(from|import) (dill|joblib|marshal|shelve|cloudpickle))",
            path.read_text(),
            re.M,
        )
        for call, _ in calls(ast.parse(path.read_text())):
            name, options = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
            pickled = name == "torch.load" and options.get("weights_only") != "True"
            if name in RUNS_CODE or pickled or options.get("shell", "False") != "False" or "allow_pickle" in options:
                found.append(f"{path.relative_to(PACKAGE)}:{call.lineno} {name}")
    assert not found


def _write_often(path: str, letter: str, count: int) -> None:
    for _ in range(count):
        write_whole(path, letter * 200_000)


def test_two_processes_that_write_one_file_never_collide(tmp_path: Path) -> None:
    path, context = tmp_path / "front.json", multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(str(path), letter, 40)) for letter in "ab"]
    write_whole(path, "c" * 200_000)
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        text = path.read_text()
        assert text == text[0] * 200_000, "readers see one whole file"
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["front.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "a.json", "old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_files_get_the_usual_rights_and_links_and_devices_stay(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        path = write_whole(tmp_path / "deep" / "a.txt", "é")
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o640 and path.read_bytes() == "é".encode()
    link = tmp_path / "link.txt"
    link.symlink_to(path)
    write_whole(link, b"new")
    assert link.is_symlink() and path.read_text() == "new"
    write_whole("/dev/null", "gone")
    assert Path("/dev/null").is_char_device()


def test_a_full_device_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'/dev/full' must be written, but: No space left on device; make space there"):
        write_whole("/dev/full", "x")
    path, limits = write_whole(tmp_path / "a.json", "old"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            write_whole(path, "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert no_space(OSError(errno.ENOENT, "no"), path) is None


def test_a_file_system_without_space_keeps_the_old_file(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        path = write_whole(tmp_path / "a.json", "old")
        with pytest.raises(UserError, match="No space left on device; make space there, and the same command goes on"):
            write_whole(path, "x" * 200_000)
        assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        with pytest.raises(UserError, match="Read-only file system"):
            write_whole(path, "new")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
