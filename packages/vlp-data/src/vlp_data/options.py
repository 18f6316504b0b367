"""Options of sources, tokenizers, views and examples, as they appear in recipes. Imports neither torch,
NumPy nor fsspec.

The options of a source stand beside its reader in `vlp_data.sources`; here are their names for recipes.
`ImageTextSource` and the other unions hold the formats of other packages too, and are made when they are
first imported.
"""

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from vlp_data import sources
from vlp_data.checks import fraction, from_mapping, positive
from vlp_data.cleaning import Clean
from vlp_data.roots import FolderText, PathText

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
    from vlp_data.sources.coco import CocoCaptions, CocoInstances
    from vlp_data.sources.karpathy import Karpathy
    from vlp_data.sources.lines import ImageTextLines, RegionLines
    from vlp_data.sources.refer import Refer
    from vlp_data.sources.task_json import TaskJson
    from vlp_data.sources.visual_genome import VisualGenome
    from vlp_data.tokenizer import Tokenizer
    from vlp_data.views import CentreCrop, Detection, ImageNetCrop, LargeScaleJitter, Squash, View
else:
    # Imported when asked for: a command that names one format does not wait for the dataclasses of all.
    _HOMES = {
        "vlp_data.sources.coco": ("CocoCaptions", "CocoInstances"),
        "vlp_data.sources.karpathy": ("Karpathy",),
        "vlp_data.sources.lines": ("ImageTextLines", "RegionLines"),
        "vlp_data.sources.refer": ("Refer",),
        "vlp_data.sources.task_json": ("TaskJson",),
        "vlp_data.sources.visual_genome": ("VisualGenome",),
        "vlp_data.sources": tuple(sources.UNIONS),
        "vlp_data.views": (
            "CentreCrop",
            "Detection",
            "ImageNetCrop",
            "LargeScaleJitter",
            "Squash",
            "View",
        ),
    }

    def __getattr__(name):
        for module, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(module), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CentreCrop",
    "CocoCaptions",
    "CocoInstances",
    "ConceptOptions",
    "Detection",
    "ExpressionBoxSource",
    "ExpressionSource",
    "FolderText",
    "HypothesisSource",
    "ImageNetCrop",
    "ImageTextLines",
    "ImageTextSource",
    "IndependentMasking",
    "Karpathy",
    "LargeScaleJitter",
    "Masking",
    "MaskingOptions",
    "PathText",
    "QuestionSource",
    "Refer",
    "RegionLines",
    "RegionOptions",
    "RegionSource",
    "SentenceSource",
    "SpecialTokens",
    "Squash",
    "TaskJson",
    "TextOptions",
    "TokenizerFiles",
    "View",
    "VisualGenome",
]


