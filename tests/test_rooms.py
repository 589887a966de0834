"""Imports run one way, and importing the package costs nothing (architecture, "What must hold", 1)."""

import ast
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import hspsam_monai

PACKAGE = Path(hspsam_monai.__file__).parent

#: A room imports only from rooms further left; those of one group do not know each other.
ORDER = (
    {"errors"},
    {"files"},
    {"network_file"},
    {"workflow"},
    {"bundle_path"},
    {"data"},
    {"transforms"},
    {"encoders"},
    {"networks"},
    {"training"},
    {"inference"},
    {"clinical"},
    {"scores"},
    {"score_folders"},
    {"report"},
    {"evaluation"},
    {"cli"},
    {"__main__"},
)
RANK = {room: index for index, group in enumerate(ORDER) for room in group}
#: Optional, slow or doubtful: only inside the functions that need them.
LAZY = ("pydicom", "highdicom", "SimpleITK", "ray", "onnx", "onnxruntime", "transformers", "monailabel")


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return None if parts == ("__init__",) else parts[0]


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path):
    """Every imported module as (dotted name, line), wherever in the file; relative ones are resolved."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            origin = (base + (node.module or "")).rstrip(".")
            yield origin, node.lineno
            yield from ((f"{origin}.{alias.name}", node.lineno) for alias in node.names)


def rooms_used(path):
    for name, line in imports(path):
        head, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if head == PACKAGE.name and target in RANK:
            yield target, line


def test_every_room_has_its_place():
    rooms = {room_of(path) for path in sources()} - {None}
    assert rooms <= set(RANK), f"name the place of {rooms - set(RANK)} in ORDER"
    assert set(hspsam_monai.ROOMS) <= set(RANK)
    assert all(RANK[a] < RANK[b] for a, b in pairwise(hspsam_monai.ROOMS))


@pytest.mark.parametrize("room", sorted({room_of(path) for path in sources()} - {None}))
def test_imports_run_one_way(room):
    wrong = []
    for path in sources():
        if room_of(path) == room:
            for target, line in rooms_used(path):
                if target != room and RANK[target] >= RANK.get(room, -1):
                    wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_the_package_itself_imports_no_room():
    assert list(rooms_used(PACKAGE / "__init__.py")) == []


def top_level(path):
    """Modules imported when the file is imported: not inside functions."""
    pending = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            if not (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"):
                pending.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("name", LAZY)
def test_optional_packages_are_imported_where_they_are_used(name):
    eager = [str(path.relative_to(PACKAGE)) for path in sources() if name in {m.split(".")[0] for m in top_level(path)}]
    assert not eager


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sorted(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_is_light():
    heavy = {"torch", "monai", "numpy", "kornia", "segment_anything", "ignite", "PIL"}
    loaded = loaded_by("import hspsam_monai")
    assert "hspsam_monai" in loaded and not heavy & loaded


def test_a_room_is_loaded_on_first_use():
    loaded = loaded_by("import hspsam_monai; hspsam_monai.errors.DataError")
    assert "hspsam_monai.errors" in loaded and "torch" not in loaded
    with pytest.raises(AttributeError, match="no attribute 'kitchen'"):
        _ = hspsam_monai.kitchen
