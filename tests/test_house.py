"""The drawing of the house in docs/house.md, held to the imports of the sources; and families in their
folders."""

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {path.name: path for path in ROOT.glob("packages/*/src/vlp_*") if path.is_dir()}
FACE = 1 << 20
"""Line of a package itself."""
DRAWING = re.compile(r"^```text house\n(.*?)^```$", re.M | re.S)


class Place(NamedTuple):
    """Where a module stands: its package and line, counted from the top, and the group inside the line."""

    package: int
    line: int
    group: int


def drawing() -> dict[str, Place]:
    """Module -> place. A name stands for the module and all below it that have no name of their own."""
    found = DRAWING.search((ROOT / "docs/house.md").read_text())
    assert found, "docs/house.md has no block ```text house"
    places: dict[str, Place] = {}
    packages: list[str] = []
    for number, line in enumerate(found[1].splitlines()):
        names = re.split(r" {3,}", line.strip())[0]
        if line and not line.startswith(" "):
            packages.append(names)
            places[names] = Place(len(packages), FACE, 0)
            continue
        for group, part in enumerate(names.split(" | ")):
            for name in part.split(", "):
                module = f"{packages[-1]}.{name}"
                assert module not in places, f"docs/house.md: {module} stands there twice"
                places[module] = Place(len(packages), number, group)
    return places


def modules(package: str) -> Iterator[tuple[str, Path]]:
    for file in sorted(SOURCES[package].rglob("*.py")):
        parts = file.relative_to(SOURCES[package].parent).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), file


def imports(name: str, file: Path) -> Iterator[tuple[int, str]]:
    """Line and name of everything that is imported, inside functions too; imports for type checkers alone are
    left out."""
    tree = ast.parse(file.read_text())
    typed = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for part in block.body
        for node in ast.walk(part)
    }
    for node in ast.walk(tree):
        if id(node) in typed:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{name}:{node.lineno}: imports are absolute here"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def place_of(module: str, places: dict[str, Place]) -> tuple[str, Place] | None:
    """The longest drawn name that a module is, or is below."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (drawn := ".".join(parts[:length])) in places:
            return drawn, places[drawn]
    return None


def test_every_module_is_in_the_drawing():
    places = drawing()
    missing = {
        ".".join(name.split(".")[:2])
        for package in SOURCES
        for name, _ in modules(package)
        if name.count(".") >= 1 and len((place_of(name, places) or ("",))[0].split(".")) < 2
    }
    assert not missing, f"docs/house.md does not draw {sorted(missing)}"
    known = {name for package in SOURCES for name, _ in modules(package)}
    gone = sorted(set(places) - known)
    assert not gone, f"docs/house.md draws {gone}, which are not there"


@pytest.mark.parametrize("package", sorted(SOURCES))
def test_imports_go_down_in_the_drawing(package):
    places = drawing()
    wrong = []
    for name, file in modules(package):
        own = place_of(name, places)
        assert own, f"docs/house.md does not draw {name}"
        for line, imported in imports(name, file):
            other = place_of(imported, places)
            # A package's own `__init__` is its face and may show all of it.
            if other is None or other[0] == own[0] or other[1].line == FACE or name == package:
                continue
            above, below = own[1], other[1]
            if (above.package, above.line) < (below.package, below.line) or (
                above[:2] == below[:2] and above.group == below.group
            ):
                continue
            wrong.append(f"{file.relative_to(ROOT)}:{line}: {own[0]} imports {imported}")
    assert not wrong, "docs/house.md says that these imports cannot be:\n" + "\n".join(wrong)


def families() -> set[str]:
    project = tomllib.loads((ROOT / "packages/vlp-core/pyproject.toml").read_text())["project"]
    methods = tomllib.loads((ROOT / "packages/vlp-methods/pyproject.toml").read_text())["project"]
    return set(project["entry-points"]["vlp.models"]) | set(methods["entry-points"]["vlp.methods"])


# Names that people look for: formats are called after their publisher, and the drawn world holds each layout
# in a folder of that name.
PUBLISHED = re.compile(r"xvlm_images|xvlm_regions")
LAYOUTS = "vlp_data.shapes.layouts"


def test_family_names_stand_in_their_folders_only():
    """In code and messages; a docstring or comment may name where something comes from."""
    names = re.compile("|".join(rf"(?<![a-z]){name}(?![a-z])" for name in sorted(families())), re.I)
    found = []
    for package in SOURCES:
        for name, file in modules(package):
            if families() & set(name.split(".")) or name == LAYOUTS:
                continue
            source = file.read_text()
            docs = {
                (node.value.lineno, node.value.col_offset)
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            }
            for token in tokenize.generate_tokens(io.StringIO(source).readline):
                if token.type not in (tokenize.NAME, tokenize.STRING) or token.start in docs:
                    continue
                if names.search(PUBLISHED.sub("", token.string).replace("-", "")):
                    found.append(f"{file.relative_to(ROOT)}:{token.start[0]}: {token.string[:80]}")
    assert not found, "names of families outside their folders:\n" + "\n".join(found)
