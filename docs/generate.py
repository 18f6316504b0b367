"""Write docs/api/*.md from the sources, without importing them: public names with signature and docstring,
the table of recipes, and that of the options which every recipe has.

Docstrings are shown as they are written: shape legends and formulas lose their layout in a text markup.
"""

import ast
from pathlib import Path

import yaml


def write_all(root: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    pages = []
    for source in sorted(root.glob("packages/*/src/vlp_*")):
        if source.is_dir() and (source / "__init__.py").is_file():
            pages.append(source.name)
            write(folder / f"{source.name}.md", api_page(source))
    write(folder / "recipes.md", recipe_page(root))
    write(folder / "options.md", option_page(root))
    toctree = "\n".join(["```{toctree}", ":maxdepth: 2", "", *pages, "recipes", "options", "```", ""])
    write(folder / "index.md", f"# Reference\n\nWritten from the sources at build time.\n\n{toctree}")


def write(path: Path, text: str) -> None:
    """Leave an unchanged page alone, so that Sphinx does not build it again."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def api_page(source: Path) -> str:
    parts = [f"# {source.name}\n"]
    for file in sorted(source.rglob("*.py")):
        inside = file.relative_to(source.parent).with_suffix("")
        names = [name for name in inside.parts if name != "__init__"]
        if any(name.startswith("_") for name in names):
            continue
        tree = ast.parse(file.read_text())
        entries = [entry(node) for node in tree.body if is_public(node, exported(tree))]
        about = ast.get_docstring(tree)
        if entries or about:
            parts += [f"## {'.'.join(names)}\n", *([block("text", about)] if about else []), *entries]
    return "\n".join(parts)


def exported(tree: ast.Module) -> set[str] | None:
    """The names of `__all__`, or None where the module has none and every name without underscore is
    public."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
        ):
            return set(ast.literal_eval(node.value))
    return None


def is_public(node: ast.stmt, names: set[str] | None) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        return False
    return node.name in names if names is not None else not node.name.startswith("_")


def entry(node: ast.FunctionDef | ast.ClassDef) -> str:
    shown = [signature(node)]
    methods = (
        [child for child in node.body if isinstance(child, ast.FunctionDef)]
        if isinstance(node, ast.ClassDef)
        else []
    )
    about = ast.get_docstring(node)
    parts = [f"### {node.name}\n"]
    public = [method for method in methods if method.name == "__init__" or not method.name.startswith("_")]
    shown += [indented(signature(method)) for method in public]
    parts.append(block("python", "\n".join(shown)))
    if about:
        parts.append(block("text", about))
    return "\n".join(parts)


def signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    """The lines of a definition up to its body; a dataclass or named tuple shows its fields."""
    lines = [f"@{ast.unparse(decorator)}" for decorator in node.decorator_list]
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return "\n".join([*lines, f"def {node.name}({ast.unparse(node.args)}){returns}"])
    bases = ", ".join(
        ast.unparse(base) for base in [*node.bases, *(keyword.value for keyword in node.keywords)]
    )
    fields = [indented(ast.unparse(child)) for child in node.body if isinstance(child, ast.AnnAssign)]
    return "\n".join([*lines, f"class {node.name}({bases})" if bases else f"class {node.name}", *fields])


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def block(language: str, text: str) -> str:
    return f"````{language}\n{text}\n````\n"


OPTIONS = "packages/vlp-methods/src/vlp_methods/engine/options.py"


def option_page(root: Path) -> str:
    """Every key that the engine reads, from the schema: `Training` and the sections in it."""
    tree = ast.parse((root / OPTIONS).read_text())
    schemas = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    parts = ["# Options of every recipe\n", "A method adds sections of its own: `vlp-train show RECIPE`.\n"]
    done: set[tuple[str, str]] = set()

    def add(name: str, place: str) -> None:
        """The table of one schema at its place in a recipe, then those of the sections in it."""
        if (name, place) in done:
            return
        done.add((name, place))
        about = (ast.get_docstring(schemas[name]) or "").replace("\n", " ")
        title = f"## {place}" if place else "## The recipe itself"
        rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
        inside: list[tuple[str, str]] = []
        body = schemas[name].body
        for field, following in zip(body, [*body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or "ClassVar" in ast.unparse(field.annotation):
                continue
            key = f"{place}.{ast.unparse(field.target)}" if place else ast.unparse(field.target)
            used = [n.id for n in ast.walk(field.annotation) if isinstance(n, ast.Name) and n.id in schemas]
            many = "tuple" in ast.unparse(field.annotation) or "dict" in ast.unparse(field.annotation)
            # Lengths are explained once, at the first key that takes one.
            inside += [(each, key + ("[]" if many else "")) for each in used if each != "Length"]
            meaning = ast.literal_eval(following.value) if is_text(following) else ""
            default = "required" if field.value is None else default_text(field.value)
            cells = (f"`{key}`", f"`{ast.unparse(field.annotation)}`", default, " ".join(meaning.split()))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join([title, "", about, "", *rows, ""]))
        for each, key in inside:
            add(each, key)

    add("Training", "")
    add("Length", "a length, such as steps")
    return "\n".join(parts)


def is_text(node: ast.stmt | None) -> bool:
    """Whether a statement is the text below a field."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def default_text(value: ast.expr) -> str:
    """A default as a reader sees it: a section with defaults of its own is "see below"."""
    text = ast.unparse(value)
    if "default_factory=" in text:
        return "none" if "default_factory=dict" in text else "see below"
    return f"`{text}`".replace("None", "null").replace("True", "true").replace("False", "false")


def recipe_page(root: Path) -> str:
    rows = ["# Recipes", "", "| recipe | task | about |", "| --- | --- | --- |"]
    for file in sorted(root.glob("packages/vlp-methods/src/vlp_methods/*/recipes/*.yaml")):
        content = yaml.safe_load(file.read_text())
        rows.append(f"| `{content['method']}/{file.stem}` | {content['task']} | {content['about']} |")
    return "\n".join([*rows, ""])
