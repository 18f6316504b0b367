"""The concepts of an image as text for a model.

Source: ViCHA specification 2.3 and 4.2. Concepts come with a row (`Text.role` "concept"); `vlp-data concepts`
assigns them.
"""

import random
from collections.abc import Sequence

from vlp_data.batch import Concepts
from vlp_data.errors import BadSample
from vlp_data.options import ConceptOptions
from vlp_data.schema import Sample
from vlp_data.text import Tokenizer


def concept_words(sample: Sample, *, image: int = 0) -> list[str]:
    """The concepts of one image of a sample in their order, without empty ones. Raises BadSample ("no
    concepts") when there is none."""
    words = [
        text.text
        for text in sample.texts
        if text.role == "concept" and text.image == image and text.text.strip()
    ]
    if not words:
        which = f"image {image + 1} of the row" if len(sample.images) > 1 else "the row"
        raise BadSample(
            "no concepts",
            sample.key,
            f"{which} has no concepts, which this model reads; `vlp-data concepts assign` writes lists with "
            "them, or leave out `concepts`",
        )
    return words


def drawn_words(words: Sequence[str], options: ConceptOptions, rng: random.Random) -> list[str]:
    """The concepts of one visit: all of them, or int(share * n) draws with replacement.

    Where that is no draw at all, one is made: the reference would hand an empty text to the model.
    """
    if options.share is None:
        return list(words)
    return rng.choices(words, k=max(1, int(options.share * len(words))))


def concept_ids(words: Sequence[str], tokenizer: Tokenizer, options: ConceptOptions) -> list[int]:
    """[CLS] and the tokens of the concepts, with [SEP] between them if asked, cut to `max_tokens`."""
    if options.separator:
        parts = [tokenizer.token_ids(word) for word in words]
        ids = [number for part in parts for number in (tokenizer.sep_id, *part)][1:]
    else:
        ids = tokenizer.token_ids(" ".join(words))
    return tokenizer.frame(ids, max_tokens=options.max_tokens, separator=False)


def sample_concepts(
    sample: Sample,
    tokenizer: Tokenizer,
    options: ConceptOptions | None,
    rng: random.Random,
    *,
    image: int = 0,
) -> list[int]:
    """Ids of the concepts of one image of a sample, drawn as the options say; empty if `options` is None.
    Raises BadSample ("no concepts")."""
    if options is None:
        return []
    return concept_ids(drawn_words(concept_words(sample, image=image), options, rng), tokenizer, options)


def collate_concepts(
    rows: Sequence[Sequence[int]], tokenizer: Tokenizer, options: ConceptOptions | None
) -> Concepts | None:
    """Ids of the concepts of N images as tensors, padded as the options say; None if `options` is None."""
    if options is None:
        return None
    return Concepts(*tokenizer.pad(rows, options.max_tokens if options.pad == "max" else None))
