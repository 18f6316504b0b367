"""What a recipe says of its model: encoders, and where they start from. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from vlp_core.recipe import PathText


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
    drop_path: float = 0.0
    """Stochastic depth of the last block; rises linearly from 0."""


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
    drop_path: float = 0.0
    """Stochastic depth of the last block; rises linearly from 0."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights; a narrow model learns faster with 0.02 * sqrt(768 / width) or
    more."""
    position_range: float | None = None
    """Standard deviation of the position table at first; null: as `initializer_range`. Patches start with
    about 0.9, beside which smaller positions are hardly seen: a model from scratch that has minutes never
    learns where things are."""


@dataclass(frozen=True, kw_only=True)
class Timm:
    """Any image classification backbone of timm (needs the extra vlp-methods[timm]). Regions, hierarchy,
    masked images and concepts among the patches need an architecture that permits them: a plain ViT does."""

    kind: Literal["timm"] = "timm"
    name: str
    """Name in timm, such as vit_base_patch16_224 or convnext_tiny."""
    image_size: int = 224
    """Side of the square input in pixels."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, for architectures that have it."""
    local_depth: int = 4
    """Last blocks of a plain ViT in which a region sees its own patches only."""
    arguments: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further arguments of the architecture in timm."""


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

    vision: Swin | ClipVit | Vit | Timm = field(default_factory=Swin)
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
    """Image encoder: Microsoft's or timm's Swin, the vision tower of a Hugging Face CLIP, DeiT, or timm's own
    file for `kind: timm`."""
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
