"""One in-memory form for a sample of every format.

Rules: bytes stay encoded until the worker needs pixels; boxes are xyxy in pixels of the stored image; texts
are as the source has them (never lower-cased), but for halves of characters (lone surrogates), which no
tokenizer takes and which are left out; ids are kept as given (number or string).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from vlp_data.errors import shown

if TYPE_CHECKING:
    import numpy as np

Role: TypeAlias = Literal[
    "caption",
    "long_caption",
    "question",
    "hypothesis",
    "sentence",
    "expression",
    "region",
    "concept",
    "class_name",
]
Identifier: TypeAlias = int | str


def whole(text: str) -> str:
    """A text without lone surrogates (halves of characters outside of Unicode's first plane, such as emoji,
    that stay when a text is cut): JSON can spell them, UTF-8 cannot."""
    if text.isascii():
        return text
    return text.encode("utf-8", "ignore").decode()


def _written(value: Any) -> Any:
    """An id that every file can hold: lone surrogates spelled out, so that ids stay apart. What is no text is
    given back."""
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-8", "backslashreplace").decode()
    return value


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image: exactly one of encoded bytes, a path (fsspec URL), or an array (uint8, HWC or CHW)."""

    data: bytes | None = None
    path: str | None = None
    array: "np.ndarray | None" = None
    size: tuple[int, int] | None = None
    """(width, height) where the source states it: the size that boxes belong to (`vlp_data.boxes`)."""
    id: Identifier | None = None
    schemes: tuple[str, ...] = ()
    """Schemes of URLs that `path` may have besides those of this machine; `vlp_data.paths.image_at` fills
    it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", _written(self.id))


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text and what it is for."""

    text: str
    role: Role
    id: Identifier | None = None
    image: int = 0
    """Which of the sample's images it belongs to."""
    listed: bool = False
    """The source gives a list of alternatives here (perhaps of one item), so that one is drawn. X-VLM draws a
    random number only then."""
    cut: bool = field(default=False, init=False)
    """Lone surrogates were left out of the text."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", _written(self.id))
        if (text := whole(self.text)) != self.text:
            object.__setattr__(self, "text", text)
            object.__setattr__(self, "cut", True)


@dataclass(frozen=True, kw_only=True)
class Region:
    """A box with what is said about it."""

    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels of the stored image."""
    texts: tuple[int, ...] = ()
    """Positions in `Sample.texts`; alternatives."""
    attributes: str | tuple[str, ...] = ""
    """Words put before the text; a tuple holds alternatives, "" means none."""
    category: int | None = None
    mask: Any = None
    """COCO segmentation as given: polygons or RLE."""
    crowd: bool = False
    area: float | None = None
    id: Identifier | None = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """What has to be predicted; only the fields of the task are set."""

    label: int | None = None
    answers: tuple[tuple[str, float], ...] = ()
    """Distinct answers with weights."""
    raw_answers: tuple[str, ...] = ()
    soft_labels: tuple[tuple[int, float], ...] = ()
    box: int | None = None
    """Position in `Sample.regions`."""
    caption_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of a source."""

    key: str
    """Unique in the source. Readable, because error messages print it (`vlp_data.errors.shown`)."""
    images: tuple[Image, ...]
    texts: tuple[Text, ...] = ()
    regions: tuple[Region, ...] = ()
    target: Target | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", shown(self.key))
        object.__setattr__(self, "meta", {name: _written(value) for name, value in self.meta.items()})


class Source(Protocol):
    """Random access to samples. Length and description never read pixels. Picklable: files
    are opened in the process that reads them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def describe(self) -> dict[str, Any]:
        """Counts and origin, for logs and `vlp-data inspect`."""
        ...
