"""Sections of recipes that several methods have. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from vlp_core.recipe import PathText
from vlp_data.options import (
    ConceptOptions,
    ImageOptions,
    ImageTextSource,
    RegionOptions,
    RegionSource,
    TaskJson,
    TextOptions,
)

# ------------------------------------------------------------------------------------------------------------
# models


@dataclass(frozen=True, kw_only=True)
class Swin:
    """Swin Transformer (X-VLM specification 2.2)."""

    kind: Literal["swin"] = "swin"
    image_size: int = 224
    """Side of the square input in pixels."""
    window: int = 7
    """Side of an attention window in tokens."""
    width: int = 128
    """Width of the first stage; it doubles with every stage."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks of each stage."""
    heads: tuple[int, ...] = (4, 8, 16, 32)
    """Attention heads of each stage."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward part over the width of the stage."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; rises linearly from 0."""


@dataclass(frozen=True, kw_only=True)
class ClipVit:
    """Vision tower of CLIP (X-VLM specification 2.3)."""

    kind: Literal["clip"] = "clip"
    image_size: int = 224
    """Side of the square input in pixels."""
    patch: int = 16
    """Side of a patch in pixels."""
    width: int = 768
    """Width of the states."""
    depth: int = 12
    """Blocks."""
    heads: int = 12
    """Attention heads."""
    hidden: int = 3072
    """Width inside the feed-forward part."""
    local_depth: int = 4
    """Last blocks in which a region sees its own patches only."""


@dataclass(frozen=True, kw_only=True)
class Vit:
    """DeiT (X-VLM specification 2.4)."""

    kind: Literal["vit"] = "vit"
    image_size: int = 224
    """Side of the square input in pixels."""
    patch: int = 16
    """Side of a patch in pixels."""
    width: int = 768
    """Width of the states."""
    depth: int = 12
    """Blocks."""
    heads: int = 12
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward part over the width."""
    local_depth: int = 4
    """Last blocks in which a region sees its own patches only."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights; a narrow model learns faster with 0.02 * sqrt(768 / width) or
    more."""
    position_range: float | None = None
    """That of the position table; null: as `initializer_range`. Patches start with about 0.9, beside which
    smaller positions are hardly
    seen: a model from scratch that has minutes never learns where things are."""


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """BERT or RoBERTa; the upper layers attend to the image (X-VLM specification 2.5). The vocabulary is that
    of `data.tokenizer`."""

    kind: Literal["bert", "roberta"] = "bert"
    """Which of the two; the tokenizer must be of the same kind."""
    width: int = 768
    """Width of the states."""
    layers: int = 12
    """Layers, fusion layers included."""
    fusion_layer: int = 6
    """First layer that attends to the image."""
    heads: int = 12
    """Attention heads."""
    hidden: int = 3072
    """Width inside the feed-forward part."""
    positions: int = 512
    """Rows of the position table (RoBERTa: 514)."""
    token_types: int = 2
    """Rows of the token type table (RoBERTa: 1)."""
    dropout: float = 0.1
    """Dropout on embeddings and outputs of layers."""
    attention_dropout: float = 0.1
    """Dropout on attention probabilities."""
    norm_eps: float = 1e-12
    """Epsilon of the layer norms (RoBERTa: 1e-5)."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights; a narrow model learns faster with 0.02 * sqrt(768 / width)."""


