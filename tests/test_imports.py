"""Which folder may import which: data goes up the floors, and no two folders import each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("kernels", "quant", "runtime", "bench", "serve")  # the lowest first
ROOMS = ("io", "model", "engine", "app")  # of runtime, likewise


def imports(path: Path) -> Iterator[str]:
    """The modules that a file of the package imports when it runs, dotted, without `afnext`."""
    package = path.relative_to(ROOT).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    tree.body = [node for node in tree.body if node not in for_types]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            for alias in node.names:
                yield ".".join((*base, *(node.module or alias.name).split(".")))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("afnext."):
            yield (node.module or "").removeprefix("afnext.")
        elif isinstance(node, ast.Import):
            yield from (name.name.removeprefix("afnext.") for name in node.names if name.name.startswith("afnext."))


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_only_floors_below_it(floor: str) -> None:
    above = FLOORS[FLOORS.index(floor) + 1 :]
    found = [(path, name) for path in files(floor) for name in imports(path) if name.split(".")[0] in above]
    assert not found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_of_the_runtime_imports_only_those_before_it(room: str) -> None:
    later = {f"runtime.{name}" for name in ROOMS[ROOMS.index(room) + 1 :]}
    if room == "engine":
        later.add("runtime.io")  # the engine sees tokens and samples, never files or text
    found = [
        (path, name)
        for path in files(f"runtime/{room}")
        for name in imports(path)
        if ".".join(name.split(".")[:2]) in later
    ]
    assert not found


def test_native_kernels_import_nothing_above_them() -> None:
    """What every kernel shares with its native library is below both."""
    found = [(path, name) for path in files("kernels/native") for name in imports(path)]
    outside = [(path, name) for path, name in found if not name.startswith("kernels.native")]
    assert {name for _, name in outside} <= {"kernels.errors", "kernels.packed_weight", "kernels.strides"}


def test_folders_do_not_import_each_other() -> None:
    edges = {
        (".".join(path.relative_to(ROOT).parent.parts), ".".join(name.split(".")[:-1]) or name)
        for floor in FLOORS
        for path in files(floor)
        for name in imports(path)
    }
    folders = {source for source, _ in edges}
    edges = {(source, target) for source, target in edges if source != target and target in folders}
    assert not [(a, b) for a, b in edges if (b, a) in edges and not (a.startswith(f"{b}.") or b.startswith(f"{a}."))]
