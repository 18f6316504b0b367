"""What all kinds of examples share."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from PIL import Image as Pillow
from torch import Tensor

from vlp_data.cleaning import Clean
from vlp_data.concept_text import collate_concepts, sample_concepts
from vlp_data.errors import BadSample
from vlp_data.images import open_image
from vlp_data.objects import pad_images
from vlp_data.options import ConceptOptions, Squash, TextOptions, View
from vlp_data.regions import pick
from vlp_data.schema import Role, Sample, Source
from vlp_data.text import Encoded, Tokenizer, collate_ids, text_ids

_Example = TypeVar("_Example")


class Examples(Protocol[_Example]):
    """What a `Loader` needs: how many rows there are, what is made of a row, and a batch of that.

    The loader calls `example` and `collate` in its workers, so objects must be picklable and open files where
    they use them. All draws come from `rng`, which the loader seeds by (seed, epoch, index) and by (seed,
    position), so that a batch never depends on who made it. A `source` attribute is used where there is one:
    its keys name rows in messages, and its `runs` say that it is read file after file.
    """

    def __len__(self) -> int:
        """Rows of the source."""
        ...

    def example(self, index: int, rng: random.Random) -> _Example:
        """What is made of row `index`. Raises BadSample for a row that cannot be used: the loader counts it
        and takes another one. Any other exception stops the run."""
        ...

    def collate(self, examples: Sequence[_Example], rng: random.Random) -> Any:
        """A batch of them, best a `vlp_data.batch.Batch`."""
        ...


class Seen(NamedTuple):
    """An image as the model sees it: the pixels, and the ids of the concepts beside it (none without)."""

    image: Tensor
    concepts: list[int]


class HasSeen(Protocol):
    """An example of one image."""

    @property
    def key(self) -> str: ...

    @property
    def seen(self) -> Seen: ...


def opened(sample: Sample, view: View, number: int = 0) -> Pillow.Image:
    """Pixels of image `number`. Raises BadSample."""
    if number >= len(sample.images):
        raise BadSample("too few images", sample.key, f"the row has {len(sample.images)}")
    return open_image(sample.images[number], sample.key, truncated=view.truncated, max_pixels=view.max_pixels)


def drawn_text(sample: Sample, roles: tuple[Role, ...], rng: random.Random) -> str:
    """One of the sample's texts of these roles. Raises BadSample when there is none."""
    texts = [text for text in sample.texts if text.role in roles]
    if not texts:
        raise BadSample(f"no {' or '.join(roles)}", sample.key, f"the row has no {' or '.join(roles)}")
    return pick(texts, rng)


def require_squash(view: View) -> None:
    """Raise ValueError for a view that boxes cannot be followed through by the crop around a box."""
    if view.kind != "squash":
        raise ValueError(f"kind={view.kind}: images with boxes are seen by a view of kind=squash alone")


@dataclass(frozen=True, kw_only=True)
class ImageExamples:
    """Rows of images: fields and steps that the examples of all tasks have."""

    source: Source
    image: View = field(default_factory=Squash)
    """What the model sees of an image."""

    def __len__(self) -> int:
        return len(self.source)

    def view(self, sample: Sample, texts: Sequence[str], rng: random.Random, *, number: int = 0) -> Tensor:
        """The training view of image `number`, float32 [3, H, W]. `texts` are those that `careful_flip`
        minds. Raises BadSample."""
        return self.image.train(opened(sample, self.image, number), rng, texts=texts)

    def stack(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Views as one tensor [N, 3, H, W], and for views that keep the aspect the padding mask [N, H, W]."""
        return pad_images(images) if self.image.ragged else (torch.stack(list(images)), None)


@dataclass(frozen=True, kw_only=True)
class TextExamples(ImageExamples):
    """Rows of images with texts and, if asked, the concepts of the images."""

    tokenizer: Tokenizer
    text: TextOptions = field(default_factory=TextOptions)
    """How texts become ids."""
    concepts: ConceptOptions | None = None
    """Read the concepts of the images; None leaves them out of the batch."""

    def __post_init__(self) -> None:
        if self.text.separator or (self.concepts is not None and self.concepts.separator):
            _ = self.tokenizer.sep_id  # refuses a tokenizer without an end token before the first row is read

    def ids(self, text: str, *, clean: Clean = "caption", prompt: str = "") -> list[int]:
        """Ids of one text, framed. Raises BadSample ("empty text")."""
        return text_ids(text, self.tokenizer, self.text, clean=clean, prompt=prompt)

    def words(self, sample: Sample, rng: random.Random, *, number: int = 0) -> list[int]:
        """Ids of the concepts of image `number`, drawn as the options say; empty without. Raises
        BadSample."""
        return sample_concepts(sample, self.tokenizer, self.concepts, rng, image=number)

    def pad(self, rows: Sequence[Sequence[int]]) -> Encoded:
        """Rows of ids as tensors."""
        return collate_ids(rows, self.tokenizer, self.text)

    def images(self, examples: Sequence[HasSeen]) -> dict[str, Any]:
        """The fields of `vlp_data.batch.ImageBatch` for examples of one image each."""
        image, padding = self.stack([example.seen.image for example in examples])
        return {
            "keys": tuple(example.key for example in examples),
            "image": image,
            "padding": padding,
            "concepts": collate_concepts(
                [example.seen.concepts for example in examples], self.tokenizer, self.concepts
            ),
        }
