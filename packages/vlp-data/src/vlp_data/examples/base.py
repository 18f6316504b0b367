"""What all kinds of examples share."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from PIL import Image as Pillow
from torch import Tensor

from vlp_data.errors import BadSample
from vlp_data.images import open_image
from vlp_data.options import ImageOptions
from vlp_data.regions import pick
from vlp_data.schema import Role, Sample
from vlp_data.text import names_a_side
from vlp_data.transforms import train_view

_Example = TypeVar("_Example")


class Skipped(NamedTuple):
    """A sample that cannot be used: counted by `cause`, logged once per cause with `file`."""

    cause: str
    file: str
    detail: str


class Examples(Protocol[_Example]):
    """What a `Loader` needs."""

    def __len__(self) -> int: ...

    def example(self, index: int, rng: random.Random) -> _Example | Skipped:
        """What is made of row `index`, or why it cannot be used."""
        ...

    def collate(self, examples: Sequence[_Example], rng: random.Random) -> Any:
        """A batch of them."""
        ...


def skipped(error: BadSample, sample: Sample | None, index: int) -> Skipped:
    """The fault with the name of what the user has to look at."""
    if error.file:
        return Skipped(error.cause, error.file, error.detail)
    return Skipped(error.cause, f"sample {index}" if sample is None else sample.key, error.detail)


def opened(sample: Sample, options: ImageOptions, number: int = 0) -> Pillow.Image:
    """Pixels of image `number`. Raises BadSample."""
    if number >= len(sample.images):
        raise BadSample("too few images", sample.key, f"the row has {len(sample.images)}")
    return open_image(
        sample.images[number], sample.key, truncated=options.truncated, max_pixels=options.max_pixels
    )


def flips(options: ImageOptions, texts: Sequence[str]) -> float:
    """Probability of mirroring an image that these texts speak of."""
    careful = options.careful_flip != "off"
    whole_word = options.careful_flip == "word"
    if careful and any(names_a_side(text, whole_word=whole_word) for text in texts):
        return 0.0
    return options.flip


def views(
    sample: Sample, options: ImageOptions, texts: Sequence[str], rng: random.Random, *, count: int = 1
) -> list[Tensor]:
    """Training views of the first `count` images, each drawn by itself: float32 [3, R, R]. `texts` are those
    that `careful_flip` minds. Raises BadSample."""
    return [
        train_view(
            opened(sample, options, number),
            rng,
            size=options.size,
            view=options.view,
            min_scale=options.min_scale,
            flip_probability=flips(options, texts),
            augment=options.augment,
        )
        for number in range(count)
    ]


def drawn_text(sample: Sample, roles: tuple[Role, ...], rng: random.Random) -> str:
    """One of the sample's texts of these roles. Raises BadSample when there is none."""
    texts = [text for text in sample.texts if text.role in roles]
    if not texts:
        raise BadSample(f"no {' or '.join(roles)}", sample.key, f"the row has no {' or '.join(roles)}")
    return pick(texts, rng)
