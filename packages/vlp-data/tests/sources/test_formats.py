"""The table of formats, and formats of other packages."""

import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from vlp_data import options, sources
from vlp_data.sources import FORMATS, UNIONS, Format, formats, source_type

PACKAGE = '''
"""Tab-separated pairs: the name of an image file and a caption per line."""

from dataclasses import dataclass
from typing import Literal

from vlp_data.roots import FolderText, PathText
from vlp_data.schema import Image, Sample, Text
from vlp_data.sources import Format


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Tab-separated pairs."""

    format: Literal["pairs"] = "pairs"
    table: PathText
    """The file."""
    folder: FolderText
    """Folder of the images."""
    more: tuple[PathText, ...] = ()
    """Further files."""
    first: int | None = None
    """Rows to keep; null keeps all."""

    def open(self):
        return PairsSource(self)


class PairsSource:
    def __init__(self, options):
        from vlp_data import files

        self.options = options
        text = b"".join(files.read(path) for path in (options.table, *options.more)).decode()
        self.rows = [line.split("\\t") for line in text.splitlines()][: options.first]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        from vlp_data import files

        name, caption = self.rows[index]
        image = Image(path=files.join(self.options.folder, name))
        return Sample(key=name, images=(image,), texts=(Text(text=caption, role="caption"),))

    def describe(self):
        return {"format": "pairs", "rows": len(self)}


def is_pairs(beginning):
    return beginning.value is None and beginning.line.count(b"\\t") == 1


PAIRS = Format(
    name="pairs",
    options="pairs_package:Pairs",
    holds=("captions",),
    detect="pairs_package:is_pairs",
)
'''

PROGRAM = """
import sys
from typing import get_args

from vlp_data.options import ImageTextSource, RegionSource
from vlp_data.roots import rooted

pairs = next(kind for kind in get_args(ImageTextSource) if kind.__name__ == "Pairs")
assert pairs not in get_args(RegionSource)
options = pairs(table="pairs.tsv", folder="", more=("b.tsv, c.tsv",), first=2)
assert not {"torch", "numpy", "fsspec"} & set(sys.modules)
options = rooted(options, sys.argv[1])
print(options)
source = options.open()
print([(sample.images[0].path, sample.texts[0].text) for sample in (source[0], source[1])])
"""


def other_package(
    folder: Path, text: str = PACKAGE, entry: str = "pairs = pairs_package:PAIRS"
) -> dict[str, str]:
    """Install a package with a format into a folder; returns the environment to run programs with."""
    info = folder / "pairs_package-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pairs-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[vlp.formats]\n{entry}\n")
    (folder / "pairs_package.py").write_text(text)
    return {**os.environ, "PYTHONPATH": str(folder)}


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)


def inspect(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return run(
        environment, "-c", "import sys; from vlp_data.cli import main; sys.exit(main())", "inspect", *words
    )


def test_a_format_of_another_package_is_read_like_any_other(tmp_path: Path) -> None:
    environment = other_package(tmp_path / "installed")
    table = tmp_path / "pairs.tsv"
    table.write_text("a.jpg\ta dog\nb.jpg\ta cat\nc.jpg\ta cow\n")
    for name in ("b.tsv", "c.tsv"):
        (tmp_path / name).write_text("")
    done = run(environment, "-c", PROGRAM, str(tmp_path))
    assert done.returncode == 0, done.stderr
    options, rows = done.stdout.splitlines()
    assert f"table='{tmp_path}/pairs.tsv', folder='{tmp_path}', more=('{tmp_path}/b.tsv', " in options
    assert eval(rows) == [(f"{tmp_path}/a.jpg", "a dog"), (f"{tmp_path}/b.jpg", "a cat")]

    for words in ((), ("--format", "pairs")):
        done = inspect(environment, str(table), "--no-images", "--option", "first=2", *words)
        assert done.returncode == 0, done.stderr
        assert "format: pairs\nrows: 2\nrows looked at: 2, usable: 2\ntexts: 2 caption" in done.stdout
    done = inspect(environment, str(table), "--root", str(tmp_path))
    assert f"missing file: 3 ({tmp_path}/a.jpg, " in done.stdout
    done = inspect(environment, str(table), "--format", "pair")
    assert done.returncode == 2
    assert "format 'pair' is not known; known: xvlm_images" in done.stderr


@pytest.mark.parametrize(
    ("text", "entry", "message"),
    [
        (PACKAGE, "pears = pairs_package:PAIRS", "must be a Format of the name 'pears'"),
        (PACKAGE, "pairs = pairs_package:PEARS", "pairs_package:PEARS cannot be loaded"),
        (PACKAGE, "pairs = pears_package:PAIRS", "No module named 'pears_package'"),
        (PACKAGE, "pairs = pairs_package:Pairs", "must be a Format of the name 'pairs'"),
        (
            PACKAGE.replace('name="pairs"', 'name="refer"'),
            "refer = pairs_package:PAIRS",
            "another format of this name",
        ),
        (
            PACKAGE.replace(':Pairs"', ':PairsSource"'),
            "pairs = pairs_package:PAIRS",
            "must be a dataclass with a field",
        ),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, text: str, entry: str, message: str) -> None:
    environment = other_package(tmp_path, text, entry)
    done = run(environment, "-c", "from vlp_data.options import ImageTextSource")
    assert done.returncode == 1
    last = done.stderr.strip().rsplit("\n", 1)[-1]
    assert message in last
    assert "pairs" in last


def test_types_follow_from_what_formats_hold() -> None:
    assert options.ImageTextSource == (
        options.ImageTextLines | options.TaskJson | options.CocoCaptions | options.Karpathy
    )
    assert options.RegionSource == options.RegionLines | options.CocoInstances | options.VisualGenome
    assert options.ExpressionSource == options.TaskJson | options.Refer
    assert sources.ExpressionBoxSource is options.Refer
    assert sources.QuestionSource is sources.SentenceSource is sources.HypothesisSource is options.TaskJson
    assert set(UNIONS.values()) == {word for row in FORMATS for word in row.holds}
    with pytest.raises(ValueError, match="no format holds 'smells'; known: captions, expression_boxes"):
        source_type("smells")
    for module in (options, sources):
        with pytest.raises(AttributeError, match="no attribute 'SmellSource'"):
            _ = module.SmellSource


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_every_row_is_a_format(row: Format) -> None:
    kind = row.load()
    assert formats()[row.name] is row
    assert typing.get_type_hints(kind)["format"] == typing.Literal[row.name]
    assert kind in typing.get_args(source_type(row.holds[0])) or kind is source_type(row.holds[0])
    code = (
        f"import sys, {row.options.partition(':')[0]}\n"
        "print({'torch', 'numpy', 'fsspec', 'PIL', 'pickle', 'importlib.metadata'} & sys.modules.keys())"
    )
    done = run(dict(os.environ), "-c", code)
    assert done.stdout.strip() == "set()", done.stderr
