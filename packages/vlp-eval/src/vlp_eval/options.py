"""Options of the benchmarks, as `vlp-eval BENCHMARK CHECKPOINT key=value` takes them. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from vlp_core.recipe import PathText
from vlp_data.options import CocoCaptions, ConceptOptions, ImageTextLines, Karpathy, Refer, TaskJson


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What all benchmarks have."""

    limit: int | None = None
    """First so many images (rows of other tasks) only, for a quick look; null takes all."""
    tokenizer: tuple[PathText, ...] = ()
    """vocab.txt, or vocab.json and merges.txt; empty takes the checkpoint's (official checkpoints hold
    none)."""
    image_batch: int = 32
    """Images, or rows of a task, taken together."""
    workers: int = 0
    """Processes that decode images; 0 decodes in the main process."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    concepts: ConceptOptions | None = None
    """How the words attached to an image (kwords) are read, for a model with a concept encoder:
    concepts.max_tokens, concepts.separator, concepts.pad. null takes the checkpoint's, padded to max_tokens
    in retrieval and grounding, as the reference evaluates."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the model; scores are compared in fp32."""
    figures: int = 4
    """Samples (of each direction, in retrieval) in the image; 0 draws none."""
    out: PathText = "eval"
    """Folder for BENCHMARK.json, the file of predictions and BENCHMARK.png; files there are replaced."""

    def __post_init__(self) -> None:
        at_least(self, 1, "image_batch")
        at_least(self, 1, "limit", null=True)
        at_least(self, 0, "workers", "figures")
        if len(self.tokenizer) > 2:
            raise ValueError("tokenizer takes vocab.txt, or vocab.json and merges.txt")


def at_least(options: object, least: int, *names: str, null: bool = False) -> None:
    """Raise ValueError for a field below `least`."""
    for name in names:
        value = getattr(options, name)
        if not (value is None and null) and value < least:
            must = "must not be negative" if least == 0 else f"must be at least {least}"
            raise ValueError(f"{name}={value} {must}{', or null' if null else ''}")


@dataclass(frozen=True, kw_only=True)
class Retrieval(Evaluation):
    """Image-text retrieval in both directions."""

    data: ImageTextLines | TaskJson | CocoCaptions | Karpathy
    """Images with their captions; rows of one image are taken together."""
    clean: Literal["caption", "none"] = "caption"
    """Clean texts as the ALBEF family does (lower case, no punctuation, first max_words words), or take them
    as they are."""
    max_words: int | None = None
    """Words kept by the clean-up; null takes the checkpoint's, or 30 where it says nothing."""
    max_tokens: int | None = None
    """Longest text in tokens; null takes the checkpoint's, or 40 where it says nothing."""
    first_captions: int | None = None
    """Captions of each image that count, in order of the file; null takes all."""
    repeated_captions: bool = True
    """Keep equal captions of one image; false keeps the first, as ViLT and VLC evaluate."""
    rerank: int = 0
    """Candidates of each query that the fusion encoder scores; 0 ranks by similarity alone. X-VLM: 256 for
    COCO, 128 for Flickr30k."""
    ties: Literal["pessimistic", "index"] = "pessimistic"
    """Equal scores: wrong candidates count as better, or the order of the file decides."""
    fold_size: int | None = None
    """Also report the mean over folds of so many images; "COCO 1k" is 1000."""
    text_batch: int = 256
    """Texts encoded together."""
    pair_batch: int = 256
    """Pairs the fusion encoder scores together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "text_batch", "pair_batch")
        at_least(self, 1, "max_words", "max_tokens", "first_captions", "fold_size", null=True)
        at_least(self, 0, "rerank")
        if self.clean == "none" and self.max_words is not None:
            raise ValueError(
                f"max_words={self.max_words} has no effect with clean=none; leave one of them out"
            )


@dataclass(frozen=True, kw_only=True)
class Vqa(Evaluation):
    """Visual question answering."""

    data: TaskJson
    """Questions about images, with answers of people where there are any."""
    answers: PathText = ""
    """answer_list.json, the answers to choose from; "" lets the model write answers."""
    k: int = 128
    """Answers that are scored to the end, of those whose first word is most probable; at most as many as
    there are."""
    annotations: PathText = ""
    """Annotations of VQA v2 (v2_mscoco_val2014_annotations.json), for accuracies per answer type; "" takes
    the answers of the data."""
    rule: Literal["official", "albef"] = "official"
    """How answers are compared: as the challenge does, or as the copy in ALBEF, X-VLM and ViCHA (for their
    logs)."""
    max_words: int = 50
    """Words kept of a question."""
    max_tokens: int | None = None
    """Tokens kept of a question; null keeps all."""
    beams: int = 3
    """Of the search where answers are written."""
    answer_tokens: int = 10
    """Longest written answer in tokens, the start token included."""
    pairs: int = 1024
    """Answers scored at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "k", "max_words", "beams", "pairs")
        at_least(self, 2, "answer_tokens")
        at_least(self, 1, "max_tokens", null=True)


