"""Views: what a model sees of a decoded image, in training and in evaluation.

A view is one of a union that `kind` tells apart. It holds the mean and the deviation that pixels are
normalised with, because a model is only as good as the view it was trained with. `view.config()` is what an
export stores of it, `from_config` reads that. Importing this module loads neither torch nor NumPy.

| kind | evaluation | training | source |
| --- | --- | --- | --- |
| `squash` | the whole image squashed to a square | random crop, flip, RandAugment | ALBEF, X-VLM, ViCHA |
| `centre_crop` | short side to the size, centre crop | random crop | CLIP, open_clip |
| `imagenet` | short side to size / crop_percent, centre crop | random crop, flip | timm, MAE |
| `detection` | short side to the size, longest side limited | one of several sizes, crop, flip | DETR |
| `jitter` | both sides limited, padded | scale 0.1..2, a square by crop or padding | Mask2Former |

Every draw of a training view comes from the generator that is passed in.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

from vlp_data.checks import fraction, from_mapping, positive
from vlp_data.cleaning import names_a_side

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from vlp_data.objects import Objects

Colour: TypeAlias = tuple[float, float, float]
"""One number per channel: red, green, blue."""
CLIP_MEAN: Colour = (0.48145466, 0.4578275, 0.40821073)
"""Of values in 0..1."""
CLIP_STD: Colour = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Colour = (0.485, 0.456, 0.406)
IMAGENET_STD: Colour = (0.229, 0.224, 0.225)

Interpolation: TypeAlias = Literal["bicubic", "bilinear"]


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """What all views have."""

    kind: str
    """Which view."""
    size: int
    """Side of the square input in pixels."""
    mean: Colour = IMAGENET_MEAN
    """Subtracted from red, green and blue in 0..1."""
    std: Colour = IMAGENET_STD
    """What they are divided by then."""
    flip: float = 0.5
    """Probability of mirroring in training."""
    careful_flip: Literal["off", "substring", "word"] = "off"
    """Do not mirror when a text of the sample (caption, question, answer, expression) says left or right:
    never test, as a part of any word (the reference's test for VQA, true for "bright"), or as a word."""
    truncated: bool = True
    """Accept JPEG files that end early (the missing part stays grey), as the reference systems do."""
    max_pixels: int = 128_000_000
    """Larger images count as broken."""

    EVALUATION: ClassVar[tuple[str, ...]] = ("size", "mean", "std")
    """Fields that evaluation goes by; an export stores these and `kind`."""
    ragged: ClassVar[bool] = False
    """Whether the images of a training batch may differ in size, so that the batch has a padding mask."""

    def __post_init__(self) -> None:
        positive(self, "size", "max_pixels")
        fraction(self, "flip")
        if min(self.std) <= 0:
            raise ValueError(f"std={list(self.std)} must be positive")

    def config(self) -> dict[str, Any]:
        """What evaluation needs to know, as JSON values; `from_config` reads it."""
        values = asdict(self)
        return {
            name: list(values[name]) if isinstance(values[name], tuple) else values[name]
            for name in ("kind", *self.EVALUATION)
        }

    def mirrors(self, rng: random.Random, texts: Sequence[str]) -> bool:
        """Whether to mirror an image that `texts` speak of. One draw, whatever it decides."""
        careful, whole_word = self.careful_flip != "off", self.careful_flip == "word"
        never = careful and any(names_a_side(text, whole_word=whole_word) for text in texts)
        return rng.random() < (0.0 if never else self.flip)

    def normalise(self, image: "Image | np.ndarray") -> "Tensor":
        """Pixels as float32 [3, H, W] with this view's mean and deviation."""
        from vlp_data import transforms

        return transforms.normalise(image, self.mean, self.std)


@dataclass(frozen=True, kw_only=True)
class Squash(ViewOptions):
    """The view of the ALBEF family: a random crop, or the whole image, squashed to a square with bicubic
    interpolation (X-VLM specification 4.1, dataset/__init__.py).

    `min_scale` 0.2 is the reference's view of pre-training, 0.5 that of fine-tuning.
    """

    kind: Literal["squash"] = "squash"
    size: int = 224
    """Side of the square input in pixels."""
    mean: Colour = CLIP_MEAN
    """Subtracted from red, green and blue in 0..1."""
    std: Colour = CLIP_STD
    """What they are divided by then."""
    crop: Literal["random", "none"] = "random"
    """What the model sees of an image in training: a random crop, or all of it (weak grounding)."""
    min_scale: float = 0.2
    """Smallest share of the image's area in a random crop: 0.2 pre-training, 0.5 fine-tuning."""
    augment: bool = True
    """Two RandAugment operations after the crop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "min_scale")
        fraction(self, "min_scale")

    def train(self, image: "Image", rng: random.Random, *, texts: Sequence[str] = ()) -> "Tensor":
        """A training view, float32 [3, size, size]. Draws: crop, flip, RandAugment. `careful_flip` minds
        `texts`."""
        from vlp_data import randaugment, transforms

        if self.crop == "random":
            image = image.crop(transforms.random_crop_box(*image.size, rng, min_scale=self.min_scale))
        image = transforms.resize(image, self.size)
        if self.mirrors(rng, texts):
            image = transforms.flip(image)
        return self.finish(image, rng, randaugment.IMAGE_OPERATIONS)

    def finish(self, image: "Image", rng: random.Random, operations: tuple[str, ...]) -> "Tensor":
        """RandAugment with two of `operations` where `augment` asks for it, then normalised pixels."""
        from vlp_data import transforms

        return self.normalise(transforms.augmented(image, operations, rng) if self.augment else image)

    def evaluate(self, image: "Image") -> "Tensor":
        """The whole image, float32 [3, size, size]."""
        from vlp_data import transforms

        return self.normalise(transforms.resize(image, self.size))


@dataclass(frozen=True, kw_only=True)
class Centred(ViewOptions):
    """What the views with a crop in the middle share; not a view by itself."""

    size: int = 224
    """Side of the square input in pixels."""
    crop: Literal["random", "centre"] = "random"
    """What the model sees of an image in training: a random crop, or what evaluation sees."""
    min_scale: float
    """Smallest share of the image's area in a random crop."""
    interpolation: Interpolation = "bicubic"
    """How pixels are resized."""

    EVALUATION: ClassVar[tuple[str, ...]] = ("size", "mean", "std", "interpolation")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "min_scale")
        fraction(self, "min_scale")

    @property
    def short(self) -> int:
        """Short side of the image before the centre is cut out."""
        return self.size

    def train(self, image: "Image", rng: random.Random, *, texts: Sequence[str] = ()) -> "Tensor":
        """A training view, float32 [3, size, size]. Draws: crop, flip. `careful_flip` minds `texts`."""
        from vlp_data import transforms

        if self.crop == "random":
            image = image.crop(transforms.random_crop_box(*image.size, rng, min_scale=self.min_scale))
            image = transforms.resize(image, self.size, self.interpolation)
        else:
            image = self._centre(image)
        if self.mirrors(rng, texts):
            image = transforms.flip(image)
        return self.normalise(image)

    def evaluate(self, image: "Image") -> "Tensor":
        """The centre of the image, float32 [3, size, size]."""
        return self.normalise(self._centre(image))

    def _centre(self, image: "Image") -> "Image":
        from vlp_data import transforms

        return transforms.centre(transforms.resize_short(image, self.short, self.interpolation), self.size)


