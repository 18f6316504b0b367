"""Options of sources, views and examples, as they appear in recipes. Imports neither torch nor fsspec.

A source option has a `format` field that tells it apart from the others (a discriminated union in a recipe)
and `open()`.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

if TYPE_CHECKING:
    from vlp_data.schema import Source

PathText: TypeAlias = Annotated[str, "path"]
"""A local path or fsspec URL. Recipes replace `${env:NAME}` in fields marked like this."""


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


def _reading(options: "ImageTextLines | RegionLines") -> None:
    if options.buffer < 0:
        raise ValueError(f"buffer={options.buffer} must not be negative")
    if options.buffer and options.order != "files":
        raise ValueError(
            'buffer mixes lines that are read file after file; order="shuffled" mixes all of them already'
        )


# ---------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True, kw_only=True)
class ImageTextLines:
    """X-VLM image-text lines: text files with one JSON object per line, {caption, binary | image_rpath}."""

    format: Literal["xvlm_images"] = "xvlm_images"
    files: tuple[PathText, ...]
    """Files or folders (not recursive; names with `_SUCCESS` or a leading dot are left out), paths or fsspec
    URLs."""
    root: PathText = ""
    """Put before relative image paths."""
    image_key: str = ""
    """Field that holds the image; "" takes `binary` or `image_rpath`, whichever a line has."""
    image_kind: Literal["auto", "path", "base64"] = "auto"
    """What that field holds; auto: base64 for `binary`, else a path."""
    caption_keys: tuple[str, ...] = ("caption", "desc")
    """Fields that may hold the caption; the first one a line has is taken."""
    index: PathText = ""
    """Folder to keep line offsets in, so that large files are scanned once; "" scans at every start."""
    order: Literal["shuffled", "files"] = "shuffled"
    """Lines one by one in random order, or file after file: for remote storage, where one long read is
    cheaper than many short ones, and for compressed files, which cannot be read otherwise."""
    buffer: int = 0
    """With order "files": mix lines over about so many places, as a shuffle buffer of this size does; 0 keeps
    their order."""

    def __post_init__(self) -> None:
        _reading(self)

    def open(self) -> "Source":
        from vlp_data.sources.lines import open_image_text_lines

        return open_image_text_lines(self)


@dataclass(frozen=True, kw_only=True)
class RegionLines:
    """X-VLM region lines: {elems: [{caption, bb: [x, y, w, h], attributes?}], caption?, binary |
    image_rpath}."""

    format: Literal["xvlm_regions"] = "xvlm_regions"
    files: tuple[PathText, ...]
    """Files or folders (not recursive; names with `_SUCCESS` or a leading dot are left out), paths or fsspec
    URLs."""
    root: PathText = ""
    """Put before relative image paths."""
    image_key: str = ""
    """Field that holds the image; "" takes `binary` or `image_rpath`, whichever a line has."""
    image_kind: Literal["auto", "path", "base64"] = "auto"
    """What that field holds; auto: base64 for `binary`, else a path."""
    index: PathText = ""
    """Folder to keep line offsets in, so that large files are scanned once; "" scans at every start."""
    order: Literal["shuffled", "files"] = "shuffled"
    """Lines one by one in random order, or file after file: for remote storage, where one long read is
    cheaper than many short ones, and for compressed files, which cannot be read otherwise."""
    buffer: int = 0
    """With order "files": mix lines over about so many places, as a shuffle buffer of this size does; 0 keeps
    their order."""

    def __post_init__(self) -> None:
        _reading(self)

    def open(self) -> "Source":
        from vlp_data.sources.lines import open_region_lines

        return open_region_lines(self)


@dataclass(frozen=True, kw_only=True)
class TaskJson:
    """ALBEF-type lists in .json files; the fields of an entry tell what it is (caption, vqa, nlvr, ve,
    refcoco)."""

    format: Literal["task_json"] = "task_json"
    files: tuple[PathText, ...]
    """JSON files, each one list of objects; paths or fsspec URLs."""
    root: PathText = ""
    """Put before image paths."""
    dataset_roots: dict[str, PathText] = field(default_factory=dict)
    """Other roots by the entry's `dataset` field (VQA lists mix `vqa` and `vg`)."""
    prefixes: dict[str, str] = field(default_factory=dict)
    """{old: new} beginnings of image paths; where none fits, /data/USER/data/ of ViCHA's own lists gives way
    to the root."""
    group_captions: bool = False
    """One row per image with all its captions, where a list has one entry per caption (references for
    rewards)."""

    def open(self) -> "Source":
        from vlp_data.sources.task_json import open_task_json

        return open_task_json(self)