@dataclass(frozen=True, kw_only=True)
class Concepts:
    """Words of an image as tokens beside its patches (ViCHA specification 2.3); `data.concepts` says how they
    are read."""

    layers: int = 2
    """Layers of their BERT, which is otherwise like the text encoder's first layers; 0 has the embedding
    alone."""
    place: Literal["first", "last"] = "first"
    """Among the patches in all blocks, which only a ViT has room for, or behind the image encoder's
    output."""
    visible_padding: bool = True
    """Whether padded places of the lists are attended to, as in the official checkpoints."""

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ValueError(f"layers={self.layers} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """Image encoder, and text encoder with fusion layers, as they are in pre-training; a task's model is
    derived from them."""

    vision: Swin | ClipVit | Vit = field(default_factory=Swin)
    """Image encoder."""
    text: TextEncoder = field(default_factory=TextEncoder)
    """Text and fusion encoder."""
    concepts: Concepts | None = None
    """Visual concepts beside the image; null: none."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Checkpoints to start from; an empty one leaves that part at its initial values. Position tables are
    resized where needed."""

    vision: PathText = ""
    """Image encoder: Microsoft's or timm's Swin, the vision tower of a Hugging Face CLIP, or DeiT."""
    text: PathText = ""
    """Masked language model: Hugging Face BERT or RoBERTa. Cross-attention starts fresh."""
    model: PathText = ""
    """A whole model of the same kind: an official pre-training checkpoint, or an export folder of a run."""

    def __post_init__(self) -> None:
        if self.model and (self.vision or self.text):
            raise ValueError("model holds both encoders; leave out vision and text, or model")


@dataclass(frozen=True, kw_only=True)
class Start:
    """The checkpoint of an earlier stage that a task starts from. Position tables are resized where
    needed."""

    model: PathText
    """An official checkpoint, or the export folder of a run; "" leaves everything at its initial values."""


@dataclass(frozen=True, kw_only=True)
class TaskModel(Encoders):
    """The pre-training model's encoders, and where to start from."""

    weights: Start
    """Where to start from."""


@dataclass(frozen=True, kw_only=True)
class ContrastModel(TaskModel):
    """As `TaskModel`, for tasks that keep the space shared by images and texts."""

    embed_width: int = 256
    """Width of the shared space, that of pre-training."""


# -------------------------------------------------------------------------------------------------------------- data


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
class TokenizerFiles:
    """Vocabulary."""

    kind: Literal["bert", "roberta"] = "bert"
    """WordPiece, or byte-level BPE."""
    files: tuple[PathText, ...]
    """bert: vocab.txt. roberta: vocab.json, merges.txt. Relative to `data.root`."""

    def __post_init__(self) -> None:
        wanted = {"bert": 1, "roberta": 2}[self.kind]
        if len(self.files) != wanted:
            names = {"bert": "vocab.txt", "roberta": "vocab.json and merges.txt"}[self.kind]
            raise ValueError(f"a {self.kind} tokenizer takes {names}, got {len(self.files)} files")


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
class Data:
    """Data. Relative paths of sources, tokenizer and other files start at `root`."""

    world: ShapesWorld | None = None
    """Draw the shapes world into `root` if it is not there yet; null for data of your own."""
    root: PathText = ""
    """Folder or fsspec URL; "" with a world: a folder of the user's cache (XDG_CACHE_HOME)."""
    tokenizer: TokenizerFiles
    """Vocabulary."""
    view: ImageOptions = field(default_factory=ImageOptions)
    """Crop, flip, augmentation."""
    text: TextOptions = field(default_factory=TextOptions)
    """From text to ids."""
    concepts: ConceptOptions | None = None
    """How the concepts of the images are read, for a model with `model.concepts`; null: not at all."""
    max_bad_fraction: float = 0.01
    """Stop when a larger share of the samples cannot be used."""


# --------------------------------------------------------------------------------------------------------
# evaluation


@dataclass(frozen=True, kw_only=True)
class RetrievalTest:
    """How retrieval is measured."""

    rerank: int = 128
    """Candidates of each query that the fusion encoder scores; 0 ranks by similarity alone."""
    image_batch: int = 64
    """Images encoded together."""
    pair_batch: int = 256
    """Pairs the fusion encoder scores together."""
    figures: int = 4
    """Queries of each direction in the image retrieval.png; 0 draws none."""


@dataclass(frozen=True, kw_only=True)
class RowTest:
    """How a benchmark of rows is taken."""

    image_batch: int = 32
    """Rows taken together."""
    figures: int = 4
    """Rows in the image of the benchmark; 0 draws none."""


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """Questions to be answered."""

    source: TaskJson
    """Where they come from."""
    annotations: PathText = ""
    """What people answered, an annotations file of VQA v2; "" where the questions' rows say so, or nobody
    does."""


@dataclass(frozen=True, kw_only=True)
class RankedAnswers(RowTest):
    """Questions are answered by the most probable of given candidates."""

    mode: Literal["rank"] = "rank"
    candidates: int = 128
    """Candidates of each question, by their first word, that are scored in full; never more than there
    are."""
    max_words: int = 50
    """Words kept of a question."""
    pair_batch: int = 1024
    """Candidates scored together."""


@dataclass(frozen=True, kw_only=True)
class WrittenAnswers(RowTest):
    """Questions are answered by beam search."""

    mode: Literal["generate"] = "generate"
    beams: int = 3
    """Open answers per question."""
    max_tokens: int = 10
    """Longest answer, [CLS] included."""
    max_words: int = 50
    """Words kept of a question."""


@dataclass(frozen=True, kw_only=True)
class LabelTest(RowTest):
    """How sentences are judged."""


@dataclass(frozen=True, kw_only=True)
class HeatTest(RowTest):
    """How heat maps choose among detections."""

    mode: Literal["itm", "itc"] = "itm"
    """Heat of the match logit, by attention of the text to the image, or of the similarity of both, by
    attention in a ViT."""
    layer: int = 9
    """Layer, counted from 0, whose attention is looked at (`block_num`): of the text encoder, or with itc of
    the ViT."""


@dataclass(frozen=True, kw_only=True)
class BoxTest(RowTest):
    """How predicted boxes are measured."""


@dataclass(frozen=True, kw_only=True)
class CaptionTest(RowTest):
    """How captions are written and measured."""

    beams: int = 3
    """Open captions per image."""
    max_tokens: int = 20
    """Longest caption, prompt included."""
    min_tokens: int = 5
    """Shortest caption, prompt included."""
    length_penalty: float = 1.0
    """Exponent of the length that sums of log-probabilities are divided by."""
