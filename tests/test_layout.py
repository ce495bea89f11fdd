"""The layout that docs/architecture.md draws: who imports whom, types and lazy imports included."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "anima_fast"
# A room may import those of lower floors, and its own floor where no circle arises.
FLOORS = (
    {"__init__", "errors", "files", "console", "progress", "device"},
    {"kernels"},
    {"models", "options"},
    {"adapters", "measure", "memory", "data"},
    {"sampling", "reports"},
    {"training"},
    {"tools", "inspection", "bench", "migrate", "demo"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module; a package is named like its folder."""
    names = {path: path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py")}
    return {".".join(n.parts).removesuffix(".__init__"): path for path, n in names.items()}


def imports() -> dict[str, set[str]]:
    """Every module of the package with those that it names in an import anywhere in its text."""
    known, found = modules(), {}
    for name, path in known.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} imports relatively"
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                # A name of a package is not its __init__, which holds the version alone.
                named |= inner & known.keys() or {node.module}
        found[name] = {n for n in named if n in known and n not in (name, "anima_fast")}
    return found


def room(module: str) -> str:
    """The folder below the package, or a module at its root."""
    return [*module.split("."), "__init__"][1]


def circle(graph: dict) -> list[str] | None:
    """The members of a circle in the order in which they import each other, if there is one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return None


def test_every_room_has_a_floor():
    assert {room(name) for name in modules()} == FLOOR.keys()


def test_no_import_runs_upward():
    climbs = [
        f"{name} -> {target}"
        for name, targets in imports().items()
        for target in sorted(targets)
        if FLOOR[room(name)] < FLOOR[room(target)]
    ]
    assert not climbs


def test_files_import_each_other_in_no_circle():
    assert circle(imports()) is None


def test_rooms_import_each_other_in_no_circle():
    rooms: dict[str, set[str]] = {}
    for name, targets in imports().items():
        rooms.setdefault(room(name), set()).update(map(room, targets))
    assert circle({one: others - {one} for one, others in rooms.items()}) is None


def test_kernels_stand_alone():
    kernels = {name: targets for name, targets in imports().items() if room(name) == "kernels"}
    assert kernels and all(room(t) == "kernels" for ts in kernels.values() for t in ts)


def test_a_circle_is_named_by_its_members():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) in (["b", "c", "b"], ["c", "b", "c"])


def test_the_files_that_the_documents_name_exist():
    for page in (ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"):
        for name in re.findall(r"`([a-z_/]+(?:\.py|/))`", page.read_text(encoding="utf-8")):
            assert (PACKAGE / name).exists() or (ROOT / name).exists(), f"{page.name}: {name}"
