"""Words attached to images (visual concepts), on their way into a model that sees them.

Source: ViCHA, arXiv 2208.13628 section 3.3; `vlp_core.concepts`, `vlp_data.concept_text`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlp_core.images import Concepts
from vlp_data.concept_text import collate_concepts, concept_ids, concept_words
from vlp_data.errors import BadSample
from vlp_data.options import ConceptOptions
from vlp_data.schema import Sample
from vlp_data.text import Tokenizer


def words_of(sample: Sample, image: int = 0) -> tuple[str, ...]:
    """The words attached to an image of a sample, in order; empty where there are none (`concept_words`
    refuses that)."""
    try:
        return tuple(concept_words(sample, image=image))
    except BadSample:
        return ()


@dataclass(frozen=True)
class ConceptReader:
    """From words to the concepts of a batch; picklable."""

    tokenizer: Tokenizer
    options: ConceptOptions

    def ids(self, words: Sequence[str]) -> list[int]:
        """Ids of the words of one image."""
        return concept_ids(words, self.tokenizer, self.options)

    def collate(self, rows: Sequence[Sequence[int]]) -> Concepts:
        """Concepts of images, padded as the options say."""
        read = collate_concepts(rows, self.tokenizer, self.options)
        assert read is not None  # there are options
        return Concepts(*read)


def as_evaluated(trained: ConceptOptions, *, alike: bool) -> ConceptOptions:
    """How concepts are read after training with `trained`: none are drawn, and with `alike` (the reference's
    retrieval and grounding) all are padded to `max_tokens`, so that the features of an image do not depend on
    its batch."""
    return replace(trained, share=None, pad="max" if alike else trained.pad)


def reads_concepts(model: Any) -> bool:
    """Whether the image encoder of a model reads concepts (`vlp_core.concepts.ConceptVision`)."""
    return getattr(getattr(model, "vision", None), "concepts", None) is not None


def require_fit(model: Any, options: ConceptOptions | None) -> None:
    """Raise ValueError where a model that reads concepts is given none, or one that does not is given
    some."""
    reads = reads_concepts(model)
    if reads and options is None:
        raise ValueError(
            f"this {type(model).__name__} sees the words attached to each image; give concepts, how they are "
            "read"
        )
    if not reads and options is not None:
        raise ValueError(
            f"this {type(model).__name__} has no concept encoder; leave concepts out, they would have no "
            "effect"
        )
    if options is not None and options.share is not None:
        raise ValueError(
            f"concepts.share={options.share} draws words at random, which an evaluation does not; leave it "
            "out"
        )
