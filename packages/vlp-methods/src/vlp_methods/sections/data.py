"""What a recipe says of its data: where it is, and how it is read. The streams of tasks stand beside this.
Imports no torch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vlp_core.recipe import PathText
from vlp_data.options import ConceptOptions, Squash, TextOptions, TokenizerFiles, View

if TYPE_CHECKING:
    from vlp_data.schema import Source


class SourceOptions(Protocol):
    """Options of a data format."""

    def open(self) -> "Source":
        """The rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class ShapesWorld:
    """Images drawn from a seed (`vlp_data.shapes`), made on first use."""

    images: int = 2000
    """Scenes of all splits together."""
    seed: int = 0
    """The world."""
    size: int = 96
    """Side of the images in pixels."""
    val: int | None = None
    """Scenes kept for validation; null: a tenth."""
    test: int | None = None
    """Scenes kept for test; null: a tenth."""
    difficulty: Literal["full", "easy"] = "full"
    """Easy scenes have few things, each in a field of its own, of fewer kinds and colours: for models that
    have minutes to learn."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Data. Relative paths of sources, tokenizer and other files start at `root`."""

    world: ShapesWorld | None = None
    """Draw the shapes world into `root` if it is not there yet; null for data of your own."""
    root: PathText = ""
    """Folder or fsspec URL; "" with a world: a folder of the user's cache (XDG_CACHE_HOME)."""
    tokenizer: TokenizerFiles | None = None
    """Vocabulary; null: for a method without texts."""
    view: View = field(default_factory=Squash)
    """What the model sees of an image."""
    text: TextOptions = field(default_factory=TextOptions)
    """From text to ids."""
    concepts: ConceptOptions | None = None
    """How the concepts of the images are read, for a model with `model.concepts`; null: not at all."""
    max_bad_fraction: float = 0.01
    """Stop when a larger share of the samples cannot be used."""


@dataclass(frozen=True, kw_only=True)
class TestedData(Data):
    """Data with some to be measured on."""

    test: Any | None = None
    """Data to be measured on; null: there is none."""

    def rows(self, split: str) -> SourceOptions | None:
        """The rows that a split is measured on, None where there are none."""
        found: SourceOptions | None = getattr(self, split)
        return found

    def files(self, split: str) -> Any | None:
        """What belongs to these rows beside them, as the benchmark's class of files; None: nothing."""


@dataclass(frozen=True, kw_only=True)
class MeasuredData(TestedData):
    """Data of a fine-tuning: what it is trained on, and what it is measured on."""

    val: Any | None = None
    """Measured at the times of `evaluate`; null: never."""
    test: Any | None = None
    """Measured once, with the selected model; null: not at all."""