@dataclass(frozen=True, kw_only=True)
class Refer:
    """Referring expressions: a task list {image, text, ref_id} joined with the files of REFER, or VLUE's
    list, which holds the boxes itself."""

    format: Literal["refer"] = "refer"
    files: tuple[PathText, ...]
    """Task lists, paths or fsspec URLs."""
    refs: PathText = ""
    """`refs(unc).p`, or that list as .json (`vlp-data convert refer` writes it); "" where every entry has its
    box (VLUE)."""
    instances: PathText = ""
    """instances.json of REFER; needed with `refs`."""
    detections: PathText = ""
    """dets.json: boxes to choose from, by image id; "" for none."""
    root: PathText = ""
    """Put before image paths."""
    splits: tuple[str, ...] = ()
    """Keep expressions of these splits of REFER (train, val, testA, testB); () keeps all."""

    def __post_init__(self) -> None:
        if bool(self.refs) != bool(self.instances):
            raise ValueError(
                "refs and instances belong together: give both, or neither for lists that hold the boxes"
            )
        if self.splits and not self.refs:
            raise ValueError("splits needs refs: that is where the split of an expression stands")

    def open(self) -> "Source":
        from vlp_data.sources.refer import open_refer

        return open_refer(self)


@dataclass(frozen=True, kw_only=True)
class CocoCaptions:
    """COCO captions: one row per image that has captions."""

    format: Literal["coco_captions"] = "coco_captions"
    annotations: PathText
    """captions_*.json, path or fsspec URL."""
    images: PathText
    """Folder of the images."""

    def open(self) -> "Source":
        from vlp_data.sources.coco import open_captions

        return open_captions(self)


@dataclass(frozen=True, kw_only=True)
class CocoInstances:
    """COCO instances: one row per image with boxes; the category name is the text of a box."""

    format: Literal["coco_instances"] = "coco_instances"
    annotations: PathText
    """instances_*.json, path or fsspec URL."""
    images: PathText
    """Folder of the images."""
    captions: PathText = ""
    """captions_*.json whose captions become texts of the whole image; "" for none."""
    crowd: bool = False
    """Keep crowd annotations."""

    def open(self) -> "Source":
        from vlp_data.sources.coco import open_instances

        return open_instances(self)


@dataclass(frozen=True, kw_only=True)
class VisualGenome:
    """Visual Genome: one row per image with its objects (attributes before the name) or its regions."""

    format: Literal["visual_genome"] = "visual_genome"
    annotations: PathText
    """objects.json, attributes.json or region_descriptions.json; the entries tell which."""
    image_data: PathText
    """image_data.json: sizes, and the ids the images have in COCO and Flickr."""
    images: PathText = ""
    """Folder of the images."""
    image_name: str = "image/{id}.jpg"
    """File of an image below `images`: `{id}` its id, `{folder}` its folder in the release (VG_100K or
    VG_100K_2)."""

    def open(self) -> "Source":
        from vlp_data.sources.visual_genome import open_visual_genome

        return open_visual_genome(self)


@dataclass(frozen=True, kw_only=True)
class Karpathy:
    """Karpathy's dataset_*.json: one row per image of the split."""

    format: Literal["karpathy"] = "karpathy"
    annotations: PathText
    """dataset_coco.json or dataset_flickr30k.json, path or fsspec URL."""
    images: PathText
    """Folder that `filepath`/`filename` of an entry are relative to."""
    split: Literal["train", "restval", "val", "test"]
    """train includes restval unless `restval` is false."""
    restval: bool = True
    """Count restval as part of train, as every published COCO result does."""

    def open(self) -> "Source":
        from vlp_data.sources.coco import open_karpathy

        return open_karpathy(self)


ImageTextSource: TypeAlias = ImageTextLines | TaskJson | CocoCaptions | Karpathy
"""Sources of (image, captions) rows."""
RegionSource: TypeAlias = RegionLines | CocoInstances | VisualGenome
"""Sources of rows with boxes."""
ExpressionSource: TypeAlias = Refer | TaskJson
"""Sources of referring expressions; those of `TaskJson` have no boxes."""


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
