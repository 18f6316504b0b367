"""Rules of the project that no linter knows: pins, layers, recipes, links, and what must never be
committed."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
MARKDOWN = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def project_files() -> list[Path]:
    """Files that git tracks or would add: everything that can end up in a commit."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = (ROOT / name for name in listed.stdout.decode().split("\0") if name)
    return sorted(path for path in paths if path.is_file())


def project_texts() -> list[tuple[Path, str]]:
    texts = []
    for path in project_files():
        data = path.read_bytes()
        if b"\0" not in data:
            texts.append((path, data.decode("utf-8")))
    return texts


def toml(path: Path) -> dict:
    return tomllib.loads(path.read_text())


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, f"no name in requirement {requirement!r}"
    return match[0]


def test_constraints_are_plain_pins_and_equal_those_of_uv():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    bad = [line for line in lines if not re.fullmatch(r"[a-z0-9.-]+==[0-9][A-Za-z0-9.+!]*", line)]
    assert not bad, f"constraints.txt: only name==version lines, found {bad}"
    assert lines == toml(ROOT / "pyproject.toml")["tool"]["uv"]["constraint-dependencies"]
    assert lines == sorted(set(lines))


def test_every_declared_dependency_is_pinned():
    pinned = {name_of(line).lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    own = {package.name for package in PACKAGES}
    declared: dict[str, str] = {}
    for file in [ROOT / "pyproject.toml", *(package / "pyproject.toml" for package in PACKAGES)]:
        content = toml(file)
        groups = [content["project"].get("dependencies", [])]
        groups += content["project"].get("optional-dependencies", {}).values()
        groups += content.get("dependency-groups", {}).values()
        names = [name_of(line).lower() for group in groups for line in group if isinstance(line, str)]
        declared.update({name: f"{file.relative_to(ROOT)} needs {name}" for name in names})
    missing = [reason for name, reason in declared.items() if name not in pinned | own]
    assert not missing, f"{missing}; `nox -s pins` writes the pins"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_package_names_its_siblings_as_the_noxfile_does(package):
    noxfile = (ROOT / "noxfile.py").read_text()
    table = re.search(r"^PACKAGES = (\{.*?^\})", noxfile, re.M | re.S)
    assert table, "noxfile.py has no PACKAGES table"
    listed = eval(table[1], {"__builtins__": {}})
    assert set(listed) == {path.name for path in PACKAGES}

    def siblings(name: str) -> set[str]:
        needed = toml(ROOT / "packages" / name / "pyproject.toml")["project"]["dependencies"]
        direct = {name_of(line) for line in needed} & set(listed)
        return direct.union(*(siblings(each) for each in direct))

    assert set(listed[package.name]) == siblings(package.name)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_package_is_complete(package):
    module = package.name.replace("-", "_")
    for needed in (
        "README.md",
        "CHANGELOG.md",
        "changes",
        "tests",
        f"src/{module}/py.typed",
        f"src/{module}/__init__.py",
    ):
        assert (package / needed).exists(), f"{package.name} has no {needed}"
    assert re.search(
        r'^__version__ = "\d+\.\d+\.\d+"$', (package / f"src/{module}/__init__.py").read_text(), re.M
    )
    page = ROOT / "docs" / "packages" / f"{package.name}.md"
    assert page.is_file(), f"no page docs/packages/{package.name}.md"


def test_change_fragments_have_a_known_kind():
    kinds = ("added", "changed", "fixed", "removed", "deprecated")
    fragments = [path for path in ROOT.glob("packages/*/changes/*") if path.name != ".gitkeep"]
    bad = [
        str(path.relative_to(ROOT))
        for path in fragments
        if not re.fullmatch(rf"[\w-]+\.({'|'.join(kinds)})\.md", path.name)
    ]
    assert not bad, f"{bad}: name fragments <slug>.<kind>.md with kind one of {kinds}"


RECIPES = sorted(ROOT.glob("packages/vlp-methods/src/vlp_methods/*/recipes/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parents[1].name}/{path.stem}")
def test_recipe_says_what_it_is(recipe):
    content = yaml.safe_load(recipe.read_text())
    assert content["method"] == recipe.parents[1].name
    assert content["task"]
    assert content["about"]
    assert recipe.read_text().startswith("# "), (
        f"{recipe.name}: a recipe opens with what it reproduces and the command"
    )


def test_every_method_is_an_entry_point_with_recipes():
    entries = toml(ROOT / "packages/vlp-methods/pyproject.toml")["project"]["entry-points"]["vlp.methods"]
    assert set(entries) == {recipe.parents[1].name for recipe in RECIPES}
    assert all(module == f"vlp_methods.{name}" for name, module in entries.items())


def headings(text: str) -> set[str]:
    """Anchors of a Markdown page, made as Git hosts make them."""
    titles = re.findall(r"^#+ +(.+?) *$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page",
    [path for path in project_files() if path.suffix == ".md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_of_markdown_pages_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in MARKDOWN.findall(text):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        assert file.exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"
        assert not anchor or anchor in headings(file.read_text()), (
            f"{page.relative_to(ROOT)}: no heading for {target}"
        )


@pytest.mark.parametrize(
    "page",
    [path for path in project_files() if path.suffix == ".md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_paths_named_in_markdown_pages_exist(page):
    """`packages/...`, `docs/...` and the like in backquotes are promises too."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    named = re.findall(r"`((?:packages|docs|tests|benchmarks|golden|\.ci)/[\w./-]+)`", text)
    # A component in capitals stands for something the reader fills in.
    known = [name for name in named if not re.search(r"/[A-Z]+(/|$)", name)]
    missing = [name for name in known if not (ROOT / name).exists() and not (page.parent / name).exists()]
    assert not missing, f"{page.relative_to(ROOT)} names {missing}, which are not there"


def test_no_lock_file_is_kept():
    locks = {"uv.lock", "poetry.lock", "pdm.lock", "Pipfile.lock", "package-lock.json", "pylock.toml"}
    found = [str(path.relative_to(ROOT)) for path in project_files() if path.name in locks]
    assert not found, f"{found}: a lock file records registry addresses; pins stand in constraints.txt"


# In brackets so that this file does not find itself.
REGISTRY_HOSTS = r"p[y]pi\.org|p[y]thonhosted|registry\.n[p]mjs|index-[u]rl|f[i]nd-links *="
MACHINE_PATHS = r"""(?<![\w.~})*-])/(?:r[o]ot|w[o]rk|h[o]me|U[s]ers|o[p]t|f[a]rm)/[\w.]"""


@pytest.mark.parametrize(
    ("rule", "pattern"), [("registry host", REGISTRY_HOSTS), ("path of one machine", MACHINE_PATHS)]
)
def test_nothing_of_one_machine_is_in_the_tree(rule, pattern):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path, text in project_texts()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"{rule} in\n" + "\n".join(found)


def test_machine_path_rule_finds_what_it_should():
    assert re.search(MACHINE_PATHS, "cp " + "/wo" + "rk/x y")
    assert re.search(MACHINE_PATHS, '"/wo' + 'rk/main"')
    assert not re.search(MACHINE_PATHS, "https://host/work-in-progress")
    assert not re.search(MACHINE_PATHS, "data/work/x")


def test_golden_subset_is_small_and_described():
    files = [path for path in project_files() if path.is_relative_to(ROOT / "golden")]
    total = sum(path.stat().st_size for path in files)
    assert total <= 12_000_000, f"golden/ holds {total / 1e6:.1f} MB; 12 MB is the limit for all systems"
    assert (ROOT / "golden" / "README.md").is_file()


def test_no_large_or_pickled_file():
    large = [str(path.relative_to(ROOT)) for path in project_files() if path.stat().st_size > 1_500_000]
    assert not large, f"{large}: over 1.5 MB"
    pickled = [
        str(path.relative_to(ROOT))
        for path in project_files()
        if path.suffix in {".pt", ".pth", ".th", ".pkl", ".ckpt"}
    ]
    assert not pickled, f"{pickled}: files that load by pickle"


def test_json_files_parse():
    for path in project_files():
        if path.suffix == ".json":
            json.loads(path.read_text())