@dataclass(frozen=True, kw_only=True)
class CentreCrop(Centred):
    """The view of CLIP: in evaluation the short side becomes `size` and the centre is cut out; in training a
    random crop is squashed to the square. The pixels are those of open_clip (memory CLIP specification 5.4).
    """

    kind: Literal["centre_crop"] = "centre_crop"
    mean: Colour = CLIP_MEAN
    """Subtracted from red, green and blue in 0..1."""
    std: Colour = CLIP_STD
    """What they are divided by then."""
    min_scale: float = 0.9
    """Smallest share of the image's area in a random crop."""
    flip: float = 0.0
    """Probability of mirroring in training."""


@dataclass(frozen=True, kw_only=True)
class ImageNetCrop(Centred):
    """The view of ImageNet classification: in evaluation the short side becomes size / `crop_percent` and the
    centre is cut out; in training a random crop of any share above 8 %. The pixels are those of timm.

    MAE evaluates up to 224 pixels with `crop_percent` 0.875 and larger sizes with 1.0.
    """

    kind: Literal["imagenet"] = "imagenet"
    min_scale: float = 0.08
    """Smallest share of the image's area in a random crop."""
    crop_percent: float = 0.875
    """Share of the short side that is seen in evaluation, 0..1."""

    EVALUATION: ClassVar[tuple[str, ...]] = ("size", "mean", "std", "interpolation", "crop_percent")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "crop_percent")
        fraction(self, "crop_percent")

    @property
    def short(self) -> int:
        """Short side of the image before the centre is cut out."""
        return int(self.size / self.crop_percent)


