"""Data sections of tasks on images with captions, and on regions with texts. Imports no torch."""

from dataclasses import dataclass, field

from vlp_data.options import ImageTextSource, RegionOptions, RegionSource

from vlp_methods.sections.data import Data, MeasuredData


@dataclass(frozen=True, kw_only=True)
class ImageStream:
    """Images with captions; one update of every step."""

    source: ImageTextSource
    """Where they come from."""
    batch: int = 1024
    """Images per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class RegionStream:
    """Regions and objects with their texts."""

    source: RegionSource
    """Where they come from."""
    texts: int = 1024
    """(region, text) pairs per update, over all ranks; always exactly this many."""
    images: int = 384
    """Images that these pairs are drawn from, over all ranks."""
    options: RegionOptions = field(default_factory=RegionOptions)
    """How regions are drawn from an image."""


@dataclass(frozen=True, kw_only=True)
class CaptionedData(Data):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: ImageStream
    """Images with captions."""


@dataclass(frozen=True, kw_only=True)
class RetrievalData(MeasuredData):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: ImageStream
    """Images with captions."""
    val: ImageTextSource | None = None
    """Retrieval among these is measured at the times of `evaluate`; null: never."""
    test: ImageTextSource | None = None
    """Retrieval among these is measured once, with the selected model; null: not at all."""