@dataclass(frozen=True, kw_only=True)
class _Statements(Evaluation):
    """Statements about images."""

    max_words: int | None = None
    """Words kept of a statement; null takes the checkpoint's, or 30 where it says nothing."""
    max_tokens: int | None = None
    """Tokens kept of a statement; null keeps all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_words", "max_tokens", null=True)


@dataclass(frozen=True, kw_only=True)
class Nlvr(_Statements):
    """NLVR2: is a sentence about two images true?"""

    data: TaskJson
    """Sentences with two images and a label."""


@dataclass(frozen=True, kw_only=True)
class Entailment(_Statements):
    """SNLI-VE: does a hypothesis follow from an image?"""

    data: TaskJson
    """Hypotheses with an image and a label."""


@dataclass(frozen=True, kw_only=True)
class Grounding(Evaluation):
    """Referring expressions."""

    data: Refer
    """Expressions with the box they mean, and detections to choose from (by=heat)."""
    by: Literal["boxes", "heat"] = "boxes"
    """The model tells the box, or the heat of its attention chooses among the detections (weakly
    supervised)."""
    mode: Literal["itm", "itc"] = "itm"
    """by=heat: of the match logit by cross-attention (itm), or of the similarity of image and text by a ViT's
    attention (itc)."""
    layer: int | None = None
    """by=heat: layer whose attention is read, counted over all layers of the text encoder (itm: X-VLM 9,
    ALBEF and ViCHA 8) or of the ViT (itc)."""
    alpha: float = 0.5
    """by=heat: a detection's heat is divided by its area to this power."""
    max_words: int | None = None
    """Words kept of an expression; null takes the checkpoint's, or 30 where it says nothing."""
    max_tokens: int | None = None
    """Tokens kept of an expression; null keeps all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_words", "max_tokens", null=True)
        if self.by == "boxes" and self.layer is not None:
            raise ValueError(f"layer={self.layer} has no effect with by=boxes; leave it out, or give by=heat")
        if self.by == "boxes" and self.mode != "itm":
            raise ValueError(f"mode={self.mode} has no effect with by=boxes; leave it out, or give by=heat")
        if self.by == "heat" and self.layer is None:
            raise ValueError(
                "by=heat needs layer=N, the layer whose attention is read (X-VLM takes 9 of its 12, ALBEF and ViCHA 8)"
            )
        if self.by == "heat" and not self.data.detections and self.data.refs:
            raise ValueError("by=heat needs data.detections=dets.json, the boxes to choose from")


@dataclass(frozen=True, kw_only=True)
class Captioning(Evaluation):
    """Image captioning."""

    data: TaskJson | CocoCaptions | Karpathy | ImageTextLines
    """Images; their captions are the references unless `references` names others."""
    references: PathText = ""
    """Captions of people in COCO's format (coco_karpathy_test_gt.json); "" takes those of the data."""
    prompt: str | None = None
    """What a caption begins with; null takes the checkpoint's, or "a picture of " where it says nothing."""
    beams: int = 3
    """Of the search."""
    max_tokens: int = 20
    """Longest caption in tokens, the prompt's included."""
    min_tokens: int = 5
    """Shortest caption in tokens, the same way."""
    length_penalty: float = 1.0
    """Exponent of the length by which sums of log-probabilities are divided."""
    java: tuple[Literal["meteor", "spice"], ...] = ()
    """Metrics besides, which need Java and the extra vlp-eval[caption-java]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "beams", "min_tokens", "max_tokens")
