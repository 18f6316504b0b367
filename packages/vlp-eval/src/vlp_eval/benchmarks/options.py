"""What the options of all benchmarks share, and checks of options. Imports no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """How a benchmark is taken."""

    limit: int | None = None
    """First so many rows only (images, in retrieval), for a quick look; null takes all."""
    image_batch: int = 32
    """Rows taken together."""
    figures: int = 4
    """Samples (of each direction, in retrieval) in the figure; 0 draws none."""

    def __post_init__(self) -> None:
        at_least(self, 1, "image_batch")
        at_least(self, 1, "limit", null=True)
        at_least(self, 0, "figures")


@dataclass(frozen=True, kw_only=True)
class TextBenchmarkOptions(BenchmarkOptions):
    """How a benchmark is taken whose texts the model reads as it was trained, unless something else is
    said."""

    clean: Literal["caption", "question", "none"] | None = None
    """Clean texts as the ALBEF family does captions or questions (lower case, no punctuation, first
    max_words words), or take them as they are; null: as the model was trained."""
    max_words: int | None = None
    """Words kept by the clean-up; null: as the model was trained."""
    max_tokens: int | Literal["all"] | None = None
    """Tokens kept of a text; all keeps all, null: as the model was trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_words", null=True)
        if isinstance(self.max_tokens, int):
            at_least(self, 1, "max_tokens")
        if self.clean == "none" and self.max_words is not None:
            raise ValueError(
                f"max_words={self.max_words} has no effect with clean=none; leave one of them out"
            )


def at_least(options: object, least: int, *names: str, null: bool = False) -> None:
    """Raise ValueError for a field below `least`; `null` permits None too."""
    for name in names:
        value = getattr(options, name)
        if not (value is None and null) and value < least:
            must = "must not be negative" if least == 0 else f"must be at least {least}"
            raise ValueError(f"{name}={value} {must}{', or null' if null else ''}")


def without_effect(options: object, names: tuple[str, ...], because: str) -> None:
    """Raise ValueError for a field that is given (not None) and cannot take effect."""
    for name in names:
        value = getattr(options, name)
        if value is not None:
            raise ValueError(f"{name}={value} has no effect with {because}; leave it out")
