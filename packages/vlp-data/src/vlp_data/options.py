"""Options of sources, views and examples, as they appear in recipes. Imports neither torch nor fsspec.

The options of a source stand beside its reader in `vlp_data.sources`; here are their names for recipes.
`ImageTextSource` and the other unions hold the formats of other packages too, and are made when they are
first imported.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from vlp_data import sources
from vlp_data.roots import FolderText, PathText
from vlp_data.sources.coco import CocoCaptions, CocoInstances
from vlp_data.sources.karpathy import Karpathy
from vlp_data.sources.lines import ImageTextLines, RegionLines
from vlp_data.sources.refer import Refer
from vlp_data.sources.task_json import TaskJson
from vlp_data.sources.visual_genome import VisualGenome

if TYPE_CHECKING:
    from vlp_data.sources import (
        ExpressionBoxSource,
        ExpressionSource,
        HypothesisSource,
        ImageTextSource,
        QuestionSource,
        RegionSource,
        SentenceSource,
    )
else:

    def __getattr__(name):
        if name in sources.UNIONS:
            return getattr(sources, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CocoCaptions",
    "CocoInstances",
    "ConceptOptions",
    "ExpressionBoxSource",
    "ExpressionSource",
    "FolderText",
    "HypothesisSource",
    "ImageOptions",
    "ImageTextLines",
    "ImageTextSource",
    "IndependentMasking",
    "Karpathy",
    "Masking",
    "MaskingOptions",
    "PathText",
    "QuestionSource",
    "Refer",
    "RegionLines",
    "RegionOptions",
    "RegionSource",
    "SentenceSource",
    "TaskJson",
    "TextOptions",
    "VisualGenome",
]


def _positive(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value <= 0:
            raise ValueError(f"{name}={value} must be positive")


def _fraction(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must lie in 0..1")


# ---------------------------------------------------------------------------------------------- views and
# examples


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Decoding and the training view of whole images (X-VLM specification 4.1)."""

    size: int = 224
    """Side of the square input in pixels."""
    view: Literal["random_resized_crop", "resize"] = "random_resized_crop"
    """What the model sees of an image: a random crop, or all of it squashed to the square (weak
    grounding)."""
    min_scale: float = 0.2
    """Smallest share of the image's area in a random crop: 0.2 pre-training, 0.5 fine-tuning."""
    flip: float = 0.5
    """Probability of mirroring."""
    careful_flip: Literal["off", "substring", "word"] = "off"
    """Do not mirror when a text of the sample (caption, question, answer, expression) says left or right:
    never test, as a part of any word (the reference's test for VQA, true for "bright"), or as a word."""
    augment: bool = True
    """Two RandAugment operations after the crop."""
    truncated: bool = True
    """Accept JPEG files that end early (the missing part stays grey), as the reference systems do."""
    max_pixels: int = 128_000_000
    """Larger images count as broken."""

    def __post_init__(self) -> None:
        _positive(self, "size", "min_scale", "max_pixels")
        _fraction(self, "min_scale", "flip")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """From caption to ids (X-VLM specification 4.2)."""

    max_words: int = 40
    """Words kept by `pre_caption`."""
    max_tokens: int = 40
    """Ids kept, special tokens included; the rows of the position table where nothing should be cut."""
    separator: bool = False
    """End with [SEP]: captioning; otherwise neither X-VLM nor ALBEF and ViCHA do."""
    tokenized: bool = False
    """Captions are word pieces separated by blanks already: no clean-up, no tokenizer."""
    pad: Literal["max", "longest"] = "max"
    """Pad to `max_tokens`, or to the longest text of the batch (same losses, less work, varying shapes)."""

    def __post_init__(self) -> None:
        _positive(self, "max_words", "max_tokens")
        if self.max_tokens < 2 + self.separator:
            raise ValueError(
                f"max_tokens={self.max_tokens} leaves no room for a word beside the special tokens"
            )


@dataclass(frozen=True, kw_only=True)
class ConceptOptions:
    """From the concepts of an image to ids (ViCHA specification 2.3 and 4.2). Concepts are taken as they are,
    without clean-up."""

    max_tokens: int = 55
    """Ids kept, [CLS] included; there is no [SEP] at the end."""
    separator: bool = False
    """Put [SEP] between concepts (`sep_token`); otherwise a blank."""
    pad: Literal["longest", "max"] = "longest"
    """Pad to the longest of the batch, or to `max_tokens`. Padding has an effect: ViCHA's image encoder sees
    it."""
    share: float | None = None
    """Draw this share of the concepts with replacement at every visit, at least one (`randkw_p`; 0.3 of 15
    are 4 draws); null takes all in their order."""

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens={self.max_tokens} leaves no room for a concept after [CLS]")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must lie in (0, 1]; share=null takes all concepts")


@dataclass(frozen=True, kw_only=True)
class MaskingOptions:
    """Masked language modelling of X-VLM: a fixed number of tokens, whole words and spans (X-VLM
    specification 4.2)."""

    kind: Literal["spans"] = "spans"
    probability: float = 0.25
    """Share of the tokens to predict."""
    max_masks: int = 8
    """At most this many per text; width of the masked fields of a batch."""
    skipgram_probability: float = 0.2
    """Chance that a drawn position starts a span."""
    skipgram_size: int = 3
    """Longest span in tokens; below 2 there are no spans."""
    whole_words: bool = True
    """Extend what is masked to whole words."""

    def __post_init__(self) -> None:
        _positive(self, "max_masks")
        _fraction(self, "probability", "skipgram_probability")


@dataclass(frozen=True, kw_only=True)
class IndependentMasking:
    """Masked language modelling of BERT, ALBEF and ViCHA: every token by itself (ViCHA specification 3.4)."""

    kind: Literal["independent"] = "independent"
    probability: float = 0.15
    """Chance of a token to be predicted; a text may be left without one."""

    def __post_init__(self) -> None:
        _fraction(self, "probability")


Masking: TypeAlias = MaskingOptions | IndependentMasking
"""What is masked; in a recipe told apart by `kind` where both are allowed."""


@dataclass(frozen=True, kw_only=True)
class RegionOptions:
    """How pairs are drawn from an image with boxes (X-VLM specification 5.3)."""

    crop: Literal["around_box", "none"] = "around_box"
    """What the model sees of an image: a random crop that holds a drawn box (the reference), or all of it, so
    that a caption stays true of what is seen. With "none" no box and no corner is drawn."""
    max_regions: int = 5
    """Pairs of one image at most, the whole image included."""
    min_visible: float = 0.5
    """A box is used if more than this share of it lies in the crop."""
    careful_flip: Literal["off", "substring", "word"] = "off"
    """`ImageOptions.careful_flip` for a line with all its texts; the reference publishes "off" and has
    "substring" as its option."""
    outside_boxes: Literal["skip", "clip"] = "skip"
    """A box that leaves the image: skip the line when it is drawn as anchor of the crop (the reference), or
    clip boxes first."""

    def __post_init__(self) -> None:
        _positive(self, "max_regions")
        _fraction(self, "min_visible")
