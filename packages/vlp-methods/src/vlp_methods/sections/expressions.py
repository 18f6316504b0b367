"""Data sections of referring expressions without boxes. Imports no torch."""

from dataclasses import dataclass

from vlp_data.options import ExpressionBoxSource, ExpressionSource

from vlp_methods.sections.data import MeasuredData


@dataclass(frozen=True, kw_only=True)
class ExpressionStream:
    """Images with referring expressions, without boxes."""

    source: ExpressionSource
    """Where they come from."""
    batch: int = 160
    """Expressions per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class ExpressionData(MeasuredData):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: ExpressionStream
    """Images with expressions."""
    val: ExpressionBoxSource | None = None
    """Expressions with boxes and detections, located at the times of `evaluate`; null: never."""
    test: ExpressionBoxSource | None = None
    """Expressions with boxes and detections, located once, by the selected model; null: none."""
