"""A dataset format of another package in a recipe."""

import os
import subprocess
import sys
from pathlib import Path

PACKAGE = '''
from dataclasses import dataclass
from typing import Literal

from vlp_data.roots import PathText
from vlp_data.sources import Format


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Tab-separated pairs."""

    format: Literal["pairs"] = "pairs"
    table: PathText
    """The file."""

    def open(self):
        raise NotImplementedError


PAIRS = Format(name="pairs", options="pairs_package:Pairs", holds=("captions",))
'''

PROGRAM = '''
import sys
from dataclasses import dataclass

from vlp_core.recipe import RecipeError, build, describe, dump
from vlp_data.options import ExpressionSource, ImageTextSource


@dataclass(frozen=True, kw_only=True)
class Recipe:
    source: ImageTextSource
    """Images with captions."""
    expressions: ExpressionSource | None = None
    """Expressions."""


given = {"source": {"format": "pairs", "table": "${env:TABLE}"}}
recipe = build(Recipe, given)
print(recipe.source)
print(dump(recipe))
print([(line.key, line.kind, line.doc) for line in describe(recipe, given)][:2])
for overrides in (["source.format=pars"], ["source.tabel=a"], ["expressions={format: pairs, table: a}"]):
    try:
        build(Recipe, given, overrides)
    except RecipeError as error:
        print(*error.problems)
assert not {"torch", "numpy", "fsspec"} & set(sys.modules)
'''


def test_a_recipe_takes_a_format_of_another_package(tmp_path: Path) -> None:
    info = tmp_path / "pairs_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pairs-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vlp.formats]\npairs = pairs_package:PAIRS\n")
    (tmp_path / "pairs_package.py").write_text(PACKAGE)
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env={**os.environ, "TABLE": "/data/pairs.tsv"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "Pairs(format='pairs', table='/data/pairs.tsv')",
        "{'source': {'format': 'pairs', 'table': '/data/pairs.tsv'}, 'expressions': None}",
        "[('source.format', 'pairs', ''), ('source.table', 'path', 'The file.')]",
        (
            "source.format: expected one of xvlm_images, task_json, coco_captions, karpathy, pairs, got "
            "'pars'; "
            "did you mean pairs?"
        ),
        "source.tabel: unknown key; did you mean source.table?",
        "expressions.format: expected one of task_json, refer, got 'pairs'",
    ]