@dataclass(frozen=True, kw_only=True)
class Detection(ViewOptions):
    """The view of DETR: the aspect is kept, the short side becomes one of several sizes, and the longest side
    is limited; half of the training images are cropped first. Bilinear interpolation. The images of a batch
    differ in size: `vlp_data.objects.pad_images` makes a batch of them with a padding mask.

    ViSFT trains with `scales` 480..672 in steps of 32 and `longest` 672 (ViSFT specification 4.1).
    Source: arXiv 2005.12872, datasets/coco.py and datasets/transforms.py.
    """

    kind: Literal["detection"] = "detection"
    size: int = 800
    """Short side of an image in evaluation, in pixels."""
    longest: int = 1333
    """Longest side of an image; the short side gives way."""
    scales: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Short sides in training; one is drawn."""
    crop: Literal["random", "none"] = "random"
    """Cut a random part out of every second image, after it was resized to one of `crop_scales`."""
    crop_scales: tuple[int, ...] = (400, 500, 600)
    """Short sides of an image before a part is cut out; one is drawn."""
    crop_sides: tuple[int, int] = (384, 600)
    """Least and most pixels of the sides of such a part; a smaller image is taken whole."""

    EVALUATION: ClassVar[tuple[str, ...]] = ("size", "longest", "mean", "std")
    ragged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "longest")
        for name in ("scales", "crop_scales", "crop_sides"):
            if not (values := getattr(self, name)) or min(values) <= 0:
                raise ValueError(f"{name}={list(values)} must hold positive numbers")
        if self.crop_sides[0] > self.crop_sides[1]:
            raise ValueError(f"crop_sides={list(self.crop_sides)} must be least and most")

    def train(self, image: "Image", rng: random.Random, *, texts: Sequence[str] = ()) -> "Tensor":
        """A training view, float32 [3, H, W]; draws as `train_objects`."""
        from vlp_data.objects import Objects

        return self.train_objects(image, rng, Objects.none(image), texts=texts)[0]

    def train_objects(
        self, image: "Image", rng: random.Random, objects: "Objects", *, texts: Sequence[str] = ()
    ) -> tuple["Tensor", "Objects"]:
        """A training view, float32 [3, H, W], and the objects that are seen in it, moved with the pixels.

        Draws: flip, whether to crop (where `crop` allows it), then for a crop its scale, width, height, top
        and left; last the scale.
        """
        from vlp_data import objects as geometry

        if self.mirrors(rng, texts):
            image, objects = geometry.mirror(image, objects)
        if self.crop == "random" and rng.random() >= 0.5:
            scaled = geometry.fitted(image.size, rng.choice(self.crop_scales))
            image, objects = geometry.resize(image, objects, scaled)
            least, most = self.crop_sides
            width, height = (rng.randint(min(side, least), min(side, most)) for side in image.size)
            top, left = rng.randint(0, image.height - height), rng.randint(0, image.width - width)
            image, objects = geometry.crop(image, objects, (left, top, left + width, top + height))
        scaled = geometry.fitted(image.size, rng.choice(self.scales), self.longest)
        image, objects = geometry.resize(image, objects, scaled)
        return self.normalise(image), objects

    def evaluate(self, image: "Image") -> "Tensor":
        """The whole image, float32 [3, H, W]."""
        from vlp_data.objects import Objects

        return self.evaluate_objects(image, Objects.none(image))[0]

    def evaluate_objects(self, image: "Image", objects: "Objects") -> tuple["Tensor", "Objects"]:
        """The whole image, float32 [3, H, W], and its objects moved with the pixels."""
        from vlp_data import objects as geometry

        image, objects = geometry.resize(image, objects, geometry.fitted(image.size, self.size, self.longest))
        return self.normalise(image), objects


@dataclass(frozen=True, kw_only=True)
class LargeScaleJitter(ViewOptions):
    """The view of instance segmentation by Mask2Former: in training the image is scaled by a random factor
    and cut or padded to a square; in evaluation its sides are limited and padded to a multiple. Padding is
    right and below, and no mask tells it from the image (ViSFT specification 4.1). Bilinear interpolation.
    Images of evaluation may differ in size.

    Source: arXiv 2012.07177 section 3; arXiv 2112.01527 section 4.1.
    """

    kind: Literal["jitter"] = "jitter"
    size: int = 1024
    """Side of the square of training, in pixels."""
    min_scale: float = 0.1
    """Smallest factor; 1 is the factor with which the image just fits into the square."""
    max_scale: float = 2.0
    """Largest factor."""
    fill: int = 128
    """Grey value of padding, 0..255."""
    short: int = 800
    """Short side of an image in evaluation."""
    longest: int = 1333
    """Longest side of an image in evaluation; the short side gives way."""
    multiple: int = 32
    """Evaluation pads both sides to a multiple of this."""

    EVALUATION: ClassVar[tuple[str, ...]] = ("size", "short", "longest", "multiple", "fill", "mean", "std")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "min_scale", "short", "longest", "multiple")
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale={self.min_scale} is above max_scale={self.max_scale}")
        if not 0 <= self.fill <= 255:
            raise ValueError(f"fill={self.fill} must lie in 0..255")

    def train(self, image: "Image", rng: random.Random, *, texts: Sequence[str] = ()) -> "Tensor":
        """A training view, float32 [3, size, size]; draws as `train_objects`."""
        from vlp_data.objects import Objects

        return self.train_objects(image, rng, Objects.none(image), texts=texts)[0]

    def train_objects(
        self, image: "Image", rng: random.Random, objects: "Objects", *, texts: Sequence[str] = ()
    ) -> tuple["Tensor", "Objects"]:
        """A training view, float32 [3, size, size], and the objects that are seen in it, moved with the
        pixels.

        Draws: flip, factor, and, where a side is longer than the square, top and left of the crop.
        """
        from vlp_data import objects as geometry

        if self.mirrors(rng, texts):
            image, objects = geometry.mirror(image, objects)
        factor = rng.uniform(self.min_scale, self.max_scale)
        image, objects = geometry.resize(image, objects, geometry.jittered(image.size, self.size, factor))
        width, height = image.size
        if max(width, height) > self.size:
            top, left = (rng.randint(0, max(side - self.size, 0)) for side in (height, width))
            right, bottom = min(left + self.size, width), min(top + self.size, height)
            image, objects = geometry.crop(image, objects, (left, top, right, bottom))
        image, objects = geometry.pad(image, objects, (self.size, self.size), self.fill)
        return self.normalise(image), objects

    def evaluate(self, image: "Image") -> "Tensor":
        """The whole image with its padding, float32 [3, H, W]."""
        from vlp_data.objects import Objects

        return self.evaluate_objects(image, Objects.none(image))[0]

    def evaluate_objects(self, image: "Image", objects: "Objects") -> tuple["Tensor", "Objects"]:
        """The whole image with its padding, float32 [3, H, W], and its objects moved with the pixels."""
        from vlp_data import objects as geometry

        scaled = geometry.fitted(image.size, self.short, self.longest, down=True)
        image, objects = geometry.resize(image, objects, scaled)
        width, height = (-(-side // self.multiple) * self.multiple for side in image.size)
        image, objects = geometry.pad(image, objects, (width, height), self.fill)
        return self.normalise(image), objects


View: TypeAlias = Squash | CentreCrop | ImageNetCrop | Detection | LargeScaleJitter
"""What a model sees of an image; told apart by `kind`."""


def evaluation(view: View) -> "Callable[[Image], Tensor]":
    """From a decoded image to a model's input, float32 [3, H, W]; picklable."""
    return view.evaluate


def from_config(config: Mapping[str, Any]) -> View:
    """The view that `config()` stored; missing keys take the defaults of the kind.

    Raises ValueError that names an unknown kind or key, and a value that cannot be.
    """
    kinds = {member.__dataclass_fields__["kind"].default: member for member in get_args(View)}
    kind = config.get("kind")
    if kind not in kinds:
        raise ValueError(f"view: kind={kind!r} is unknown; known are {', '.join(kinds)}")
    member = kinds[kind]
    return from_mapping(member, config, ("kind", *member.EVALUATION), f"view of kind {kind}")
