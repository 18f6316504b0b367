"""What retrieval is measured on: images, texts, and which text describes which image."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vlp_data.errors import BadSample, DataError
from vlp_data.images import open_image
from vlp_data.schema import Source

from vlp_eval.concepts import words_of


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """N images and M texts; text j describes image `image_of_text[j]`, every image has at least one text.

    `image(i)` decodes image i. It must be picklable when worker processes are used. `concepts[i]` are the
    words attached to image i; empty where nothing is known of any image.
    """

    image: Callable[[int], Any]
    image_ids: tuple[str, ...]
    texts: tuple[str, ...]
    text_ids: tuple[str, ...]
    image_of_text: tuple[int, ...]
    concepts: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if not len(self.texts) == len(self.text_ids) == len(self.image_of_text):
            raise ValueError(
                f"{len(self.texts)} texts, {len(self.text_ids)} text ids and {len(self.image_of_text)} "
                "images of texts"
            )
        if self.concepts and len(self.concepts) != len(self.image_ids):
            raise ValueError(f"{len(self.image_ids)} images and the concepts of {len(self.concepts)}")
        for name, ids in (("image", self.image_ids), ("text", self.text_ids)):
            if len(set(ids)) < len(ids):
                double = Counter(ids).most_common(1)[0][0]
                raise ValueError(f"{name} id {double!r} occurs twice in the gallery; results are kept by id")
        if not self.texts:
            raise ValueError("the gallery is empty")
        if set(self.image_of_text) != set(range(len(self.image_ids))):
            raise ValueError("every image of a gallery needs a text, and every text an image")

    @classmethod
    def from_source(cls, source: Source, *, limit: int | None = None) -> "Gallery":
        """All images of a source with their captions, or the first `limit` images; rows of one image file are
        taken together.

        Images are named by the key of their (first) row, texts by that key and a number. Raises `DataError`
        for a row that cannot be read, or that has no caption or several images (leaving it out would change
        the result), and for an image that has concepts in one row and others or none in another.
        """
        rows: list[int] = []
        image_ids: list[str] = []
        known: dict[str, int] = {}
        captions: list[list[str]] = []
        concepts: list[tuple[str, ...]] = []
        for number in range(len(source)):
            try:
                sample = source[number]
            except BadSample as problem:
                raise DataError(f"{problem}; an evaluation needs every row") from problem
            own = [text.text for text in sample.texts if text.role == "caption"]
            if not own or len(sample.images) != 1:
                raise DataError(f"{sample.key}: retrieval needs rows of one image with captions")
            name = sample.images[0].path or sample.key
            if name not in known:
                if len(rows) == limit:
                    continue
                known[name] = len(rows)
                rows.append(number)
                image_ids.append(sample.key)
                captions.append([])
                concepts.append(words_of(sample))
            elif concepts[known[name]] != words_of(sample):
                raise DataError(
                    f"{sample.key}: the concepts of {name} differ from those of {image_ids[known[name]]}"
                )
            captions[known[name]] += own
        return cls(
            image=_SourceImages(source, tuple(rows)),
            image_ids=tuple(image_ids),
            texts=tuple(text for own in captions for text in own),
            text_ids=tuple(
                f"{name}#{n}" for name, own in zip(image_ids, captions, strict=True) for n in range(len(own))
            ),
            image_of_text=tuple(i for i, own in enumerate(captions) for _ in own),
            concepts=tuple(concepts) if any(concepts) else (),
        )

    def map_texts(self, clean: Callable[[str], str]) -> "Gallery":
        """The same gallery with every text passed through `clean`, such as `vlp_data.text.pre_caption`."""
        cleaned = []
        for name, text in zip(self.text_ids, self.texts, strict=True):
            try:
                cleaned.append(clean(text))
            except ValueError as problem:
                raise ValueError(f"text {name!r} of the gallery: {problem}") from problem
        return replace(self, texts=tuple(cleaned))

    def without_repeated_texts(self) -> "Gallery":
        """The first of equal texts of an image only, as ViLT and VLC evaluate; texts of different images may
        still be equal."""
        kept: dict[tuple[int, str], int] = {}
        for j, key in enumerate(zip(self.image_of_text, self.texts, strict=True)):
            kept.setdefault(key, j)
        return self._texts(list(kept.values()))

    def first_texts(self, count: int) -> "Gallery":
        """The first `count` texts of each image only; many CLIP papers cut COCO to five."""
        seen, kept = [0] * len(self.image_ids), []
        for j, i in enumerate(self.image_of_text):
            seen[i] += 1
            if seen[i] <= count:
                kept.append(j)
        return self._texts(kept)

    def _texts(self, kept: list[int]) -> "Gallery":
        return replace(
            self,
            texts=tuple(self.texts[j] for j in kept),
            text_ids=tuple(self.text_ids[j] for j in kept),
            image_of_text=tuple(self.image_of_text[j] for j in kept),
        )


@dataclass(frozen=True)
class _SourceImages:
    """Decodes image i of a gallery from its row; a class and not a closure, so that worker processes can have
    it."""

    source: Source
    rows: tuple[int, ...]

    def __call__(self, i: int) -> Any:
        sample = self.source[self.rows[i]]
        return open_image(sample.images[0], sample.key)
