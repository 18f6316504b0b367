"""Dataset formats: a table with one row each.

A format is one module: a frozen dataclass with the options (a field `format: Literal["NAME"]`, and `open()`,
which returns a `vlp_data.schema.Source`) and the reader behind it. Importing such a module loads neither
torch, numpy nor fsspec, because recipes are checked before anything heavy is loaded.

A package of somebody else adds a format by an entry point of the group `vlp.formats`, whose name is the
format's and whose value is `module:ROW`, with ROW a `Format`. It is then known to every recipe, benchmark and
command that reads what the format holds.

What a field of a recipe may be follows from the table: `ImageTextSource` is the union of all formats that
hold captions. These unions are made when they are first asked for, once.
"""

import functools
import importlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from vlp_data.errors import DataError

if TYPE_CHECKING:
    from vlp_data.schema import Source

GROUP = "vlp.formats"
"""Entry points of this group are formats of other packages."""


class SourceOptions(Protocol):
    """Options of a source, of whatever format."""

    @property
    def format(self) -> str:
        """Name of the format."""
        ...

    def open(self) -> "Source":
        """The rows. Raises FileNotFoundError; DataError for files that are not of the format."""
        ...


class Beginning(NamedTuple):
    """What the format of a file is told by."""

    path: str
    line: bytes
    """The first line."""
    value: Any
    """The JSON value of the first line, or of the whole file where no line is one; None if it is not JSON."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A row of the table."""

    name: str
    """As in `format: NAME`."""
    options: str
    """`module:Class` of the options."""
    holds: tuple[str, ...]
    """What rows of this format have, in the words of `UNIONS`; a package may add words of its own."""
    detect: str = ""
    """`module:function` from a `Beginning` to whether the file is of this format; "" if nothing tells."""

    def load(self) -> type[Any]:
        """The class of the options. Raises DataError when it is not what the row says."""
        options = _attribute(self.options, f"format {self.name}")
        if not is_dataclass(options) or getattr(options, "format", None) != self.name:
            raise DataError(
                f"format {self.name}: {self.options} must be a dataclass with a field "
                f'`format: Literal["{self.name}"] = "{self.name}"`'
            )
        return options

    def recognises(self, beginning: Beginning) -> bool:
        """Whether a file that begins like this is of this format."""
        return bool(self.detect and _attribute(self.detect, f"format {self.name}")(beginning))


FORMATS: tuple[Format, ...] = (
    Format(
        name="xvlm_images",
        options="vlp_data.sources.lines:ImageTextLines",
        holds=("captions",),
        detect="vlp_data.sources.lines:is_image_text",
    ),
    Format(
        name="xvlm_regions",
        options="vlp_data.sources.lines:RegionLines",
        holds=("regions",),
        detect="vlp_data.sources.lines:is_regions",
    ),
    Format(
        name="task_json",
        options="vlp_data.sources.task_json:TaskJson",
        holds=("captions", "questions", "sentences", "hypotheses", "expressions"),
        detect="vlp_data.sources.task_json:is_task_list",
    ),
    Format(
        name="refer",
        options="vlp_data.sources.refer:Refer",
        holds=("expressions", "expression_boxes"),
    ),
    Format(
        name="coco_captions",
        options="vlp_data.sources.coco:CocoCaptions",
        holds=("captions",),
        detect="vlp_data.sources.coco:is_captions",
    ),
    Format(
        name="coco_instances",
        options="vlp_data.sources.coco:CocoInstances",
        holds=("regions",),
        detect="vlp_data.sources.coco:is_instances",
    ),
    Format(
        name="karpathy",
        options="vlp_data.sources.karpathy:Karpathy",
        holds=("captions",),
        detect="vlp_data.sources.karpathy:is_karpathy",
    ),
    Format(
        name="visual_genome",
        options="vlp_data.sources.visual_genome:VisualGenome",
        holds=("regions",),
    ),
)
"""The formats of this package; `formats()` has those of other packages too."""

UNIONS = {
    "ImageTextSource": "captions",
    "RegionSource": "regions",
    "QuestionSource": "questions",
    "SentenceSource": "sentences",
    "HypothesisSource": "hypotheses",
    "ExpressionSource": "expressions",
    "ExpressionBoxSource": "expression_boxes",
}
"""Types of this module, by what the rows of their formats have.

- captions: images with captions
- regions: images with boxes and their texts
- questions: questions about an image (VQA)
- sentences: sentences about two images, with a label (NLVR2)
- hypotheses: sentences about one image, with a label (SNLI-VE)
- expressions: referring expressions
- expression_boxes: referring expressions with the box that each of them means
"""

if TYPE_CHECKING:
    # The formats of other packages are not known to a type checker: to it, a source has a format and opens.
    ImageTextSource: TypeAlias = SourceOptions
    RegionSource: TypeAlias = SourceOptions
    QuestionSource: TypeAlias = SourceOptions
    SentenceSource: TypeAlias = SourceOptions
    HypothesisSource: TypeAlias = SourceOptions
    ExpressionSource: TypeAlias = SourceOptions
    ExpressionBoxSource: TypeAlias = SourceOptions
else:

    def __getattr__(name):
        if name in UNIONS:
            return source_type(UNIONS[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def formats() -> Mapping[str, Format]:
    """All formats by name: those of `FORMATS`, then those of other packages, sorted by name.

    Raises DataError for an entry point that names no `Format`, or one of another name, and for a name that is
    taken.
    """
    import importlib.metadata

    found = {row.name: row for row in FORMATS}
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name):
        what = f"entry point {GROUP} {point.name!r} of {point.dist.name if point.dist else 'a package'}"
        row = _attribute(point.value, what)
        if not isinstance(row, Format) or row.name != point.name:
            raise DataError(f"{what}: {point.value} must be a Format of the name {point.name!r}, is {row!r}")
        if row.name in found:
            raise DataError(f"{what}: there is another format of this name, {found[row.name].options}")
        found[row.name] = row
    return found


@functools.cache
def source_type(holds: str) -> Any:
    """The type of a recipe's field for any format whose rows have `holds`: a union of option classes.

    Raises DataError when there is no such format.
    """
    classes = [row.load() for row in formats().values() if holds in row.holds]
    if not classes:
        known = sorted({word for row in formats().values() for word in row.holds})
        raise DataError(f"no format holds {holds!r}; known: {', '.join(known)}")
    return functools.reduce(operator.or_, classes)


def _attribute(place: str, what: str) -> Any:
    """The object at `module:name`. Raises DataError, naming what asked for it."""
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DataError(f"{what}: {place} cannot be loaded: {error}") from error