# -------------------------------------------------------------------------------- tokenizers, views, examples


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Names of the special tokens of a tokenizer; "" where it has none."""

    start: str
    """Starts a text: [CLS], <s>, <|startoftext|>."""
    end: str = ""
    """Ends a text: [SEP], </s>, <|endoftext|>."""
    pad: str = ""
    """Fills texts up to one length; kind clip pads with 0."""
    mask: str = ""
    """Stands for a word to be predicted."""
    unknown: str = ""
    """Stands for what the vocabulary lacks."""


_FILES = {
    "wordpiece": ("vocab.txt",),
    "roberta": ("vocab.json and merges.txt",),
    "clip": ("bpe_simple_vocab_16e6.txt.gz", "vocab.json and merges.txt"),
    "words": ("a word map (JSON)",),
    "file": ("tokenizer.json",),
}
"""Per kind the files it takes, one way or another."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """A tokenizer by its files."""

    kind: Literal["wordpiece", "roberta", "clip", "words", "file", "bert"] = "wordpiece"
    """WordPiece (BERT), byte-level BPE (RoBERTa), CLIP's BPE, a map of whole words, or any tokenizer.json.
    "bert" is the old name of wordpiece."""
    files: tuple[PathText, ...]
    """wordpiece: vocab.txt. roberta: vocab.json, merges.txt. clip: bpe_simple_vocab_16e6.txt.gz, or
    vocab.json and merges.txt. words: the word map. file: tokenizer.json."""
    special: SpecialTokens | None = None
    """Kind file: its special tokens, start and pad among them. Kind clip: the words that stand for start and
    end in a text (null: those of open_clip, or of vocab.json). The other kinds have fixed ones."""
    mend: bool = True
    """Kind clip: mend damaged characters by the library ftfy before anything else, as CLIP does. Other kinds
    take texts as they are."""

    def __post_init__(self) -> None:
        if self.kind == "bert":
            object.__setattr__(self, "kind", "wordpiece")
        ways = _FILES[self.kind]
        if len(self.files) not in [way.count(" and ") + 1 for way in ways]:
            raise ValueError(
                f"a {self.kind} tokenizer takes {' or '.join(ways)}, got {len(self.files)} files"
            )
        if self.kind not in ("file", "clip") and self.special is not None:
            raise ValueError(f"special tokens of kind={self.kind} are fixed; leave `special` out")
        if self.kind == "file" and (self.special is None or not self.special.start or not self.special.pad):
            raise ValueError(
                "kind=file needs the names of its special tokens, such as special={start: <s>, pad: <pad>}"
            )
        if self.kind == "clip" and self.special is not None:
            given = self.special
            if not given.end or given.pad or given.mask or given.unknown:
                raise ValueError("kind=clip has two special tokens: give special.start and special.end alone")
        if not self.mend and self.kind != "clip":
            raise ValueError(f"mend=false: only kind=clip mends texts, not {self.kind}")

    def open(self) -> "Tokenizer":
        """The tokenizer. Raises DataError for files that are missing or hold something else."""
        from vlp_data.tokenizer import Special, Tokenizer

        match self.kind:
            case "roberta":
                return Tokenizer.roberta(*self.files)
            case "clip":
                words = None if self.special is None else (self.special.start, self.special.end)
                return Tokenizer.clip(*self.files, special=words, mend=self.mend)
            case "words":
                return Tokenizer.words(*self.files)
            case "file":
                return Tokenizer.file(*self.files, special=Special(**asdict(self.special)))  # type: ignore[arg-type]  # given, see above
            case _:
                return Tokenizer.wordpiece(*self.files)

    def config(self) -> dict[str, Any]:
        """What an export stores: the kind, the names of the files in the export folder, and what differs from
        the defaults; `from_config` reads it."""
        names = [PurePosixPath(file).name for file in self.files]
        special = {} if self.special is None else {"special": asdict(self.special)}
        return {"kind": self.kind, "files": names, **special, **({} if self.mend else {"mend": False})}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From `config()`, with `files` where they are now. Raises ValueError for an unknown key or value."""
        return from_mapping(cls, config, ("kind", "files", "special", "mend"), "tokenizer")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """From caption to ids (X-VLM specification 4.2)."""

    clean: Clean | None = None
    """Clean-up: that of captions or of questions of the ALBEF family, or "none" for texts as they are (VLC,
    CLIP). null: questions as questions, all other texts as captions."""
    max_words: int = 40
    """Words kept by the clean-up; "none" keeps all."""
    max_tokens: int = 40
    """Ids kept, special tokens included; the rows of the position table where nothing should be cut."""
    separator: bool = False
    """End with [SEP]: captioning; otherwise neither X-VLM nor ALBEF and ViCHA do."""
    tokenized: bool = False
    """Captions are word pieces separated by blanks already: no clean-up, no tokenizer."""
    pad: Literal["max", "longest"] = "max"
    """Pad to `max_tokens`, or to the longest text of the batch (same losses, less work, varying shapes)."""

    def __post_init__(self) -> None:
        positive(self, "max_words", "max_tokens")
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
        positive(self, "max_masks")
        fraction(self, "probability", "skipgram_probability")


@dataclass(frozen=True, kw_only=True)
class IndependentMasking:
    """Masked language modelling of BERT, ALBEF and ViCHA: every token by itself (ViCHA specification 3.4)."""

    kind: Literal["independent"] = "independent"
    probability: float = 0.15
    """Chance of a token to be predicted; a text may be left without one."""

    def __post_init__(self) -> None:
        fraction(self, "probability")


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
    """`Squash.careful_flip` for a line with all its texts; the reference publishes "off" and has
    "substring" as its option."""
    outside_boxes: Literal["skip", "clip"] = "skip"
    """A box that leaves the image: skip the line when it is drawn as anchor of the crop (the reference), or,
    without a crop, leave the box out; or clip boxes first. Boxes that are left out are counted and named."""

    def __post_init__(self) -> None:
        positive(self, "max_regions")
        fraction(self, "min_visible")
